import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from deploy.bets import log_wealth
from deploy.release import Attempt
from deploy.settings import VerdictSettings
from deploy.verdict import TaskDrop, Verdict, judge, promotions_in_a_row, tasks_down

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


Stops = Callable[[np.ndarray, int], np.ndarray]
"""For each number of wins among so many comparisons, whether whoever looks decides."""


def chance_to_decide(preference: float, looks: int, stops: Stops) -> np.ndarray:
    """Exact probability to have decided by each look, [looks], by following every path of wins and losses at once."""
    undecided = np.ones(1)
    decided = np.empty(looks)
    for look in range(1, looks + 1):
        won = np.append(0.0, undecided * preference)
        undecided = won + np.append(undecided * (1 - preference), 0.0)
        stopping = stops(np.arange(look + 1), look)
        decided[look - 1] = undecided[stopping].sum()
        undecided[stopping] = 0.0
    return decided.cumsum()


def says_better(wins: np.ndarray, look: int) -> np.ndarray:
    return log_wealth(wins, look - wins) >= math.log(20)


def says_not_worse(wins: np.ndarray, look: int) -> np.ndarray:
    return log_wealth(wins, look - wins, 0.02) >= math.log(20)


def z_test_from_50_on(wins: np.ndarray, look: int) -> np.ndarray:
    beyond: np.ndarray = np.abs(2 * wins - look) > 1.96 * math.sqrt(look)
    return beyond & (look >= 50)


def test_looking_all_the_time_is_wrong_as_seldom_as_promised() -> None:
    wrong = chance_to_decide(0.5, 1000, says_better)[-1]
    assert wrong == pytest.approx(0.036, abs=0.002)
    assert chance_to_decide(0.48, 1000, says_not_worse)[-1] < 0.05, "at the margin"
    assert chance_to_decide(0.5, 1000, z_test_from_50_on)[-1] == pytest.approx(0.37, abs=0.005)


def test_the_chance_to_be_wrong_is_that_of_simulated_canaries() -> None:
    """The exact figure above against the real ``judge`` over 1 000 canaries of equal quality."""
    runs = drawn(0.5, 1000, 1000, seed=11)
    wrong = np.mean([judge(run, SETTINGS).wealth_better >= 20 for run in runs])
    assert wrong == pytest.approx(0.036, abs=3 * math.sqrt(0.036 * 0.964 / 1000))


@pytest.mark.parametrize(("preference", "median", "looks"), [(0.7, 37, 100), (0.6, 168, 300), (0.55, 795, 1000)])
def test_a_decision_takes_about_as_many_comparisons_as_documented(preference: float, median: int, looks: int) -> None:
    decided = chance_to_decide(preference, looks, says_better)
    assert np.argmax(decided >= 0.5) + 1 == median


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
    seen = [judge([1.0] * wins, lenient).decision for wins in range(1, 13)]
    assert seen.index("not_worse") < seen.index("better")
    few = seen.index("not_worse") + 1
    assert judge([1.0] * few + [-1.0] * 100, lenient).decision == "worse"


def test_ties_are_shown_and_left_out() -> None:
    verdict = judge([1.0, 0.0, -1.0, 0.0, 0.0, 0.2], SETTINGS)
    assert (verdict.comparisons, verdict.wins, verdict.ties) == (3, 2, 3)
    assert verdict.wealth_better == judge([1.0, -1.0, 1.0], SETTINGS).wealth_better


def test_nothing_said_is_nothing_decided() -> None:
    assert judge([], SETTINGS) == Verdict()
    assert judge([0.0] * 5, SETTINGS) == Verdict(ties=5)


def test_an_undecided_canary_is_held_for_the_operator() -> None:
    settings = VerdictSettings(max_comparisons=10)
    even = [1.0, -1.0] * 5
    assert not judge(even[:9], settings).held
    assert judge(even, settings).held
    assert "held for the operator" in judge(even, settings).sentence()
    assert not judge([1.0] * 30, settings).held


def test_a_long_winning_streak_is_a_finite_number() -> None:
    assert math.isfinite(judge([1.0] * 2000, SETTINGS).wealth_better)


def test_a_canary_held_for_the_operator_stays_held_whatever_comes_later() -> None:
    settings = VerdictSettings(max_comparisons=10)
    late = judge([1.0, -1.0] * 5 + [1.0] * 100, settings)
    assert (late.decision, late.held) == ("better", True)


def test_a_kind_of_task_is_down_beyond_its_standard_errors() -> None:
    """25 losses and 9 wins: 16 / sqrt(34) = 2.74 standard errors. 24 and 10 are 2.40. Six losses alone are 2.449."""
    outcomes = [-1.0] * 25 + [1.0] * 9 + [-1.0] * 24 + [1.0] * 10 + [-1.0] * 6 + [-1.0] * 7 + [1.0] * 50
    tasks = ["copy"] * 34 + ["count"] * 34 + ["six"] * 6 + ["seven"] * 7 + ["chat"] * 50
    down = tasks_down(outcomes, tasks, SETTINGS)
    assert down == (TaskDrop(task="copy", wins=9, losses=25), TaskDrop(task="seven", wins=0, losses=7))
    assert tasks_down([*outcomes, 0.0], [*tasks, "six"], SETTINGS) == down, "a tie is no loss"
    said = Verdict(tasks_down=down).sentence()
    assert "down on copy (9 of 34 won), seven (0 of 7 won)" in said


def log(*attempts: tuple[str, int, str]) -> list[Attempt]:
    """Accepted changes (verb, version stable from then on, reason), given oldest first, as the store gives them."""
    entries = [
        {"verb": verb, "reason": reason, "outcome": "accepted", "generation": str(place), "stable": str(stable)}
        for place, (verb, stable, reason) in enumerate(attempts, start=1)
    ]
    return [Attempt.of(f"{place}-0", entry) for place, entry in enumerate(entries)][::-1]


def test_promotions_in_a_row_are_counted_back_to_the_last_better_one() -> None:
    better, not_worse = (Verdict.model_validate({"decision": one}).sentence() for one in ("better", "not_worse"))
    assert promotions_in_a_row([]) == 0
    told = [
        ("first", 1, ""),
        ("canary", 1, "try"),
        ("promote", 2, not_worse),
        ("canary", 2, ""),
        ("promote", 3, better),
    ]
    assert promotions_in_a_row(log(*told)) == 0
    told += [("canary", 3, ""), ("promote", 4, not_worse), ("canary", 4, better), ("promote", 5, "the boss wants it")]
    assert promotions_in_a_row(log(*told)) == 2, "a reason that does not say better is none"
    dropped = [*told, ("canary", 5, ""), ("rollback", 5, "a bad canary")]
    assert promotions_in_a_row(log(*dropped)) == 2
    back = [*dropped, ("rollback", 4, "version 5 was bad, too")]
    assert promotions_in_a_row(log(*back)) == 1
    lost = Attempt.of("9-0", {"verb": "promote", "reason": not_worse, "outcome": "refused: generation is 3 by now"})
    assert promotions_in_a_row([lost, *log(*back)]) == 1
