import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.preference import (
    Z95,
    Estimate,
    Preference,
    bradley_terry,
    compare,
    preferences,
    wilson,
)
from feedback.records import Candidate, Comparison, Prompt


def blind(
    versions: list[int | None], ranking: list[list[int]], source: str = "task", prompt: str = "frog"
) -> Comparison:
    return Comparison.model_validate(
        {
            "id": "cmp_1",
            "created": 1.0,
            "principal": "alice",
            "labeler": "alice",
            "prompt": Prompt(text=prompt),
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


def test_one_task_is_one_outcome_however_many_labelers() -> None:
    def of_task(task_id: str, labeler: str, ranking: list[list[int]]) -> Comparison:
        return blind([3, 4], ranking).model_copy(update={"task_id": task_id, "labeler": labeler})

    crowd = [of_task("task_1", f"L-{n}", [[0], [1]]) for n in range(500)]
    assert preferences([*crowd, of_task("task_2", "L-1", [[1], [0]])], 3, 4) == [1, -1]


def games(results: dict[tuple[int, int], tuple[int, int, int]]) -> list[Comparison]:
    """Comparisons of two versions, each of its own prompt: how often the first won, lost and tied."""
    rankings = [[[0], [1]], [[1], [0]], [[0, 1]]]
    return [
        blind([*pair], ranking, prompt=f"{pair} {ranking} {number}")
        for pair, counts in results.items()
        for ranking, count in zip(rankings, counts, strict=True)
        for number in range(count)
    ]


def test_win_rate_by_hand() -> None:
    # K = 4: 3 above 4 in three of four pairs and below in one, (3 - 1) / 4 = 0.5, so 0.75 of a win.
    asked = [*games({(3, 4): (2, 1, 2)}), blind([3, 3, 4, 4], [[0], [2], [1], [3]])]
    asked.append(blind([3, 5], [[0], [1]]))
    found = compare(asked, 3, 4)
    assert (found.wins, found.losses, found.ties) == (3, 1, 2)
    assert found.win_rate == Estimate((2 + 1 + 0.75) / 6, *wilson(3.75, 6, Z95), 6)
    assert found.win_rate_by_prompt and found.win_rate_by_prompt.value == found.win_rate.value
    turned = compare(asked, 4, 3)
    assert turned.win_rate and turned.win_rate.value == pytest.approx(1 - found.win_rate.value)
    assert compare(asked, 3, 9) == Preference(0, 0, 0, None, None)


def test_bootstrap_is_seeded_and_over_prompts() -> None:
    # Two prompts: one always won, one always lost. Resampled, the rate is 0, 1/2 or 1 with 1/4, 1/2, 1/4.
    asked = [blind([1, 2], [[0], [1]], prompt="a")] * 50 + [blind([1, 2], [[1], [0]], prompt="b")] * 50
    found = compare(asked, 1, 2, seed=5)
    assert found.win_rate_by_prompt == Estimate(0.5, 0, 1, 2)
    assert found.win_rate and found.win_rate.low > 0.4
    lively = games({(1, 2): (60, 40, 0)})
    first, again, another = (compare(lively, 1, 2, resamples=50, seed=seed) for seed in (5, 5, 6))
    assert first == again != another
    by_prompt = compare(lively, 1, 2).win_rate_by_prompt
    assert by_prompt and (by_prompt.low, by_prompt.high) == pytest.approx(wilson(60, 100), abs=0.02)


def test_only_the_interval_over_prompts_holds_where_prompts_differ() -> None:
    rng = np.random.default_rng(3)
    held = np.zeros(2)
    trials = 120
    for trial in range(trials):
        asked = []
        for prompt, rate in enumerate(rng.beta(0.9, 0.6, 40)):  # mean 0.6
            for won in rng.random(8) < rate:
                asked.append(blind([1, 2], [[0], [1]] if won else [[1], [0]], prompt=str(prompt)))
        found = compare(asked, 1, 2, resamples=400, seed=trial)
        assert found.win_rate and found.win_rate_by_prompt
        for which, interval in enumerate([found.win_rate, found.win_rate_by_prompt]):
            held[which] += interval.low <= 0.6 <= interval.high
    plain, by_prompt = held / trials
    assert by_prompt > 0.88  # found: 0.958
    assert plain < 0.8  # 0.683


def test_bradley_terry_of_two_versions_is_the_log_odds() -> None:
    three, four = bradley_terry(games({(3, 4): (10, 30, 0)}))
    assert (three.version, three.baseline, three.log_odds) == (3, 3, Estimate(0, 0, 0, 40))
    assert (four.version, four.baseline) == (4, 3)
    assert four.log_odds.value == pytest.approx(math.log(3), abs=1e-6)
    # Variance 1/10 + 1/30, times P / (P - 1) for clustering by 40 prompts.
    half = 1.96 * math.sqrt((1 / 10 + 1 / 30) * 40 / 39)
    assert four.log_odds.high - four.log_odds.value == pytest.approx(half, rel=1e-4)
    assert four.log_odds.value - four.log_odds.low == pytest.approx(half, rel=1e-4)


def test_a_tie_is_half_a_win_for_each() -> None:
    _, four = bradley_terry(games({(3, 4): (5, 25, 10)}))
    assert four.log_odds.value == pytest.approx(math.log(30 / 10), abs=1e-6)


def test_bradley_terry_is_the_fixed_point_of_another_algorithm() -> None:
    results = {(1, 2): (12, 20, 3), (2, 3): (9, 14, 0), (1, 3): (4, 16, 5), (3, 7): (11, 8, 2), (1, 7): (1, 6, 0)}
    versions = [1, 2, 3, 7]
    won = np.zeros((4, 4))
    for (a, b), (wins, losses, ties) in results.items():
        i, j = versions.index(a), versions.index(b)
        won[i, j], won[j, i] = wins + ties / 2, losses + ties / 2
    # Minorisation-maximisation, Hunter 2004, Annals of Statistics 32:384, equation 3.
    strength = np.ones(4)
    for _ in range(5000):
        strength = won.sum(axis=1) / ((won + won.T) / np.add.outer(strength, strength)).sum(axis=1)
    found = bradley_terry(games(results))
    assert [one.version for one in found] == versions
    assert {one.baseline for one in found} == {1}
    assert [one.log_odds.value for one in found] == pytest.approx(np.log(strength / strength[0]), abs=1e-5)
    assert [one.log_odds.n for one in found] == [67, 58, 69, 28]


def test_versions_nothing_connects_have_baselines_of_their_own() -> None:
    # 1 and 2 met, 5 and 6 met; 9 lost to 2 always; 10 met nobody.
    asked = games({(1, 2): (3, 1, 0), (5, 6): (2, 2, 0), (2, 9): (4, 0, 0)})
    asked += [blind([10, 10], [[0], [1]]), blind([10, None], [[0], [1]]), blind([1, 5], [[0], [1]], source="outside")]
    found = bradley_terry(asked)
    assert [(one.version, one.baseline) for one in found] == [(1, 1), (2, 1), (5, 5), (6, 5), (9, 9)]
    # Games against a version of another baseline say nothing within one.
    assert found[1].log_odds.value == pytest.approx(math.log(1 / 3), abs=1e-6)
    assert found[3].log_odds.value == pytest.approx(0, abs=1e-6)
    assert bradley_terry([]) == []


def test_a_tie_connects() -> None:
    found = bradley_terry(games({(2, 9): (4, 0, 1)}))
    assert [one.baseline for one in found] == [2, 2]
    assert found[1].log_odds.value == pytest.approx(math.log(0.5 / 4.5), abs=1e-6)


def test_one_ranking_of_three_versions_is_a_game_of_each_two() -> None:
    ranked = [blind([1, 2, 3], [[0], [1], [2]], prompt="a"), blind([1, 2, 3], [[2], [1], [0]], prompt="b")]
    found = bradley_terry(ranked)
    assert [one.log_odds.value for one in found] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [one.log_odds.n for one in found] == [4, 4, 4]


def test_comparisons_of_few_prompts_widen_the_strengths() -> None:
    alone = games({(1, 2): (40, 60, 0)})
    shared = [one.model_copy(update={"prompt": Prompt(text=str(n // 20))}) for n, one in enumerate(alone)]
    narrow, wide = bradley_terry(alone)[1].log_odds, bradley_terry(shared)[1].log_odds
    assert wide.value == pytest.approx(narrow.value)
    # Five prompts of 20, two all wins, three all losses: 20 times the variance, and 5/4 instead of 100/99.
    assert wide.high - wide.value == pytest.approx((narrow.high - narrow.value) * math.sqrt(20 * (5 / 4) / (100 / 99)))
    one_prompt = [one.model_copy(update={"prompt": Prompt(text="a")}) for one in alone]
    assert bradley_terry(one_prompt)[1].log_odds.high == math.inf


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
