"""The guard: promotes a canary that people find good, drops one that they find worse or that does not run well.

``decide`` says what should happen; ``Guard`` looks every few seconds, on every server, and makes it happen. Any
number of guards may look: a change is made only from the generation it was decided on. So that the audit log does not
fill with the attempts of those that came second, each waits for its turn, in the order of the servers' names.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploy import operations
from deploy import release as transitions
from deploy.arms import ArmFigures
from deploy.errors import StaleGeneration
from deploy.evidence import HISTORY, CanaryEvidence, verdict_on
from deploy.rails import rail_hit
from deploy.registry import ReleaseStore
from deploy.release import Release, ReplicaReport
from deploy.settings import DeploySettings
from deploy.verdict import Verdict
from feedback.records import Comparison
from feedback.store import FeedbackStore

_LOGGER = logging.getLogger(__name__)

NAME = "guard"
"""Who the audit log says made the change."""


@dataclass(frozen=True)
class Action:
    """A change to make, and the evidence for it."""

    verb: Literal["promote", "rollback"]
    reason: str


@dataclass(frozen=True)
class Look:
    """What a guard saw, and what it did, if anything."""

    release: Release
    verdict: Verdict
    done: Action | None = None


def decide(
    release: Release, verdict: Verdict, replicas: Sequence[ReplicaReport], settings: DeploySettings
) -> Action | None:
    """What should happen to the canary now; None where it should go on.

    Args:
        release: the one in force.
        verdict: on its canary.
        replicas: what the living servers report.
        settings: limits, and what may happen without an operator.
    """
    if release.canary is None or release.stable is None:
        return None
    if settings.auto_rollback:
        if (why := _not_loadable(release.canary, release.generation, replicas)) is not None:
            return Action("rollback", why)
        canary, stable = (_figures(release, version, replicas) for version in (release.canary, release.stable))
        if (why := rail_hit(canary, stable, settings.rails)) is not None:
            return Action("rollback", why)
        if verdict.decision == "worse":
            return Action("rollback", verdict.sentence())
    accepted = {"off": (), "better": ("better",), "non_inferior": ("better", "not_worse")}[settings.auto_promote]
    if verdict.decision in accepted and verdict.for_promotion and not verdict.held:
        return Action("promote", verdict.sentence())
    return None


def _not_loadable(canary: int, generation: int, replicas: Sequence[ReplicaReport]) -> str | None:
    """Why no server can serve the canary; None where one does, or may yet."""
    if any(report.wanted != generation or canary in (*report.live, *report.loading) for report in replicas):
        return None
    failures = [report.failed[canary] for report in replicas if canary in report.failed]
    return f"no server can load it: {failures[0]}" if failures else None


def _figures(release: Release, version: int, replicas: Sequence[ReplicaReport]) -> ArmFigures:
    """The version's traffic on all servers since the canary began."""
    return ArmFigures.total(
        report.arms[version]
        for report in replicas
        if report.generation == release.generation and version in report.arms
    )


class Guard:
    """Looks at the canary and acts; one per server."""

    def __init__(self, replica: str, releases: ReleaseStore, feedback: FeedbackStore, settings: DeploySettings) -> None:
        """Prepare a guard.

        Args:
            replica: this server's name in its reports; the order of names is that of turns.
            releases: changed where something is decided.
            feedback: read.
            settings: limits, and what may happen without an operator.
        """
        self._replica = replica
        self._releases = releases
        self._settings = settings
        self._evidence = CanaryEvidence(feedback)
        self._reading = asyncio.Lock()
        self._given: tuple[Comparison, ...] = ()
        self._verdict = Verdict()
        """On ``_given``; computed again when there are others."""
        self._decided: tuple[int, float] | None = None
        """Generation on which something was decided, and when that was first seen (monotonic)."""

    async def look(self) -> Look:
        """Look once, and act if something is decided and it is this server's turn.

        Raises:
            DeployError: The release cannot be read or changed now.
            FeedbackError: The feedback log cannot be read now.
        """
        release = await self._releases.read()
        verdict = await self.verdict(release)
        replicas = await self._releases.replicas() if release.canary is not None else []
        action = decide(release, verdict, replicas, self._settings)
        if action is None or not self._is_its_turn(release.generation, replicas):
            return Look(release, verdict)
        transition = transitions.rollback if action.verb == "rollback" else operations.promote_canary(verdict)
        try:
            changed = await self._releases.change(
                transition, verb=action.verb, by=NAME, reason=action.reason, expect=release.generation
            )
        except StaleGeneration:  # an operator, or another guard, was quicker
            return Look(release, verdict)
        _LOGGER.warning("version %s: %s: %s", release.canary, action.verb, action.reason)
        return Look(changed, verdict, action)

    async def verdict(self, release: Release) -> Verdict:
        """The verdict on the release's canary; only what the log has new is read.

        Raises:
            DeployError: The audit log cannot be read now.
            FeedbackError: The feedback log cannot be read now.
        """
        async with self._reading:
            given = await self._evidence.read(release)
            if given is not self._given:
                history = await self._releases.history(HISTORY)
                self._verdict = await verdict_on(given, release, self._settings.verdict, history)
                self._given = given
            return self._verdict

    def _is_its_turn(self, generation: int, replicas: Sequence[ReplicaReport]) -> bool:
        """True at once for the first server by name; for the others if those before had time for two looks each."""
        now = time.monotonic()
        if self._decided is None or self._decided[0] != generation:
            self._decided = generation, now
        before = sum(report.replica < self._replica for report in replicas)
        return now - self._decided[1] >= before * 2 * self._settings.guard_seconds
