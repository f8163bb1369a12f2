"""What held-out comparisons say of a reward model's scores, by hand."""

import math

import pytest

from train.batches import RankedPrompt
from train.measures.scored import Scored, best_of_win_rate, calibration

A, B, C = (5, 1), (6, 1), (7, 1)


def scored(prompt: int, pairs: tuple[tuple[int, int], ...], *scores: float) -> Scored:
    completions = (A, B, C)[: len(scores)]
    return Scored(RankedPrompt((prompt,), completions, pairs), scores)


def test_the_choice_is_held_against_the_others_of_its_prompt() -> None:
    comparisons = [
        scored(2, ((0, 1), (0, 2), (1, 2)), 3.0, 2.0, 1.0),  # the labeler's best: preferred to both
        scored(3, ((0, 1), (0, 2), (1, 2)), 1.0, 3.0, 2.0),  # the second: preferred to one of two
        scored(4, ((0, 1), (0, 2)), 1.0, 0.0, 2.0),  # last, tied with another: half a win of two
        scored(5, ((0, 1),), 0.0, 1.0),  # the worse of two
    ]
    found = best_of_win_rate(comparisons)
    assert found["best_of_win_rate"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
    assert 0 <= found["best_of_win_rate_low"] < found["best_of_win_rate"] < found["best_of_win_rate_high"] <= 1
    assert best_of_win_rate([]) == {}


def test_confidence_is_held_against_how_often_it_is_right() -> None:
    sure, unsure = math.log(9), math.log(1.5)  # σ is 0.9 and 0.6
    comparisons = [
        scored(2, ((0, 1),), sure + 0.001, 0.0),
        scored(3, ((1, 0),), 0.0, sure + 0.001),
        scored(4, ((0, 1),), -sure - 0.001, 0.0),
        scored(5, ((0, 1),), unsure - 0.001, 0.0),
    ]
    found = calibration(comparisons)
    assert found["calibration_4_predicted"] == pytest.approx(0.9, abs=1e-3)
    assert found["calibration_4_observed"] == pytest.approx(2 / 3)
    assert found["calibration_0_predicted"] == pytest.approx(0.6, abs=1e-3)
    assert found["calibration_0_observed"] == 1
    assert len(found) == 4
