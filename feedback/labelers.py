"""How far each labeler's comparisons can be trusted, from the comparisons alone.

An *item* is an unordered pair of candidates; a ranking of K candidates judges C(K, 2) items, but holds only
K − 1 independent judgements, so each of its pairs weighs 2/K wherever evidence is counted.

**Reliability** η is the probability that a labeler reports the preference the others see (``feedback.crowd_bt``): near
1 a careful labeler, ½ one who guesses, below ½ one who inverts. A labeler nobody checks keeps the prior's.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

from feedback.controls import Repeat
from feedback.crowd_bt import PRIOR_AGREES, PRIOR_DIFFERS, Judgements, reliabilities
from feedback.preference import Estimate, Floats
from feedback.records import Comparison, candidate_identity

PRIOR_WEIGHT = 2 * PRIOR_AGREES / (PRIOR_AGREES + PRIOR_DIFFERS) - 1
"""Training weight of a labeler nothing is known of."""

LEAST_MILLISECONDS, CHARACTERS_PER_SECOND = 300.0, 100.0
"""An answer is implausibly fast below 300 ms, or above 100 characters a second over all candidates: four times
the mean silent reading rate, 238 words a minute (Brysbaert 2019). Ours."""

NOMINAL = 1 - np.eye(3)
ORDINAL = np.subtract.outer([1.0, 0.0, -1.0], [1.0, 0.0, -1.0]) ** 2
"""Squared distances between the answers first better, tie, second better."""


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
        repeats: share of items judged the same again when they were shown a second time, in reverse. It tells who
            tosses a coin or goes by the place from who looks; not who is right, so reliability does not rest on it.
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
    repeats: Estimate | None
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


def fair_coin_p(heads: int, tosses: int) -> float:
    """Two-sided exact binomial p-value of a coin being fair; 1 without tosses."""
    return min(1.0, 2 * float(bdtr(min(heads, tosses - heads), tosses, 0.5)))


def candidate_keys(comparison: Comparison) -> tuple[str, ...]:
    """What identifies each candidate, in order: the prompt, and the completion's id and index, else its text."""
    prompt = comparison.prompt.key()
    return tuple(f"{prompt}:{candidate_identity(one)}" for one in comparison.candidates)


def assess(
    comparisons: Iterable[Comparison],
    *,
    golden: Mapping[frozenset[str], str | None] | None = None,
    repeats: Iterable[Repeat] = (),
    scores: Mapping[str, float] | None = None,
) -> CrowdReport:
    """Report on every labeler.

    Args:
        comparisons: those in force, of golden pairs too; no repeats.
        golden: items (two candidate keys) with a trusted answer, which reliability takes as known: the better
            candidate's key, or None for a tie. See ``golden_answers``.
        repeats: a labeler's first judgement of some candidates, and the second.
        scores: outside scores in logits by candidate key, not learnt from these comparisons. They take the place of
            other labelers where each item is judged once.
    """
    given = list(comparisons)
    rows = _judgements(given)
    known = _known(rows, golden or {})
    fit = reliabilities(rows, np.array([(scores or {}).get(key, 0.0) for key in rows.candidates]), known)
    counts, by_item, by_row = _agreement(rows)
    agreement = _shares(rows, by_row)
    golden_shares = _shares(rows, np.where(np.isnan(known), math.nan, rows.answer == known))
    comparisons_of = Counter(one.labeler for one in given)
    pairs = np.bincount(rows.labeler, minlength=len(rows.labelers))
    ties = np.bincount(rows.labeler[rows.answer == 0], minlength=len(rows.labelers))
    places, speeds, again = _first_shown(given), _speeds(given), _repeated(repeats)
    labelers = {}
    for k, name in enumerate(rows.labelers):
        earlier_won, shown = places[name]
        speed, too_fast = speeds.get(name, (None, None))
        labelers[name] = LabelerReport(
            comparisons=comparisons_of[name],
            pairs=int(pairs[k]),
            ties=int(ties[k]),
            reliability=fit.of(k),
            agreement=agreement[k],
            golden=golden_shares[k],
            repeats=again.get(name),
            first_shown=Estimate.share(earlier_won, shown),
            first_shown_p=fair_coin_p(earlier_won, shown),
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


def golden_answers(trusted: Iterable[Comparison]) -> dict[frozenset[str], str | None]:
    """The trusted answer to each item that ``trusted`` comparisons judge; of several on one item the last holds."""
    answers: dict[frozenset[str], str | None] = {}
    for comparison in trusted:
        keys = candidate_keys(comparison)
        for a, b, answer in _items(comparison):
            if keys[a] != keys[b]:
                answers[frozenset((keys[a], keys[b]))] = {1: keys[a], -1: keys[b], 0: None}[answer]
    return answers


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


def _items(comparison: Comparison) -> Iterable[tuple[int, int, int]]:
    """Each two places in ``candidates``, and 1 where the first is better, −1 where the second is, 0 for a tie."""
    place = {index: rank for rank, group in enumerate(comparison.ranking) for index in group}
    for a, b in itertools.combinations(range(len(comparison.candidates)), 2):
        yield a, b, (place[b] > place[a]) - (place[b] < place[a])


def _judgements(comparisons: Iterable[Comparison]) -> Judgements:
    labelers: dict[str, int] = {}
    candidates: dict[str, int] = {}
    table: list[tuple[float, ...]] = []
    for comparison in comparisons:
        labeler = labelers.setdefault(comparison.labeler, len(labelers))
        numbers = [candidates.setdefault(key, len(candidates)) for key in candidate_keys(comparison)]
        for i, j, answer in _items(comparison):
            a, b = numbers[i], numbers[j]
            if a != b:  # the same text shown twice is no item
                row = (a, b, answer) if a < b else (b, a, -answer)
                table.append((labeler, *row, 2 / len(numbers)))
    columns = np.array(table, dtype=float).reshape(-1, 5).T
    labeler_of, first, second, answers = columns[:4].astype(np.intp)
    return Judgements(tuple(labelers), tuple(candidates), labeler_of, first, second, answers, columns[4])


def _shares(rows: Judgements, success: Floats) -> list[Estimate | None]:
    """For each labeler, the share of successes [R], 0 to 1 each; NaN where a row is no trial."""
    trial = ~np.isnan(success)
    who, weight = rows.labeler[trial], rows.weight[trial]
    n = np.bincount(who, weight, len(rows.labelers))
    wins = np.bincount(who, weight * success[trial], len(rows.labelers))
    return [Estimate.share(min(float(won), float(of)), float(of)) for won, of in zip(wins, n, strict=True)]


def _repeated(repeats: Iterable[Repeat]) -> dict[str, Estimate | None]:
    """For each labeler, the share of items judged the same both times; the pairs of a ranking weigh 2/K."""
    alike: defaultdict[str, float] = defaultdict(float)
    shown: defaultdict[str, float] = defaultdict(float)
    for repeat in repeats:
        again = golden_answers([repeat.again])
        for item, answer in golden_answers([repeat.first]).items():
            weight = 2 / len(repeat.first.candidates)
            alike[repeat.first.labeler] += weight * (again[item] == answer)
            shown[repeat.first.labeler] += weight
    return {name: Estimate.share(min(alike[name], n), n) for name, n in shown.items()}


def _known(rows: Judgements, golden: Mapping[frozenset[str], str | None]) -> Floats:
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


def _agreement(rows: Judgements) -> tuple[Floats, Estimate | None, Floats]:
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
