import math
from itertools import product

import numpy as np
import pytest

from deploy.settings import VerdictSettings
from deploy.verdict import Evidence, judge, log_wealth

SETTINGS = VerdictSettings()


def wealth_path(outcomes: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Wealth after each comparison, [runs, looks], multiplied up bet by bet: independent of ``log_wealth``."""
    total = np.zeros(outcomes.shape)
    stakes = np.linspace(0.005, 0.995, 100)
    for stake in stakes:
        total += np.cumprod(1 + stake * (outcomes + 2 * margin) / (1 - 2 * margin), axis=1)
    return total / len(stakes)


def drawn(preference: float, runs: int, looks: int, seed: int = 0) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random((runs, looks)) < preference, 1.0, -1.0)


def first_look(wealth: np.ndarray) -> np.ndarray:
    """The look at which each run first reached 20, infinity where it never did."""
    reached = wealth >= 20
    return np.where(reached.any(1), reached.argmax(1) + 1, np.inf)


def test_the_wealth_after_two_wins_by_hand() -> None:
    """Two wins multiply the stake κ by (1 + κ)²; over κ spread evenly on (0, 1) the mean is near ∫(1+κ)² = 7/3."""
    assert math.exp(log_wealth(2, 0)) == pytest.approx(7 / 3, rel=1e-4)
    assert math.exp(log_wealth(0, 0)) == 1.0
    assert math.exp(log_wealth(1, 1)) == pytest.approx(2 / 3, rel=1e-4)  # ∫(1+κ)(1−κ)


def test_a_bet_is_fair_where_the_null_is_true() -> None:
    """Mean wealth over all outcomes of six comparisons is 1 at the edge of each null hypothesis."""
    for margin in (0.0, 0.02, 0.1):
        preferred = 0.5 - margin
        expected = sum(
            preferred ** (wins := sum(run))
            * (1 - preferred) ** (6 - wins)
            * math.exp(log_wealth(wins, 6 - wins, margin))
            for run in product((0, 1), repeat=6)
        )
        assert expected == pytest.approx(1.0)


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_the_closed_form_is_the_bets_multiplied_up(margin: float) -> None:
    outcomes = drawn(0.6, 3, 200)
    path = wealth_path(outcomes, margin)
    for run, look in product(range(3), (1, 10, 200)):
        wins = int((outcomes[run, :look] > 0).sum())
        assert math.exp(log_wealth(wins, look - wins, margin)) == pytest.approx(path[run, look - 1])


def test_under_equality_continuous_looking_is_wrong_at_most_one_time_in_twenty() -> None:
    wrong = np.isfinite(first_look(wealth_path(drawn(0.5, 2000, 1000)))).mean()
    assert wrong <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)
    outcomes = drawn(0.5, 2000, 1000)
    looks = np.arange(1, 1001)
    peeked = (np.abs(outcomes.cumsum(1)) > 1.96 * np.sqrt(looks))[:, 20:].any(1).mean()
    assert peeked > 0.25, "which is what looking at a z-test so often would do"


def test_at_the_margin_not_worse_is_wrong_at_most_one_time_in_twenty() -> None:
    wrong = np.isfinite(first_look(wealth_path(drawn(0.48, 2000, 1000), margin=0.02))).mean()
    assert wrong <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("preference", "documented", "looks"), [(0.7, 35, 400), (0.6, 150, 1500), (0.55, 700, 6000)])
def test_a_decision_takes_about_as_many_comparisons_as_documented(
    preference: float, documented: int, looks: int
) -> None:
    median = float(np.median(first_look(wealth_path(drawn(preference, 300, looks)))))
    assert documented * 0.75 <= median <= documented * 1.35


def test_the_verdict_is_what_the_wealth_says_at_its_first_crossing() -> None:
    outcomes = drawn(0.7, 20, 300, seed=3)
    for run, crossed in zip(outcomes, first_look(wealth_path(outcomes)), strict=True):
        before = judge(run[: int(crossed) - 1], SETTINGS)
        after = judge(run[: int(crossed)], SETTINGS)
        assert before.decision in ("undecided", "not_worse")
        assert after.decision == "better" and after.wealth_better >= 20
        assert judge(-run[: int(crossed)], SETTINGS).decision == "worse"


def test_a_decision_stands_whatever_comes_later() -> None:
    better = [1.0] * 30
    assert judge(better, SETTINGS).decision == "better"
    assert judge([*better, *[-1.0] * 200], SETTINGS).decision == "better"


def test_not_worse_comes_before_better_and_gives_way_to_worse() -> None:
    lenient = VerdictSettings(margin=0.2)
    evidence = Evidence(lenient)
    seen = []
    for _ in range(12):
        evidence.add(1.0)
        seen.append(evidence.verdict().decision)
    assert seen.index("not_worse") < seen.index("better")
    few = seen.index("not_worse") + 1
    assert judge([1.0] * few + [-1.0] * 100, lenient).decision == "worse"


def test_ties_are_shown_and_left_out() -> None:
    verdict = judge([1.0, 0.0, -1.0, 0.0, 0.0, 0.2], SETTINGS)
    assert (verdict.comparisons, verdict.wins, verdict.ties) == (3, 2, 3)
    assert verdict.wealth_better == judge([1.0, -1.0, 1.0], SETTINGS).wealth_better


def test_an_undecided_canary_is_held_for_the_operator() -> None:
    settings = VerdictSettings(max_comparisons=10)
    even = [1.0, -1.0] * 5
    assert not judge(even[:9], settings).held
    assert judge(even, settings).held
    assert "held for the operator" in judge(even, settings).sentence()
    assert not judge([1.0] * 30, settings).held


def test_a_long_winning_streak_is_a_finite_number() -> None:
    assert math.isfinite(judge([1.0] * 2000, SETTINGS).wealth_better)
