"""What an operator asks of a release, with everything that speaks against it: for the command line and HTTP alike.

Each verb becomes a transition for ``ReleaseStore.change``. A refusal is raised inside the transition, so
the log has every attempt. ``override`` is the operator's reason to go ahead without the gate's or the
verdict's consent; nothing overrides a wrong digest.
"""

from collections.abc import Callable, Sequence

from deploy import release as transitions
from deploy.errors import TransitionRefused, VersionCorrupt, VersionNotFound
from deploy.evidence import CanaryEvidence, verdict_on
from deploy.registry import Registry
from deploy.release import Attempt, Release
from deploy.settings import VerdictSettings
from deploy.verdict import Verdict
from deploy.versions import Version, VersionKind
from feedback.store import FeedbackStore

Transition = Callable[[Release], Release]


def start_canary(registry: Registry, number: int, fraction: float, override: str | None = None) -> Transition:
    """Let version ``number`` serve ``fraction`` of the traffic, where its files and its gate allow it."""

    def transition(release: Release) -> Release:
        changed = transitions.canary(release, number, fraction)
        try:
            version = registry.get(VersionKind.POLICY, number)
            registry.verify(version)
        except (VersionNotFound, VersionCorrupt) as error:
            raise TransitionRefused(str(error)) from error
        if (reasons := gate_refusals(version)) and override is None:
            raise TransitionRefused(f"version {number} did not pass its gate: {'; '.join(reasons)}")
        return changed

    return transition


def gate_refusals(version: Version) -> list[str]:
    """What the gate had against a version; one that was never gated has that against it."""
    gate = version.manifest.gate
    return ["it was never measured"] if gate is None else gate.refusals()


def promote_canary(verdict: Verdict, override: str | None = None) -> Transition:
    """Make the canary stable, where the verdict is that it is better, or not worse where that suffices."""

    def transition(release: Release) -> Release:
        changed = transitions.promote(release)
        if not verdict.for_promotion and override is None:
            raise TransitionRefused(f"version {release.canary}: {verdict.sentence()}")
        return changed

    return transition


async def current_verdict(
    feedback: FeedbackStore, release: Release, settings: VerdictSettings, history: Sequence[Attempt] = ()
) -> Verdict:
    """The verdict on the release's canary, from the blind comparisons since it began.

    A labeler who judged the same candidates twice counts once, by the later judgement. Without a canary
    the verdict is undecided.

    Args:
        feedback: the log.
        release: the one in force.
        settings: when to decide.
        history: the audit log, newest first; without it, not being worse always suffices for a promotion.

    Raises:
        StoreUnavailable: The feedback log cannot be read.
    """
    given = await CanaryEvidence(feedback).read(release)
    return await verdict_on(given, release, settings, history)


def why(reason: str, override: str | None) -> str:
    """The reason that the log keeps: the operator's, and that for going ahead without consent."""
    return "; ".join(part for part in (reason, override and f"override: {override}") if part)
