"""The verdict: what blind comparisons say about a canary, valid however often one looks.

Each claim is tested by betting against its opposite. A comparison the canary wins is x = +1, one it loses
x = −1; ties are left out. Against the null hypothesis E[x] ≤ −2m (the canary is preferred with probability
at most ½ − m), a gambler who stakes the fraction κ of what can be lost without ruin multiplies his wealth by

    1 + κ (x + 2m) / (1 − 2m)        that is (1 + κ (1 + 2m)/(1 − 2m)) for a win, (1 − κ) for a loss,

whose expectation under the null is at most 1. So is that of the mean over many κ, which spares us choosing
one. By Ville's inequality such a wealth ever reaches 1/α with probability at most α, whenever one stops
(Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2023, §4).

Three wealths are kept: *better* (m = 0), *worse* (m = 0, wins and losses exchanged) and *not worse* (m = the
margin). The highest value each has reached is what counts.
"""

import functools
import math
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deploy.settings import VerdictSettings

Decision = Literal["better", "worse", "not_worse", "undecided"]

_STAKES = tuple((step + 0.5) / 100 for step in range(100))
"""κ, evenly spread: small stakes win where the preference is slight, large ones where it is clear."""


class Verdict(BaseModel):
    """What the comparisons seen so far say; wealths are the highest reached (1/α decides)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    decision: Decision = "undecided"
    wealth_better: float = 1.0
    wealth_worse: float = 1.0
    wealth_not_worse: float = 1.0
    wins: int = 0
    comparisons: int = 0
    ties: int = 0
    held: bool = False

    def sentence(self) -> str:
        """The verdict for an operator."""
        seen = f"{self.comparisons} blind comparisons without a tie ({self.wins} for the canary), {self.ties} ties"
        said = {
            "better": "the canary is better",
            "worse": "the canary is worse",
            "not_worse": "the canary is not worse within the margin",
            "undecided": "undecided, and held for the operator" if self.held else "undecided yet",
        }[self.decision]
        return f"{said}: {seen}"


class Evidence:
    """Blind comparisons of a canary with the stable version, added one at a time."""

    def __init__(self, settings: VerdictSettings) -> None:
        self._settings = settings
        self._needed = math.log(1 / settings.alpha)
        self._wins = self._losses = self._ties = 0
        self._better = self._worse = self._not_worse = 0.0
        self._settled: Decision | None = None

    def add(self, outcome: float) -> None:
        """Take in one comparison: positive where the canary won, negative where it lost, 0 for a tie."""
        if outcome == 0:
            self._ties += 1
            return
        self._wins += outcome > 0
        self._losses += outcome < 0
        self._better = max(self._better, log_wealth(self._wins, self._losses))
        self._worse = max(self._worse, log_wealth(self._losses, self._wins))
        self._not_worse = max(self._not_worse, log_wealth(self._wins, self._losses, self._settings.margin))
        if self._settled is None and max(self._better, self._worse) >= self._needed:
            self._settled = "better" if self._better >= self._needed else "worse"

    def verdict(self) -> Verdict:
        """The decision so far. Better and worse are final; not worse may still become either."""
        decision = self._settled or ("not_worse" if self._not_worse >= self._needed else "undecided")
        comparisons = self._wins + self._losses
        return Verdict(
            decision=decision,
            wealth_better=_wealth(self._better),
            wealth_worse=_wealth(self._worse),
            wealth_not_worse=_wealth(self._not_worse),
            wins=self._wins,
            comparisons=comparisons,
            ties=self._ties,
            held=decision == "undecided" and comparisons >= self._settings.max_comparisons,
        )


def judge(outcomes: Iterable[float], settings: VerdictSettings) -> Verdict:
    """The verdict on comparisons in the order they were made: +1 the canary won, −1 it lost, 0 a tie."""
    evidence = Evidence(settings)
    for outcome in outcomes:
        evidence.add(outcome)
    return evidence.verdict()


def log_wealth(wins: int, losses: int, margin: float = 0.0) -> float:
    """Natural log of the mean over all stakes of the wealth after these comparisons (see the module).

    Wealth is a product, so the order of wins and losses does not matter.
    """
    growth = [wins * win + losses * loss for win, loss in _log_factors(margin)]
    most = max(growth)
    return most + math.log(math.fsum(math.exp(value - most) for value in growth) / len(growth))


@functools.cache
def _log_factors(margin: float) -> tuple[tuple[float, float], ...]:
    """For each stake, the log of what a win and a loss multiply the wealth by."""
    odds = (1 + 2 * margin) / (1 - 2 * margin)
    return tuple((math.log1p(stake * odds), math.log1p(-stake)) for stake in _STAKES)


def _wealth(log: float) -> float:
    """The wealth itself, held below infinity so that JSON can carry it."""
    return math.exp(min(log, 700.0))
