"""Crowd-BT: how reliable each labeler is, from what the others say of the same candidates.

Chen, Bennett, Collins-Thompson and Horvitz 2013, "Pairwise ranking aggregation in a crowdsourced setting", WSDM:
labeler k reports the preference with probability η_k and its opposite otherwise,

    P(k prefers i to j) = η_k σ(s_i − s_j) + (1 − η_k) σ(s_j − s_i),        a tie: half of each.

Every candidate has played a virtual opponent, s_i ~ N(m_i, τ²): m_i is 0, or an outside score. η_k ~ Beta(4, 1). The
paper maximises over s and η together; with few judgements an item, s then bends to what each labeler said and vouches
for it (30 labelers, 3 judgements an item, 100 each: largest error 0.45, half of the intervals missed). Here s is
integrated out by expectation propagation (Minka 2001), and labeler k is held only against what the *others* and the
outside scores say of an item; without either, the prior stays. Intervals are normal in logit η (Laplace), given the
others. Time grows with the cube of the number of candidates that hang together by judgements, so groups of more than
``LARGEST_GROUP`` say nothing of anybody.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, logit, ndtr

from feedback.preference import Z95, Estimate, Floats, Indices

_LOGGER = logging.getLogger(__name__)

PRIOR_AGREES, PRIOR_DIFFERS = 4.0, 1.0
"""Beta prior of η: mean 0.8, worth five judgements. Ours; two labelers of η = 0.84 agree on the 72.6 % of InstructGPT
§3.4. In simulation, Beta(8, 2) hid inverters longer and its intervals missed them more often."""

PRIOR_SPREAD, PRIOR_SPREAD_CANDIDATES = 1.5, 20.0
"""τ before any evidence, in logits, and how many candidates' worth it counts; τ is learnt. Ours."""

LARGEST_GROUP = 64
"""Most candidates of one group. Ours: nobody ranks so many completions of one prompt with one another, but whoever
wanted to hold up training could."""

PROBIT = 1.702
"""σ(x) ≈ Φ(x / 1.702), within 0.0095: the mean of Φ over a Gaussian has a closed form."""

_SWEEPS, _DAMPING, _OVERRELAXED, _TOLERANCE = 200, 0.7, 1.8, 3e-3


@dataclass(frozen=True)
class Judgements:
    """One row per judged item, an unordered pair of candidates; [R] each.

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


@dataclass(frozen=True)
class Reliabilities:
    """Of every labeler: log-odds of η, its standard error and what it rests on, [L]; and the candidates' spread τ."""

    log_odds: Floats
    error: Floats
    n: Floats
    spread: float

    def of(self, labeler: int) -> Estimate:
        """η of a labeler with its interval."""
        middle, half = self.log_odds[labeler], Z95 * self.error[labeler]
        value, low, high = expit([middle, middle - half, middle + half]).tolist()
        return Estimate(value, low, high, float(self.n[labeler]))


def reliabilities(rows: Judgements, outside: Floats, known: Floats) -> Reliabilities:
    """Reliability of every labeler (see the module).

    Args:
        rows: judgements, R of them.
        outside: prior mean of each candidate's score, [C].
        known: trusted answers, [R], NaN where there is none.
    """
    count = len(rows.labelers)
    groups = score_groups(rows.first, rows.second, rows.labeler, len(rows.candidates))
    log_odds, step, radius = (
        np.full(count, logit(PRIOR_AGREES / (PRIOR_AGREES + PRIOR_DIFFERS))),
        np.zeros(count),
        np.ones(count),
    )
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
    return Reliabilities(log_odds, 1 / np.sqrt(information), n, math.sqrt(spread))


class ScoreGroups:
    """Gaussian belief in the Bradley–Terry scores of candidates, for all groups of one size that judgements join.

    Each of R judgements (rows) is stood in for by a Gaussian of the gap s_first − s_second, given by ``say``; each
    score has a Gaussian prior, its virtual opponent. A *voice* is one labeler in one group.

    Attributes:
        rows: which judgements are of these groups, [R].
        members: the groups' candidates, [groups, size].
    """

    def __init__(
        self, rows: Indices, members: Indices, group: Indices, first: Indices, second: Indices, labeler: Indices
    ) -> None:
        """``group``, the places ``first`` and ``second`` in it and ``labeler`` are the rows', [R]."""
        self.rows, self.members = rows, members
        self._group, self._first, self._second = group, first, second
        voices, self._voice = np.unique(np.stack([group, labeler]), axis=1, return_inverse=True)
        self._group_of_voice = voices[0]
        self._precision, self._pull = np.zeros(len(rows)), np.zeros(len(rows))

    def say(self, precision: Floats, pull: Floats, damping: float) -> None:
        """Move the rows' Gaussians by the share ``damping`` to these precisions and precisions × means, [R]."""
        self._precision += damping * (precision - self._precision)
        self._pull += damping * (pull - self._pull)

    def believe(self, prior: Floats, variance: float) -> tuple[Floats, Floats, float]:
        """What rows and prior (``prior`` the mean of every candidate's, ``variance`` of all) say.

        Returns:
            Mean and variance of each row's gap, [R], from everything but its own labeler's rows; and the expected
            sum of squared distances of these groups' scores from their prior means, from everything.
        """
        prior = prior[self.members]
        precision, pull = self._sum(self._group, len(self.members))
        covariance, score = self._solve(precision, pull, prior, variance)
        off = float(((score - prior) ** 2).sum() + np.trace(covariance, axis1=1, axis2=2).sum())
        group, own = self._group_of_voice, self._sum(self._voice, len(self._group_of_voice))
        covariance, score = self._solve(precision[group] - own[0], pull[group] - own[1], prior[group], variance)
        v, a, b = self._voice, self._first, self._second
        doubt = covariance[v, a, a] + covariance[v, b, b] - 2 * covariance[v, a, b]
        return score[v, a] - score[v, b], doubt, off

    def _sum(self, block: Indices, blocks: int) -> tuple[Floats, Floats]:
        """Precision [blocks, size, size] and pull [blocks, size] of the rows of each block."""
        size, a, b = self.members.shape[1], self._first, self._second
        cells = [(block * size + x) * size + y for x, y in ((a, a), (b, b), (a, b), (b, a))]
        values = [self._precision, self._precision, -self._precision, -self._precision]
        precision = _sums(np.concatenate(cells), np.concatenate(values), blocks * size * size)
        pull = _sums(block * size + a, self._pull, blocks * size) - _sums(block * size + b, self._pull, blocks * size)
        return precision.reshape(-1, size, size), pull.reshape(-1, size)

    @staticmethod
    def _solve(precision: Floats, pull: Floats, prior: Floats, variance: float) -> tuple[Floats, Floats]:
        covariance = np.linalg.inv(precision + np.eye(pull.shape[1]) / variance).astype(np.float64, copy=False)
        return covariance, np.einsum("nij,nj->ni", covariance, pull + prior / variance)


def score_groups(first: Indices, second: Indices, labeler: Indices, candidates: int) -> list[ScoreGroups]:
    """The groups that judgements join ``candidates`` into, one ``ScoreGroups`` for each size up to ``LARGEST_GROUP``.

    Args:
        first: one candidate of each judgement, [R].
        second: the other, [R].
        labeler: who judged, [R].
        candidates: how many there are.
    """
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(candidates, candidates))
    _, group = connected_components(edges, directed=False)
    size = np.bincount(group, minlength=1)[group]
    in_order = np.argsort(group, kind="stable")
    place = np.zeros(candidates, dtype=np.intp)
    found = []
    sizes = np.unique(size[first])
    for each in sizes[sizes <= LARGEST_GROUP]:
        members = in_order[size[in_order] == each].reshape(-1, each)
        place[members] = np.arange(each)
        rows = np.flatnonzero(size[first] == each)
        a, b = first[rows], second[rows]
        number = np.searchsorted(group[members[:, 0]], group[a])
        found.append(ScoreGroups(rows, members, number, place[a], place[b], labeler[rows]))
    return found


def first_preferred(mean: Floats, variance: Floats) -> Floats:
    """Probability that the first of two candidates is preferred whose gap is Gaussian: E[Φ(gap / 1.702)], [R]."""
    preferred: Floats = ndtr(mean / np.sqrt(PROBIT**2 + variance))
    return preferred


def as_gaussian(answer: Indices, weight: Floats, rho: Floats, mean: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """The Gaussian of the gap that stands in for a judgement in expectation propagation (Minka 2001, §3.2).

    The judgement's likelihood is (1 ± ρ (2Φ(gap / 1.702) − 1)) / 2, a tie half of each, to the power ``weight``. Its
    Gaussian moves mean and variance of the gap to where the likelihood does.

    Args:
        answer: 1 the first was preferred, −1 the second, 0 a tie, [R].
        weight: of the judgement, [R].
        rho: 2η − 1 of its labeler, [R].
        mean: of the gap from everything else, [R].
        variance: likewise.

    Returns:
        Precision, at least 0, and precision × mean, [R].
    """
    width = np.sqrt(PROBIT**2 + variance)
    z = mean / width
    lean = 2 * first_preferred(mean, variance) - 1
    density = 2 * rho * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / width
    up, down = density / (1 + rho * lean), -density / (1 - rho * lean)
    yes, no = weight * (1 + answer) / 2, weight * (1 - answer) / 2
    slope = yes * up + no * down
    curvature = yes * up * (up + z / width) + no * down * (down + z / width)
    # A negative precision (an answer against all odds) could leave the whole improper.
    precision = np.maximum(curvature / np.maximum(1 - variance * curvature, 1e-6), 0)
    return precision, mean * precision + slope * (1 + variance * precision)


def _push(rows: Judgements, belief: Floats, eta: Floats) -> tuple[Floats, Floats]:
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


def _sums(cell: Indices, values: Floats, cells: int) -> Floats:
    return np.bincount(cell, values, cells).astype(np.float64, copy=False)
