"""Which version people prefer, from blind comparisons."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from feedback.records import Comparison


@dataclass(frozen=True)
class Preference:
    """How often one version was preferred to another in blind comparisons."""

    wins: int
    losses: int
    ties: int

    @classmethod
    def count(cls, outcomes: Iterable[float]) -> Self:
        """Count outcomes as ``preferences`` gives them: above zero a win, below a loss, zero a tie."""
        signs = [(outcome > 0) - (outcome < 0) for outcome in outcomes]
        return cls(wins=signs.count(1), losses=signs.count(-1), ties=signs.count(0))

    @property
    def win_rate(self) -> float:
        """Share of wins with a tie as half a win; NaN without comparisons."""
        total = self.wins + self.losses + self.ties
        return (self.wins + self.ties / 2) / total if total else math.nan


def preferences(comparisons: Iterable[Comparison], a: int, b: int) -> list[float]:
    """Outcome for version ``a`` over version ``b`` of each blind comparison that has candidates of both.

    Each comparison counts once, whatever its K, because the pairs of one ranking are not independent evidence.

    Returns:
        One number in [-1, 1] per comparison, in order: the mean over its (a, b) pairs of +1 where a's candidate
        is ranked above b's, -1 where below, 0 where tied. With K = 2 that is +1, -1 or 0.
    """
    outcomes = []
    for comparison in comparisons:
        if comparison.source != "task":
            continue
        place = {index: rank for rank, group in enumerate(comparison.ranking) for index in group}
        ranks: dict[int | None, list[int]] = {}
        for index, candidate in enumerate(comparison.candidates):
            ranks.setdefault(candidate.policy_version, []).append(place[index])
        signs = [(rank_b > rank_a) - (rank_b < rank_a) for rank_a in ranks.get(a, []) for rank_b in ranks.get(b, [])]
        if signs:
            outcomes.append(sum(signs) / len(signs))
    return outcomes


def wilson(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion ``wins / n`` (Wilson 1927, JASA 22:209); (0, 1) where n is 0.

    Args:
        wins: successes, 0 to n; half a win for a tie is allowed.
        n: trials.
        z: standard normal quantile; 1.96 for 95 %.
    """
    if not 0 <= wins <= n:
        raise ValueError(f"wins must be 0 to n = {n}, not {wins}")
    if n == 0:
        return 0.0, 1.0
    rate = wins / n
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)
