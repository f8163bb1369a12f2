import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.preference import Preference, preferences, wilson
from feedback.records import Candidate, Comparison, Prompt


def blind(versions: list[int | None], ranking: list[list[int]], source: str = "task") -> Comparison:
    return Comparison.model_validate(
        {
            "id": "cmp_1",
            "created": 1.0,
            "principal": "alice",
            "labeler": "alice",
            "prompt": Prompt(text="frog"),
            "source": source,
            "candidates": [Candidate(text=str(i), policy_version=v) for i, v in enumerate(versions)],
            "ranking": ranking,
        }
    )


def test_outcomes_of_two_candidates() -> None:
    given_ = [
        blind([3, 4], [[0], [1]]),
        blind([4, 3], [[0], [1]]),
        blind([3, 4], [[0, 1]]),
        blind([3, 5], [[0], [1]]),
        blind([3, None], [[0], [1]]),
        blind([3, 4], [[1], [0]], source="candidates"),
    ]
    assert preferences(given_, 3, 4) == [1, -1, 0]
    assert preferences(given_, 4, 3) == [-1, 1, 0]
    assert preferences(given_, 4, 5) == []


def test_one_ranking_is_one_outcome_however_many_candidates() -> None:
    # 3 above 4, 3 tied with 4, 3 above 4, 3 below 4: (1 + 0 + 1 - 1) / 4
    assert preferences([blind([3, 3, 4, 4], [[3], [0], [1, 2]])], 3, 4) == [(-1 + 1 - 1 + 0) / 4]
    assert preferences([blind([3, 4, 5], [[2], [0], [1]])], 3, 4) == [1]


def test_counting() -> None:
    counted = Preference.count([1, 0.5, -1, 0, 0])
    assert counted == Preference(wins=2, losses=1, ties=2)
    assert counted.win_rate == 3 / 5
    assert math.isnan(Preference.count([]).win_rate)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_where_the_score_test_would_reject(wins_of_n: tuple[int, int]) -> None:
    wins, n = wins_of_n
    for end in wilson(wins, n, z=1.96):
        assert (wins / n - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-12)


def test_wilson_of_a_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263 and 15 of 148, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 0) == (0, 1)
    assert wilson(0.5, 1)[0] == pytest.approx(1 - wilson(0.5, 1)[1])
    with pytest.raises(ValueError, match="0 to n = 3"):
        wilson(4, 3)
