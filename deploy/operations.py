"""What an operator asks of a release, with everything that speaks against it: for the command line and HTTP alike.

Each verb becomes a transition for ``ReleaseStore.change``. A refusal is raised inside the transition, so
the log has every attempt. ``override`` is the operator's reason to go ahead without the gate's or the
verdict's consent; nothing overrides a wrong digest.
"""

from collections.abc import Callable

from deploy import release as transitions
from deploy.errors import TransitionRefused, VersionCorrupt, VersionNotFound
from deploy.registry import Registry
from deploy.release import Release
from deploy.settings import VerdictSettings
from deploy.verdict import Verdict, judge
from deploy.versions import Version, VersionKind
from feedback.controls import in_force
from feedback.preference import preferences
from feedback.records import Comparison
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
    """Make the canary stable, where the verdict is that it is better or not worse."""

    def transition(release: Release) -> Release:
        changed = transitions.promote(release)
        if verdict.decision in ("worse", "undecided") and override is None:
            raise TransitionRefused(f"version {release.canary}: {verdict.sentence()}")
        return changed

    return transition


async def current_verdict(feedback: FeedbackStore, release: Release, settings: VerdictSettings) -> Verdict:
    """The verdict on the release's canary, from the blind comparisons since it began.

    A labeler who judged the same candidates twice counts once, by the later judgement. Without a canary
    the verdict is undecided.

    Raises:
        StoreUnavailable: The feedback log cannot be read.
    """
    if release.canary is None or release.stable is None:
        return Verdict()
    began = f"{int(release.changed_at * 1000)}-0"
    given = [entry.record async for entry in feedback.scan(after=began) if isinstance(entry.record, Comparison)]
    return judge(preferences(in_force(given).ordinary, release.canary, release.stable), settings)
