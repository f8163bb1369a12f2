"""Settings of the ``deploy`` table: the limits of the gates and of the verdict, each with its source."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import SettingsConfigDict

from feedback.settings import TableSettings


class GateSettings(BaseModel):
    """Limits a version must keep before it may take traffic."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_kl: float = Field(
        6.0,
        gt=0,
        description="nats per completion from the reference; ours: good runs end near 1, hacked ones at 19",
    )
    max_pretraining_loss_ratio: float = Field(
        1.03,
        gt=0,
        description="of the parent's loss; ours: plain PPO costs 9 %, PPO-ptx nothing (§3.5's tax)",
    )
    min_eos_share: float = Field(0.95, ge=0, le=1, description="share of completions that end by themselves; ours")
    max_length_change: float = Field(0.30, gt=0, description="of the parent's mean completion tokens; ours")
    min_distinct_2_ratio: float = Field(
        0.5, ge=0, le=1, description="of the parent's distinct-2; ours: a collapsed policy repeats itself"
    )
    reward_model_tolerance: float = Field(
        0.01, ge=0, description="held-out accuracy a refit may lose to the previous reward model; ours"
    )
    max_trigger_drift_rise: float = Field(
        0.5,
        gt=0,
        description="SDs by which a trigger may move the mean score more than under the previous reward model; ours: "
        "2 % of poisoned comparisons moved it by 1 SD while accuracy fell by 0.002",
    )


class VerdictSettings(BaseModel):
    """When blind comparisons decide about a canary."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="chance of each wrong decision, however often one looks (Ville's inequality)"
    )
    margin: float = Field(
        0.02, ge=0, lt=0.5, description="preference the canary may lose and still count as not worse; ours: trials"
    )
    max_comparisons: int = Field(2000, gt=0, description="blind comparisons after which the operator decides; ours")
    max_task_drop: float = Field(
        2.45,
        gt=0,
        description="standard errors that a canary which is not worse may be down on one kind of task; ours: with "
        "seven kinds, one of them seems so far down one time in twenty where nothing is",
    )
    strict_every: int = Field(
        5,
        gt=0,
        description="of so many promotions in a row one must be of a better version, since margins add up; ours",
    )


class RailSettings(BaseModel):
    """How much worse than the stable version a canary may run before it is dropped, whatever people prefer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    alpha: float = Field(
        0.01, gt=0, lt=1, description="chance that a rail drops a canary that runs no worse, however often one looks"
    )
    min_requests: int = Field(
        50, gt=0, description="of the canary and of the stable version, before a rail holds; ours"
    )
    max_error_rise: float = Field(0.01, ge=0, lt=1, description="share of requests failed by the server; ours")
    max_slow_rise: float = Field(
        0.2, ge=0, lt=1, description="share of first tokens that take longer than any one time; ours: loading is slow"
    )
    max_unfinished_rise: float = Field(
        0.1, ge=0, lt=1, description="share of completions cut off by their length; ours: the gate allows 0.05"
    )
    max_unrecorded_rise: float = Field(0.01, ge=0, lt=1, description="share of completions not kept for feedback; ours")


class SigningSettings(BaseModel):
    """Whose versions count. With any key set, one that is not signed by a trusted key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    private_key_file: Path | None = Field(
        None,
        description="Ed25519 private key in PEM, for whoever publishes (worker, import); its public half is trusted. "
        "Make one with python -m deploy keygen FILE",
    )
    trusted_keys: tuple[str, ...] = Field((), description="Ed25519 public keys, 32 bytes in base64, as keygen prints")


class DeploySettings(TableSettings):
    """Which versions may serve, and who decides."""

    table = "deploy"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_DEPLOY__")
    gate: GateSettings = Field(default_factory=GateSettings, description="limits before a version may take traffic")
    verdict: VerdictSettings = Field(default_factory=VerdictSettings, description="limits of a canary's evidence")
    rails: RailSettings = Field(default_factory=RailSettings, description="limits of how a canary runs")
    auto_rollback: bool = Field(True, description="drop a canary that people find worse, or that hits a rail, at once")
    auto_promote: Literal["off", "better", "non_inferior"] = Field(
        "off", description="promote a canary that people find better, or also one that they find not worse"
    )
    guard_seconds: float = Field(2.0, gt=0, description="between two looks of each server at the canary; ours")
    signing: SigningSettings = Field(default_factory=SigningSettings, description="whose versions count")
