import numpy as np
import pytest
from scipy.special import ndtr

from feedback.crowd_bt import (
    LARGEST_GROUP,
    PRIOR_AGREES,
    PRIOR_DIFFERS,
    PROBIT,
    Judgements,
    as_gaussian,
    reliabilities,
    score_groups,
)


@pytest.mark.parametrize("answer", [1, -1, 0])
@pytest.mark.parametrize("rho", [0.9, 0.2, -0.6])
def test_the_gaussian_of_a_judgement_moves_the_gap_to_its_moments(answer: int, rho: float) -> None:
    mean, variance = 0.7, 2.5
    precision, pull = as_gaussian(*(np.array([value]) for value in (answer, 1.0, rho, mean, variance)))
    gap = np.linspace(-20, 20, 40_001)
    belief = np.exp(-((gap - mean) ** 2) / (2 * variance))
    lean = 2 * ndtr(gap / PROBIT) - 1
    if answer:
        seen = belief * (1 + answer * rho * lean)
        moment = (gap * seen).sum() / seen.sum()
        spread = ((gap - moment) ** 2 * seen).sum() / seen.sum()
    else:  # half of each answer: the mean of their steps
        both = [belief * (1 + sign * rho * lean) for sign in (1, -1)]
        moment = sum((gap * seen).sum() / seen.sum() for seen in both) / 2
        shrunk = [((gap - (gap * seen).sum() / seen.sum()) ** 2 * seen).sum() / seen.sum() for seen in both]
        spread = sum(shrunk) / 2
    after = 1 / variance + precision[0]
    assert (mean / variance + pull[0]) / after == pytest.approx(moment, abs=1e-6)
    assert 1 / after == pytest.approx(min(spread, variance), abs=1e-6)


def test_scores_of_joined_candidates_against_dense_algebra() -> None:
    # One group of three (0-1-2) and one pair (3-4), judged by labelers 0 and 1.
    first, second, labeler = np.array([0, 1, 0, 3]), np.array([1, 2, 2, 4]), np.array([0, 1, 1, 0])
    precision, pull, prior = (
        np.array([0.5, 1.0, 0.2, 2.0]),
        np.array([0.4, -0.3, 0.1, 1.0]),
        np.array([0.0, 1, 2, 3, 4]),
    )

    def gap(rows: list[int], i: int, j: int) -> tuple[float, float]:
        matrix, right = np.eye(5) / 1.5, prior / 1.5
        for row in rows:
            difference = np.eye(5)[first[row]] - np.eye(5)[second[row]]
            matrix = matrix + precision[row] * np.outer(difference, difference)
            right = right + pull[row] * difference
        toward = np.eye(5)[i] - np.eye(5)[j]
        return float(toward @ np.linalg.solve(matrix, right)), float(toward @ np.linalg.solve(matrix, toward))

    seen: dict[int, tuple[float, float]] = {}
    for groups in score_groups(first, second, labeler, 5):
        groups.say(precision[groups.rows], pull[groups.rows], 1.0)
        means, variances, _ = groups.believe(prior, 1.5)
        seen |= {int(row): (float(m), float(v)) for row, m, v in zip(groups.rows, means, variances, strict=True)}
    # Each row from the other labeler's rows of its group only.
    assert seen[0] == pytest.approx(gap([1, 2], 0, 1))
    assert seen[1] == pytest.approx(gap([0], 1, 2))
    assert seen[2] == pytest.approx(gap([0], 0, 2))
    assert seen[3] == pytest.approx(gap([], 3, 4))


def star(candidates: int) -> Judgements:
    """Two labelers who both prefer one candidate to each of the others."""
    second = np.repeat(np.arange(1, candidates), 2)
    rows = len(second)
    answers = np.ones(rows, dtype=np.intp)
    names = tuple(map(str, range(candidates)))
    return Judgements(("ann", "bob"), names, np.arange(rows) % 2, np.zeros_like(second), second, answers, np.ones(rows))


def test_a_group_of_too_many_candidates_says_nothing_of_anybody() -> None:
    prior = PRIOR_AGREES / (PRIOR_AGREES + PRIOR_DIFFERS)
    for candidates, known in ((LARGEST_GROUP, True), (LARGEST_GROUP + 1, False)):
        rows = star(candidates)
        found = reliabilities(rows, np.zeros(candidates), np.full(len(rows.first), np.nan))
        assert (found.of(0).value > prior + 0.05) == known
        assert (found.of(0).n > 1) == known
    alone = reliabilities(star(900), np.zeros(900), np.full(2 * 899, np.nan))
    assert alone.of(1).value == pytest.approx(prior)
