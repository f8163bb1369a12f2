"""Intervals cover what they should, and completions of one prompt are not taken for several observations."""

import math
import random

import pytest

from feedback.preference import wilson
from train.intervals import figures, mean_over_clusters, mean_over_seeds, share_over_clusters

PROMPTS, DRAWS, WORLDS = 60, 4, 200


def worlds() -> list[tuple[list[bool], list[int]]]:
    """Each prompt has its own chance, 0.1 or 0.7 (mean 0.4), and is drawn several times."""
    rng = random.Random(0)
    found = []
    for _ in range(WORLDS):
        chances = [rng.choice((0.1, 0.7)) for _ in range(PROMPTS)]
        found.append(
            ([rng.random() < p for p in chances for _ in range(DRAWS)], [n // DRAWS for n in range(PROMPTS * DRAWS)])
        )
    return found


def test_both_intervals_cover_the_truth_where_one_that_ignores_clusters_does_not() -> None:
    covered = {"bootstrap": 0, "share": 0, "ignorant": 0}
    for happened, prompts in worlds():
        by_bootstrap = mean_over_clusters([float(one) for one in happened], prompts)
        by_share = share_over_clusters(happened, prompts)
        low, high = wilson(sum(happened), len(happened))
        covered["bootstrap"] += by_bootstrap.low <= 0.4 <= by_bootstrap.high
        covered["share"] += by_share.low <= 0.4 <= by_share.high
        covered["ignorant"] += low <= 0.4 <= high
    assert 0.91 < covered["bootstrap"] / WORLDS < 0.99
    assert 0.91 < covered["share"] / WORLDS < 0.99
    assert covered["ignorant"] / WORLDS < 0.88


def test_a_share_of_distinct_prompts_has_the_wilson_interval() -> None:
    found = share_over_clusters([True] * 3 + [False] * 9, list(range(12)))
    # The variance between clusters of one is the binomial one.
    assert found.value == 0.25
    assert found.n == pytest.approx(12)
    assert (found.low, found.high) == pytest.approx(wilson(3, 12), abs=1e-4)


def test_draws_that_always_agree_count_once() -> None:
    found = share_over_clusters([True, True, False, False, False, False], [0, 0, 1, 1, 2, 2])
    assert found.n == pytest.approx(3)


def test_a_share_of_zero_has_an_interval_as_of_one_trial_a_prompt() -> None:
    found = share_over_clusters([False] * 20, [n // 2 for n in range(20)])
    # Wilson's upper bound for 0 of 10 is z² / (10 + z²) = 3.8415 / 13.8415.
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(0.27753, abs=1e-5)


def test_one_prompt_says_nothing_of_others() -> None:
    found = mean_over_clusters([1.0, 0.0], ["same", "same"])
    assert (found.value, found.low, found.high) == (0.5, -math.inf, math.inf)
    assert figures("rate", found) == {"rate": 0.5}
    share = share_over_clusters([True, False] * 20, ["same"] * 40)
    # Wilson for half of one trial is 1/2 ± z / (2 √(1 + z²)) = 1/2 ± 1.95996 / (2 · 2.20034).
    assert (share.value, share.n) == (0.5, 1)
    assert (share.low, share.high) == pytest.approx((0.05463, 0.94537), abs=1e-5)


def test_the_interval_over_seeds_is_students() -> None:
    assert mean_over_seeds([0.7]) is None
    found = mean_over_seeds([0.6, 0.7, 0.8])
    # SD 0.1, t with two degrees of freedom 4.30265: half is 4.30265 · 0.1 / √3 = 0.248414.
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.451586, 0.948414), abs=1e-6)
