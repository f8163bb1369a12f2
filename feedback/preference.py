"""Which version people prefer, from blind comparisons: two versions by win rate, many by Bradley–Terry.

A tie is half a win for each side. Two things make plain intervals too narrow, and are allowed for here: the
pairs of one ranking are not independent, so a comparison counts once whatever its K; nor are the comparisons
of one prompt, so there are intervals over prompts. ``feedback.crowd_bt`` is the same model over candidates.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

from feedback.records import Comparison

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; ``n`` is how many independent observations it rests on."""

    value: float
    low: float
    high: float
    n: float

    @classmethod
    def share(cls, wins: float, n: float) -> Self | None:
        """``wins`` of ``n`` with the Wilson interval; None where n is 0."""
        return cls(wins / n, *wilson(wins, n, Z95), n) if n else None


@dataclass(frozen=True)
class Preference:
    """How often one version was preferred to another in blind comparisons.

    Attributes:
        wins: comparisons the version won; of K > 2 candidates, on the balance of its pairs.
        losses: comparisons it lost.
        ties: comparisons without a winner.
        win_rate: mean outcome with a tie as half, Wilson interval over comparisons; None without comparisons.
        win_rate_by_prompt: the same mean, with the percentile interval of a bootstrap over prompts.
    """

    wins: int
    losses: int
    ties: int
    win_rate: Estimate | None
    win_rate_by_prompt: Estimate | None


@dataclass(frozen=True)
class Strength:
    """One version's Bradley–Terry strength.

    Attributes:
        version: the policy version.
        baseline: the version whose strength is 0. Strengths compare within one baseline only: between versions
            of different baselines nobody ever judged, or one side was never preferred, so no finite figure fits.
        log_odds: logit of the probability of being preferred to the baseline; ``n`` is the version's comparisons.
    """

    version: int
    baseline: int
    log_odds: Estimate


@dataclass(frozen=True)
class _Games:
    """Pairs of versions that met in a comparison: [G] each, ``score`` 1 where ``first`` won, 0 where it lost."""

    versions: tuple[int, ...]
    first: Indices
    second: Indices
    score: Floats
    prompt: Indices


def preferences(comparisons: Iterable[Comparison], a: int, b: int) -> list[float]:
    """Outcome for version ``a`` over version ``b`` of each blind comparison that has candidates of both.

    Each comparison counts once, whatever its K, because the pairs of one ranking are not independent evidence.

    Returns:
        One number in [-1, 1] per comparison, in order: the mean over its (a, b) pairs of +1 where a's candidate
        is ranked above b's, -1 where below, 0 where tied. With K = 2 that is +1, -1 or 0.
    """
    return [outcome for _, outcome in outcomes(comparisons, a, b)]


def outcomes(comparisons: Iterable[Comparison], a: int, b: int) -> Iterator[tuple[Comparison, float]]:
    """The blind comparisons that have candidates of both versions, each with its outcome, as in ``preferences``."""
    for comparison, ranks in _ranked(comparisons):
        if a in ranks and b in ranks:
            yield comparison, _outcome(ranks[a], ranks[b])


def compare(comparisons: Iterable[Comparison], a: int, b: int, *, resamples: int = 2000, seed: int = 0) -> Preference:
    """How version ``a`` fares against version ``b`` in blind comparisons.

    Args:
        comparisons: those in force; only blind ones with candidates of both versions count.
        a: the version asked about.
        b: the version it is held against.
        resamples: bootstrap samples of prompts.
        seed: of the bootstrap.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    seen = []
    for comparison, outcome in outcomes(comparisons, a, b):
        seen.append(outcome)
        prompt = comparison.prompt.key()
        sums[prompt] += (1 + outcome) / 2
        counts[prompt] += 1
    signs = Counter((outcome > 0) - (outcome < 0) for outcome in seen)
    rate = Estimate.share(math.fsum(sums.values()), len(seen))
    by_prompt = None
    if rate:
        low, high = _bootstrap(list(sums.values()), list(counts.values()), resamples, seed)
        by_prompt = Estimate(rate.value, low, high, len(sums))
    return Preference(signs[1], signs[-1], signs[0], rate, by_prompt)


def bradley_terry(comparisons: Iterable[Comparison]) -> list[Strength]:
    """Strength of every version that met another in a blind comparison, by version.

    Maximum likelihood of P(a preferred to b) = σ(strength of a − strength of b), a tie as half a win (Bradley and
    Terry 1952, Biometrika 39:324). It exists exactly among versions that reach one another by chains of "was
    preferred at least once" (Ford 1957, Am. Math. Monthly 64:28); each such group is fitted by itself, which is
    also the limit of the joint fit, and its lowest-numbered version is the baseline. Intervals: normal, with the
    larger of the model's variance and the one clustered by prompt.
    """
    games = _games(comparisons)
    if not games.versions:
        return []
    size = len(games.versions)
    wins = coo_array(
        (
            np.concatenate([games.score, 1 - games.score]),
            (np.concatenate([games.first, games.second]), np.concatenate([games.second, games.first])),
        ),
        shape=(size, size),
    ).tocsr()
    wins.eliminate_zeros()  # a stored zero would be an edge
    _, group_of = connected_components(wins, directed=True, connection="strong")
    met = np.bincount(np.concatenate([games.first, games.second]), minlength=size)
    strengths = []
    for group in np.unique(group_of):
        members = np.flatnonzero(group_of == group)
        values, errors = _fit(games, members)
        for member, value, error in zip(members, values, errors, strict=True):
            log_odds = Estimate(float(value), float(value - Z95 * error), float(value + Z95 * error), int(met[member]))
            strengths.append(Strength(games.versions[member], games.versions[members[0]], log_odds))
    return sorted(strengths, key=lambda strength: strength.version)


def wilson(wins: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion ``wins / n`` (Wilson 1927, JASA 22:209); (0, 1) where n is 0.

    Args:
        wins: successes, 0 to n; half a win for a tie is allowed.
        n: trials; an effective number where they are not independent.
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


def _ranked(comparisons: Iterable[Comparison]) -> Iterator[tuple[Comparison, dict[int, list[int]]]]:
    """Blind comparisons, each with the places in its ranking, 0 the best, of each version's candidates.

    Of several labelers who judged one task the first counts: they judged the same completions, so the others are no
    independent evidence, and one key could answer its task under any number of names.
    """
    told: set[str] = set()
    for comparison in comparisons:
        if comparison.source != "task" or comparison.task_id in told:
            continue
        if comparison.task_id is not None:
            told.add(comparison.task_id)
        ranks: dict[int, list[int]] = {}
        for place, group in enumerate(comparison.ranking):
            for index in group:
                if (version := comparison.candidates[index].policy_version) is not None:
                    ranks.setdefault(version, []).append(place)
        yield comparison, ranks


def _outcome(places: list[int], others: list[int]) -> float:
    signs = [(other > place) - (other < place) for place in places for other in others]
    return sum(signs) / len(signs)


def _bootstrap(sums: list[float], counts: list[int], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of Σ sums / Σ counts over resampled prompts (Efron 1979); [P] each."""
    rng = np.random.default_rng(seed)
    per_prompt = np.array([sums, counts])
    rates = np.empty(resamples)
    for sample in range(resamples):
        total, count = per_prompt[:, rng.integers(len(sums), size=len(sums))].sum(axis=1)
        rates[sample] = total / count
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def _games(comparisons: Iterable[Comparison]) -> _Games:
    met: list[tuple[int, int, float, str]] = []
    for comparison, ranks in _ranked(comparisons):
        prompt = comparison.prompt.key()
        for a, b in itertools.combinations(ranks, 2):
            met.append((a, b, (1 + _outcome(ranks[a], ranks[b])) / 2, prompt))
    versions, places = np.unique([game[:2] for game in met], return_inverse=True)
    pairs = places.reshape(-1, 2)
    _, prompts = np.unique([game[3] for game in met], return_inverse=True)
    score = np.array([game[2] for game in met])
    return _Games(tuple(versions.astype(int).tolist()), pairs[:, 0], pairs[:, 1], score, prompts)


def _fit(games: _Games, members: Indices) -> tuple[Floats, Floats]:
    """Strengths [M] of a group and their standard errors [M], relative to its first member."""
    size = len(members)
    if size == 1:
        return np.zeros(1), np.zeros(1)
    inside = np.isin(games.first, members) & np.isin(games.second, members)
    rows = np.arange(inside.sum())
    design = np.zeros((len(rows), size))
    design[rows, np.searchsorted(members, games.first[inside])] = 1
    design[rows, np.searchsorted(members, games.second[inside])] = -1
    design = design[:, 1:]
    score, prompt = games.score[inside], games.prompt[inside]

    def loss(strengths: Floats) -> float:
        lead = design @ strengths
        return float(-(score @ log_expit(lead) + (1 - score) @ log_expit(-lead)) / len(rows))

    def gradient(strengths: Floats) -> Floats:
        slope: Floats = design.T @ (expit(design @ strengths) - score) / len(rows)
        return slope

    def information(strengths: Floats) -> Floats:
        rate = expit(design @ strengths)
        curvature: Floats = design.T @ (design * (rate * (1 - rate))[:, None]) / len(rows)
        return curvature

    start, precise = np.zeros(size - 1), {"gtol": 1e-8}
    found = minimize(loss, start, method="trust-exact", jac=gradient, hess=information, options=precise)
    variance = np.linalg.inv(information(found.x) * len(rows))
    _, cluster = np.unique(prompt, return_inverse=True)
    prompts = int(cluster.max()) + 1
    if prompts == 1:
        return np.append(0.0, found.x), np.append(0.0, np.full(size - 1, math.inf))
    slopes = np.zeros((prompts, size - 1))
    np.add.at(slopes, cluster, design * (score - expit(design @ found.x))[:, None])
    clustered = variance @ (slopes.T @ slopes) @ variance * prompts / (prompts - 1)
    return np.append(0.0, found.x), np.append(0.0, np.sqrt(np.maximum(np.diag(variance), np.diag(clustered))))
