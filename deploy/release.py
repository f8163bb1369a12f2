"""The release: which version serves whom. Pure transitions; ``registry.ReleaseStore`` makes them happen.

``stable`` serves everyone but the canary's share; ``previous`` is where a rollback without a canary goes.
Each accepted change raises ``generation`` by one (the store does that), so a change made from a release
that has moved on is recognised and refused.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from deploy.arms import ArmFigures
from deploy.errors import TransitionRefused

MAX_CANARY_FRACTION = 0.5
"""A canary never serves more than half: beyond that it is the stable version without having been promoted."""


class Release(BaseModel):
    """Which versions serve, since when and by whose decision. Numbers are policy versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stable: int | None = None
    canary: int | None = None
    canary_fraction: float = Field(0.0, ge=0, le=MAX_CANARY_FRACTION, description="share of sticky traffic")
    previous: int | None = None
    generation: int = Field(0, ge=0, description="changes accepted so far")
    changed_at: float = Field(0.0, description="unix seconds of the last change, by Redis' clock")
    by: str = ""
    reason: str = ""

    def live(self) -> tuple[int, ...]:
        """The versions that must be serving: stable, then canary."""
        return tuple(version for version in (self.stable, self.canary) if version is not None)


def first(release: Release, number: int) -> Release:
    """The very first stable version. Raises TransitionRefused when there is one already."""
    if release.stable is not None:
        raise TransitionRefused(
            f"version {release.stable} is stable already; version {number} must go through a canary"
        )
    return release.model_copy(update={"stable": number})


def canary(release: Release, number: int, fraction: float) -> Release:
    """Let ``number`` serve ``fraction`` of the traffic. Raises TransitionRefused with the reason."""
    if not 0 < fraction <= MAX_CANARY_FRACTION:
        raise TransitionRefused(f"fraction {fraction} must be above 0 and at most {MAX_CANARY_FRACTION}")
    if release.stable is None:
        raise TransitionRefused("there is no stable version to compare a canary with")
    if number == release.stable:
        raise TransitionRefused(f"version {number} is the stable version")
    if release.canary is not None:
        raise TransitionRefused(f"version {release.canary} is the canary; promote it or roll it back first")
    return release.model_copy(update={"canary": number, "canary_fraction": fraction})


def promote(release: Release) -> Release:
    """The canary becomes stable, stable becomes previous. Raises TransitionRefused without a canary."""
    if release.canary is None:
        raise TransitionRefused("there is no canary to promote")
    return release.model_copy(
        update={"stable": release.canary, "previous": release.stable, "canary": None, "canary_fraction": 0.0}
    )


def rollback(release: Release) -> Release:
    """Drop the canary; without one, return to the previous version.

    The version rolled back from does not become ``previous``: a second rollback must not bring it back.

    Raises:
        TransitionRefused: There is neither a canary nor a previous version.
    """
    if release.canary is not None:
        return release.model_copy(update={"canary": None, "canary_fraction": 0.0})
    if release.previous is None:
        raise TransitionRefused("there is neither a canary to drop nor a previous version to return to")
    return release.model_copy(update={"stable": release.previous, "previous": None})


class Attempt(BaseModel):
    """One entry of the audit log: who tried what, why, and what came of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    stream_id: str
    verb: str
    by: str
    reason: str
    outcome: str
    generation: int | None = None
    stable: int | None = Field(None, description="of an accepted change: the version stable from then on")
    canary: int | None = Field(None, description="of an accepted change: the canary from then on")
    canary_fraction: float | None = Field(None, description="of an accepted change: its share of sticky traffic")
    version: int | None = None
    kind: str | None = None

    @classmethod
    def of(cls, stream_id: object, fields: Mapping[Any, object] | None) -> Self:
        """The attempt a stream entry holds; empty fields count as absent."""
        given = {str(name): value for name, value in (fields or {}).items() if value != ""}
        return cls.model_validate({"by": "", "reason": "", **given, "stream_id": stream_id})

    @property
    def accepted(self) -> bool:
        """True where the attempt changed something."""
        return self.outcome == "accepted"

    @property
    def at(self) -> float:
        """Unix seconds, by Redis' clock."""
        return int(self.stream_id.split("-")[0]) / 1000


class ReplicaReport(BaseModel):
    """What one server has live and how that runs; it expires unless it is repeated."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    replica: str
    generation: int = Field(description="of the release being served")
    wanted: int = Field(0, description="newest generation seen; above the other where versions are being loaded")
    live: tuple[int, ...]
    loading: tuple[int, ...] = Field((), description="versions not live yet that have not failed either")
    failed: dict[int, str] = Field({}, description="versions that could not be loaded for it, and why")
    arms: dict[int, ArmFigures] = Field({}, description="by version, since that generation")
    detail: str = ""
