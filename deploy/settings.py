"""Settings of the ``deploy`` table: the limits of the gates and of the verdict, each with its source."""

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


class DeploySettings(TableSettings):
    """Which versions may serve, and who decides."""

    table = "deploy"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_DEPLOY__")
    gate: GateSettings = Field(default_factory=GateSettings, description="limits before a version may take traffic")
    verdict: VerdictSettings = Field(default_factory=VerdictSettings, description="limits of a canary's evidence")
