import numpy as np
import pytest

from deploy.bets import preference_bounds
from deploy.settings import VerdictSettings
from deploy.verdict import judge


def test_one_win_refutes_what_makes_it_a_wonder() -> None:
    # All stakes together multiply by 1 + ½ (1 − p)/p, which is 20 where (1 − p)/p is 38.
    low, high = preference_bounds([1], [0], 0.05)
    assert low == pytest.approx([1 / 39], abs=1e-5)
    assert high == [1.0]


def test_wins_and_losses_exchanged_is_the_same_from_above() -> None:
    low, high = preference_bounds([3, 9, 40], [2, 3, 11], 0.05)
    mirrored_low, mirrored_high = preference_bounds([2, 3, 11], [3, 9, 40], 0.05)
    assert low == pytest.approx(1 - mirrored_high)
    assert high == pytest.approx(1 - mirrored_low)


def test_without_a_comparison_anything_is_possible() -> None:
    low, high = preference_bounds([0], [0], 0.05)
    assert (low.tolist(), high.tolist()) == ([0], [1])
    assert [len(bound) for bound in preference_bounds([], [], 0.05)] == [0, 0]


@pytest.mark.parametrize("preference", [0.75, 0.3])
def test_one_half_is_excluded_from_the_look_on_at_which_the_verdict_decides(preference: float) -> None:
    draw = np.random.default_rng(5)
    outcomes = np.where(draw.random(300) < preference, 1.0, -1.0)
    low, high = preference_bounds(np.cumsum(outcomes > 0), np.cumsum(outcomes < 0), 0.05)
    decided = [judge(outcomes[:look], VerdictSettings()).decision in ("better", "worse") for look in range(1, 301)]
    assert 0 < sum(decided) < 300
    assert decided == ((low > 0.5) | (high < 0.5)).tolist()


def test_each_bound_holds_at_all_looks_at_once() -> None:
    draw = np.random.default_rng(11)
    runs, wrong_low, wrong_high = 200, 0, 0
    for _ in range(runs):
        wins = np.cumsum(draw.random(200) < 0.6)
        low, high = preference_bounds(wins, np.arange(1, 201) - wins, 0.1)
        wrong_low, wrong_high = wrong_low + bool(low[-1] > 0.6), wrong_high + bool(high[-1] < 0.6)
    assert max(wrong_low, wrong_high) <= 30  # 20 expected at most; more than 30 happen one time in a hundred
    assert min(wrong_low, wrong_high) > 0  # nor are they idle
