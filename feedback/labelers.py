"""How far each labeler's comparisons can be trusted, from the comparisons alone.

An *item* is an unordered pair of candidates; a ranking of K candidates judges C(K, 2) items, but holds only
K − 1 independent judgements, so each of its pairs weighs 2/K wherever evidence is counted.

**Reliability** follows Crowd-BT (Chen, Bennett, Collins-Thompson and Horvitz 2013, "Pairwise ranking aggregation in
a crowdsourced setting", WSDM): labeler k reports the preference with probability η_k and its opposite otherwise,

    P(k prefers i to j) = η_k σ(s_i − s_j) + (1 − η_k) σ(s_j − s_i),        a tie: half of each.

η near 1 is a careful labeler, ½ one who guesses, below ½ one who inverts. Every candidate has played a
virtual opponent, s_i ~ N(m_i, τ²): m_i is 0, or an outside score. η_k ~ Beta(4, 1). The paper maximises over s and η
together; with few judgements an item, s then bends to what each labeler said and vouches for it (30 labelers, 3
judgements an item, 100 each: largest error 0.45, half of the intervals missed). Here s is integrated out by expectation
propagation (Minka 2001), and labeler k is held only against what the *others* and the outside scores say of an item;
without either, the prior stays. Intervals are normal in logit η (Laplace), given the others. Time grows with the
cube of the number of candidates that hang together by comparisons.
"""

import hashlib
import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import binomtest

from feedback.preference import Z95, Estimate, Floats, Indices, as_gaussian, first_preferred, score_groups
from feedback.records import Comparison

_LOGGER = logging.getLogger(__name__)

PRIOR_AGREES, PRIOR_DIFFERS = 4.0, 1.0
"""Beta prior of η: mean 0.8, worth five judgements. Ours; two labelers of η = 0.84 agree on the 72.6 % of InstructGPT
§3.4. In simulation, Beta(8, 2) hid inverters longer and its intervals missed them more often."""

PRIOR_WEIGHT = 2 * PRIOR_AGREES / (PRIOR_AGREES + PRIOR_DIFFERS) - 1
"""Training weight of a labeler nothing is known of."""

PRIOR_SPREAD, PRIOR_SPREAD_CANDIDATES = 1.5, 20.0
"""τ before any evidence, in logits, and how many candidates' worth it counts; τ is learnt. Ours."""

LEAST_MILLISECONDS, CHARACTERS_PER_SECOND = 300.0, 100.0
"""An answer is implausibly fast below 300 ms, or above 100 characters a second over all candidates: four times
the mean silent reading rate, 238 words a minute (Brysbaert 2019). Ours."""

NOMINAL = 1 - np.eye(3)
ORDINAL = np.subtract.outer([1.0, 0.0, -1.0], [1.0, 0.0, -1.0]) ** 2
"""Squared distances between the answers first better, tie, second better."""

_SWEEPS, _DAMPING, _OVERRELAXED, _TOLERANCE = 200, 0.7, 1.8, 3e-3


@dataclass(frozen=True)
class LabelerReport:
    """What is known of one labeler. A share without evidence is None.

    Attributes:
        comparisons: in force.
        pairs: items judged, ties included.
        ties: of these, judged equal.
        reliability: η, MAP in logit η, with its interval; ``n`` is the judgements it could be held against.
        agreement: share of judgements others gave the same answer to (a tie is an answer), each item once.
        golden: share of trusted items judged as the trusted answer says.
        first_shown: share of blind tasks in which, over all pairs, the earlier-shown candidates were preferred.
        first_shown_p: two-sided exact binomial p-value of that share being ½; 1 without evidence.
        speed: robust z of the median log time per choice among labelers, negative is fast; None below three labelers.
        too_fast: share of timed comparisons answered faster than the candidates can be read.
    """

    comparisons: int
    pairs: int
    ties: int
    reliability: Estimate
    agreement: Estimate | None
    golden: Estimate | None
    first_shown: Estimate | None
    first_shown_p: float
    speed: float | None
    too_fast: Estimate | None

    @property
    def weight(self) -> float:
        """Weight of this labeler's comparisons in training, 0 to 1: 2η − 1, and 0 for one who guesses or inverts.

        η = w + (1 − w)/2 says: with probability w = 2η − 1 the labeler looked, else tossed a coin, so w is the share of
        the gradient that is signal (1 − 2ρ in Natarajan et al. 2013, "Learning with noisy labels"). η is the
        estimate, not its lower end: it starts at the prior, so who is new weighs ``PRIOR_WEIGHT``, not nothing.
        """
        return max(0.0, 2 * self.reliability.value - 1)


@dataclass(frozen=True)
class CrowdReport:
    """All labelers together.

    Attributes:
        labelers: one report each, by name.
        agreement: mean over items judged by several labelers of the share of pairs of judgements that agree.
        alpha: Krippendorff's alpha over {first better, tie, second better}, nominal; NaN without shared items.
        alpha_ordinal: the same with a tie half way. Neither depends on which candidate of an item is the first.
        spread: τ, the candidates' spread about their prior means, in logits.
    """

    labelers: dict[str, LabelerReport]
    agreement: Estimate | None
    alpha: float
    alpha_ordinal: float
    spread: float


@dataclass(frozen=True)
class _Judgements:
    """One row per judged item, [R] each.

    ``answer`` is 1 where ``first`` (the lower-numbered candidate) was preferred, −1 where ``second``, 0 for a tie.
    """

    labelers: tuple[str, ...]
    candidates: tuple[str, ...]
    labeler: Indices
    first: Indices
    second: Indices
    answer: Indices
    weight: Floats

    @property
    def item(self) -> Indices:
        """A number for each unordered pair of candidates."""
        return self.first * len(self.candidates) + self.second

    def shares(self, success: Floats) -> list[Estimate | None]:
        """For each labeler, the share of successes [R], 0 to 1 each; NaN where a row is no trial."""
        trial = ~np.isnan(success)
        who, weight = self.labeler[trial], self.weight[trial]
        n = np.bincount(who, weight, len(self.labelers))
        wins = np.bincount(who, weight * success[trial], len(self.labelers))
        return [Estimate.share(min(float(won), float(of)), float(of)) for won, of in zip(wins, n, strict=True)]


def candidate_keys(comparison: Comparison) -> tuple[str, ...]:
    """What identifies each candidate, in order: the prompt, and the completion's id and index, else its text."""
    prompt = comparison.prompt.key()
    return tuple(
        f"{prompt}:{one.completion_id}#{one.index}"
        if one.completion_id
        else f"{prompt}:{hashlib.sha256(one.text.encode()).hexdigest()}"
        for one in comparison.candidates
    )


def assess(
    comparisons: Iterable[Comparison],
    *,
    golden: Mapping[frozenset[str], str | None] | None = None,
    scores: Mapping[str, float] | None = None,
) -> CrowdReport:
    """Report on every labeler.

    Args:
        comparisons: those in force.
        golden: items (two candidate keys) with a trusted answer, which reliability takes as known: the better
            candidate's key, or None for a tie.
        scores: outside scores in logits by candidate key, not learnt from these comparisons. They take the place of
            other labelers where each item is judged once.
    """
    given = list(comparisons)
    rows = _judgements(given)
    known = _known(rows, golden or {})
    fit = _crowd_bt(rows, np.array([(scores or {}).get(key, 0.0) for key in rows.candidates]), known)
    counts, by_item, by_row = _agreement(rows)
    agreement = rows.shares(by_row)
    golden_shares = rows.shares(np.where(np.isnan(known), math.nan, rows.answer == known))
    comparisons_of = Counter(one.labeler for one in given)
    pairs = np.bincount(rows.labeler, minlength=len(rows.labelers))
    ties = np.bincount(rows.labeler[rows.answer == 0], minlength=len(rows.labelers))
    places, speeds = _first_shown(given), _speeds(given)
    labelers = {}
    for k, name in enumerate(rows.labelers):
        earlier_won, shown = places[name]
        speed, too_fast = speeds.get(name, (None, None))
        labelers[name] = LabelerReport(
            comparisons=comparisons_of[name],
            pairs=int(pairs[k]),
            ties=int(ties[k]),
            reliability=fit.reliability(k),
            agreement=agreement[k],
            golden=golden_shares[k],
            first_shown=Estimate.share(earlier_won, shown),
            first_shown_p=float(binomtest(earlier_won, shown).pvalue) if shown else 1.0,
            speed=speed,
            too_fast=too_fast,
        )
    return CrowdReport(
        labelers=labelers,
        agreement=by_item,
        alpha=krippendorff_alpha(counts, NOMINAL, mirrored=True),
        alpha_ordinal=krippendorff_alpha(counts, ORDINAL, mirrored=True),
        spread=fit.spread,
    )


def weights(report: CrowdReport) -> dict[str, float]:
    """Training weight of each labeler, 0 to 1; ``PRIOR_WEIGHT`` for one who is not named."""
    return {name: labeler.weight for name, labeler in report.labelers.items()}


def krippendorff_alpha(counts: Floats, distance: Floats, *, mirrored: bool = False) -> float:
    """Krippendorff's alpha: 1 − observed / expected disagreement; 1 is perfect, 0 chance (2011, "Computing").

    Args:
        counts: how many labelers gave an item each answer, [items, answers]; items of fewer than two are left out.
        distance: squared distances between answers, [answers, answers], 0 on the diagonal.
        mirrored: the order of the answers may be reversed item by item (which candidate is the first is
            arbitrary), so chance is what both orders together say.

    Returns:
        Alpha; NaN where no item was judged twice or there is no variety to disagree about.
    """
    shared = counts[counts.sum(axis=1) > 1]
    scaled = shared / (shared.sum(axis=1, keepdims=True) - 1)
    coincidences = shared.T @ scaled - np.diag(scaled.sum(axis=0))
    if mirrored:
        coincidences = (coincidences + coincidences[::-1, ::-1]) / 2
    totals = coincidences.sum(axis=0)
    expected = totals @ distance @ totals
    return float(1 - (totals.sum() - 1) * (coincidences * distance).sum() / expected) if expected > 0 else math.nan


def _judgements(comparisons: Iterable[Comparison]) -> _Judgements:
    labelers: dict[str, int] = {}
    candidates: dict[str, int] = {}
    table: list[tuple[float, ...]] = []
    for comparison in comparisons:
        labeler = labelers.setdefault(comparison.labeler, len(labelers))
        numbers = [candidates.setdefault(key, len(candidates)) for key in candidate_keys(comparison)]
        place = {index: rank for rank, group in enumerate(comparison.ranking) for index in group}
        judged = sorted((candidate, place[index]) for index, candidate in enumerate(numbers))
        for (a, place_a), (b, place_b) in itertools.combinations(judged, 2):
            if a != b:  # the same text shown twice is no item
                table.append((labeler, a, b, (place_b > place_a) - (place_b < place_a), 2 / len(numbers)))
    columns = np.array(table, dtype=float).reshape(-1, 5).T
    labeler_of, first, second, answer = columns[:4].astype(np.intp)
    return _Judgements(tuple(labelers), tuple(candidates), labeler_of, first, second, answer, columns[4])


def _known(rows: _Judgements, golden: Mapping[frozenset[str], str | None]) -> Floats:
    """The trusted answer to each row's item, as ``answer``; NaN where there is none."""
    number = {key: index for index, key in enumerate(rows.candidates)}
    trusted: dict[int, int] = {}
    for keys, better in golden.items():
        if len(keys) != 2 or (better is not None and better not in keys):
            raise ValueError("a golden item is two candidate keys, and its answer one of them or None")
        if all(key in number for key in keys):
            first, second = sorted(number[key] for key in keys)
            answer = 0 if better is None else 1 if number[better] == first else -1
            trusted[first * len(number) + second] = answer
    return np.array([trusted.get(item, math.nan) for item in rows.item.tolist()], dtype=float)


def _agreement(rows: _Judgements) -> tuple[Floats, Estimate | None, Floats]:
    """Who says the same of an item.

    Returns:
        How often each item got the answers first, tie, second, [items, 3]; agreement over items judged by several
        labelers; for each row the share of others who gave its answer, [R], NaN where nobody else judged the item.
    """
    answer = 1 - rows.answer
    items, item = np.unique(rows.item, return_inverse=True)
    counts = np.bincount(item * 3 + answer, minlength=len(items) * 3).reshape(-1, 3).astype(np.float64)
    # A labeler can judge an item in two rankings; that is no agreement with others.
    mine, row = np.unique(item * len(rows.labelers) + rows.labeler, return_inverse=True)
    others = counts[item] - np.bincount(row * 3 + answer, minlength=len(mine) * 3).reshape(-1, 3)[row]
    total = others.sum(axis=1)
    judged = total > 0
    alike = np.full(len(item), math.nan)
    alike[judged] = others[judged, answer[judged]] / total[judged]
    several, place, per_item = np.unique(item[judged], return_inverse=True, return_counts=True)
    share = np.bincount(place, alike[judged], len(several)) / per_item
    weight = np.bincount(place, rows.weight[judged], len(several)) / per_item
    n = float(weight.sum())
    return counts, Estimate.share(min(float(weight @ share), n), n), alike


def _first_shown(comparisons: Iterable[Comparison]) -> dict[str, list[int]]:
    """For each labeler, blind tasks in which the earlier-shown candidates won, and those in which either side did."""
    won: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for comparison in comparisons:
        if comparison.source == "task":
            lead = sum(1 if better < worse else -1 for better, worse in comparison.pairs())
            won[comparison.labeler][0] += lead > 0
            won[comparison.labeler][1] += lead != 0
    return won


def _speeds(comparisons: Iterable[Comparison]) -> dict[str, tuple[float | None, Estimate | None]]:
    """For each timed labeler, the robust z of the time per choice, and the share answered implausibly fast."""
    paces: defaultdict[str, list[float]] = defaultdict(list)
    rushed: Counter[str] = Counter()
    for one in comparisons:
        if one.duration_ms is not None:
            characters = sum(len(candidate.text) for candidate in one.candidates)
            rushed[one.labeler] += one.duration_ms < max(LEAST_MILLISECONDS, 1000 * characters / CHARACTERS_PER_SECOND)
            paces[one.labeler].append(math.log(max(one.duration_ms, 1) / (len(one.candidates) - 1)))
    medians = {name: float(np.median(pace)) for name, pace in paces.items()}
    middle = float(np.median(list(medians.values()) or [0.0]))
    # 1.4826 makes the median absolute deviation of a normal distribution its standard deviation.
    scale = 1.4826 * float(np.median([abs(median - middle) for median in medians.values()] or [0.0]))
    known = len(medians) > 2 and scale > 0
    return {
        name: ((median - middle) / scale if known else None, Estimate.share(rushed[name], len(paces[name])))
        for name, median in medians.items()
    }


@dataclass(frozen=True)
class _Fit:
    """Log-odds of η, its standard error and what it rests on, [L]; the candidates' spread τ."""

    log_odds: Floats
    error: Floats
    n: Floats
    spread: float

    def reliability(self, labeler: int) -> Estimate:
        """η of a labeler with its interval."""
        middle, half = self.log_odds[labeler], Z95 * self.error[labeler]
        value, low, high = expit([middle, middle - half, middle + half]).tolist()
        return Estimate(value, low, high, float(self.n[labeler]))


def _crowd_bt(rows: _Judgements, outside: Floats, known: Floats) -> _Fit:
    """Reliability of every labeler (see the module).

    Args:
        rows: judgements, R of them.
        outside: prior mean of each candidate's score, [C].
        known: trusted answers, [R], NaN where there is none.
    """
    count = len(rows.labelers)
    groups = score_groups(rows.first, rows.second, rows.labeler, len(rows.candidates))
    log_odds, step, radius = np.full(count, logit((1 + PRIOR_WEIGHT) / 2)), np.zeros(count), np.ones(count)
    mean, variance, believed = np.zeros(len(known)), np.ones(len(known)), np.full(len(known), math.inf)
    spread = PRIOR_SPREAD**2
    for _ in range(_SWEEPS):
        # 1. What the others believe of each item.
        squares, placed = PRIOR_SPREAD_CANDIDATES * PRIOR_SPREAD**2, PRIOR_SPREAD_CANDIDATES
        for group in groups:
            mean[group.rows], variance[group.rows], off = group.believe(outside, spread)
            squares, placed = squares + off, placed + group.members.size
        belief = np.where(np.isnan(known), 2 * first_preferred(mean, variance) - 1, known)

        # 2. Each labeler against that.
        gradient, information = _push(rows, belief, expit(log_odds))
        wanted = gradient / information
        radius = np.where(wanted * step < 0, radius / 2, np.minimum(1.5 * radius, 1))  # near η = 1 steps overshoot
        step = np.clip(wanted, -radius, radius)
        log_odds = log_odds + step

        # 3. What each judgement then says of its candidates, and how far these lie from their prior means.
        precision, pull = as_gaussian(rows.answer, rows.weight, np.tanh(log_odds / 2)[rows.labeler], mean, variance)
        for group in groups:
            group.say(precision[group.rows], pull[group.rows], _DAMPING)
        drift = math.log(squares / placed / spread)
        spread *= math.exp(_OVERRELAXED * drift)

        moved = [abs(drift), np.abs(step).max(initial=0.0), np.abs(belief - believed).max(initial=0.0)]
        if max(moved) < _TOLERANCE:
            break
        believed = belief
    else:
        _LOGGER.warning("reliability of labelers still moves after %d sweeps: by %.3g in logit η", _SWEEPS, moved[1])
    n = np.bincount(rows.labeler, rows.weight * belief**2, count).astype(np.float64, copy=False)
    return _Fit(log_odds, 1 / np.sqrt(information), n, math.sqrt(spread))


def _push(rows: _Judgements, belief: Floats, eta: Floats) -> tuple[Floats, Floats]:
    """Gradient and Fisher information of the log posterior in logit η, [L].

    With x the belief that the first is the better less that the second is, [R], and ρ = 2η − 1, the labeler prefers
    the first with probability (1 + ρx)/2; a tie is half of each answer.
    """
    rho, slope = (2 * eta - 1)[rows.labeler], (2 * eta * (1 - eta))[rows.labeler]
    yes, no = (1 + rows.answer) / 2, (1 - rows.answer) / 2
    pushed = rows.weight * slope * belief * (yes / (1 + rho * belief) - no / (1 - rho * belief))
    certain = rows.weight * (slope * belief) ** 2 / (1 - (rho * belief) ** 2)
    prior = PRIOR_AGREES + PRIOR_DIFFERS
    gradient = np.bincount(rows.labeler, pushed, len(eta)) + PRIOR_AGREES - prior * eta
    return gradient, np.bincount(rows.labeler, certain, len(eta)) + prior * eta * (1 - eta)
