"""How often people prefer a version to the one it replaced, or is to replace, and what is certain of that.

A win rate leaves ties out, as the verdict does, and its bounds are those of the verdict's own bets: they hold however
often one looks, and one of them excludes ½ exactly where the verdict is *better* or *worse*.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from deploy.bets import Floats, preference_bounds
from deploy.evidence import CanaryEvidence
from deploy.release import Attempt, Release
from feedback.controls import in_force
from feedback.preference import preferences
from feedback.records import Comparison
from feedback.store import FeedbackStore
from feedback.summary import VersionPair

MAX_LOOKS = 1000
"""Points of a course; of more comparisons, as many are looked at."""


class WinRate(BaseModel):
    """How one version fares against another in blind comparisons."""

    model_config = ConfigDict(frozen=True)
    version: int
    over: int = Field(description="the version that was stable before it, or is while it is the canary")
    since: float = Field(description="unix seconds: when it became stable or the canary")
    wins: int
    losses: int
    ties: int
    rate: float | None = Field(description="wins of wins and losses; null without either")
    low: float = Field(description="at no look above the preference, with probability 1 − alpha of the verdict")
    high: float = Field(description="at no look below it, likewise")


@dataclass(frozen=True)
class Step:
    """A version that took another's place, or is the canary that may."""

    version: int
    over: int
    since: float


@dataclass(frozen=True)
class Course:
    """How the canary's comparisons without a tie went, look by look: [N] each.

    Attributes:
        looks: how many comparisons there were.
        wins: how many of these the canary had won.
        low: lower bound of the preference.
        high: upper bound.
        ties: comparisons left out, in all.
    """

    looks: npt.NDArray[np.int_]
    wins: npt.NDArray[np.int_]
    low: Floats
    high: Floats
    ties: int

    @classmethod
    def of(cls, outcomes: Iterable[float], alpha: float) -> "Course":
        """The course of outcomes in the order they came: +1 the canary won, −1 it lost, 0 a tie."""
        signs = np.sign(np.fromiter(outcomes, np.float64))
        decided = signs[signs != 0]
        count = len(decided)
        looks = np.unique(np.linspace(1, count, min(count, MAX_LOOKS)).round().astype(int))
        wins = np.cumsum(decided > 0)[looks - 1]
        low, high = preference_bounds(wins, looks - wins, alpha)
        return cls(looks, wins, low, high, len(signs) - count)

    def win_rate(self, step: Step) -> WinRate:
        """Where it has got to."""
        if not len(self.looks):
            return _win_rate(step, 0, 0, self.ties, 0.0, 1.0)
        wins, losses = int(self.wins[-1]), int(self.looks[-1] - self.wins[-1])
        return _win_rate(step, wins, losses, self.ties, float(self.low[-1]), float(self.high[-1]))


class CanaryCourse:
    """The course of the canary of the moment; requests that come together share one reading."""

    def __init__(self, feedback: FeedbackStore, alpha: float) -> None:
        self._evidence = CanaryEvidence(feedback)
        self._alpha = alpha
        self._reading = asyncio.Lock()
        self._told: tuple[int, tuple[Comparison, ...], Course] | None = None

    async def read(self, release: Release) -> Course:
        """The same object as last time where there is nothing new. Raises StoreUnavailable."""
        async with self._reading:
            given = await self._evidence.read(release)
            if self._told is None or self._told[0] != release.generation or self._told[1] is not given:
                course = await asyncio.to_thread(self._course, given, release)
                self._told = release.generation, given, course
            return self._told[2]

    def _course(self, given: Sequence[Comparison], release: Release) -> Course:
        if release.canary is None or release.stable is None:
            return Course.of((), self._alpha)
        return Course.of(preferences(in_force(given).ordinary, release.canary, release.stable), self._alpha)


def steps(history: Sequence[Attempt], release: Release) -> list[Step]:
    """The versions that took another's place, oldest first, and last the canary, if there is one.

    Args:
        history: the audit log, newest first.
        release: the one in force.
    """
    found: list[Step] = []
    stable: int | None = None
    for attempt in reversed(history):
        if not attempt.accepted or attempt.stable is None:
            continue
        if attempt.verb == "promote" and stable is not None:
            found.append(Step(attempt.stable, stable, attempt.at))
        stable = attempt.stable
    if release.canary is not None and release.stable is not None:
        found.append(Step(release.canary, release.stable, release.changed_at))
    return found


def released_win_rates(taken: Iterable[Step], pairs: Iterable[VersionPair], alpha: float) -> list[WinRate]:
    """The win rate of each step whose two versions were compared, of the newest comparisons of the two."""
    found = []
    compared = {(pair.a, pair.b): pair for pair in pairs}
    for step in taken:
        if (pair := compared.get((min(step.version, step.over), max(step.version, step.over)))) is not None:
            of_first = step.version == pair.a
            wins, losses = (pair.wins, pair.losses) if of_first else (pair.losses, pair.wins)
            low, high = preference_bounds([wins], [losses], alpha)
            found.append(_win_rate(step, wins, losses, pair.ties, float(low[0]), float(high[0])))
    return found


def _win_rate(step: Step, wins: int, losses: int, ties: int, low: float, high: float) -> WinRate:
    return WinRate(
        version=step.version,
        over=step.over,
        since=step.since,
        wins=wins,
        losses=losses,
        ties=ties,
        rate=wins / (wins + losses) if wins + losses else None,
        low=low,
        high=high,
    )
