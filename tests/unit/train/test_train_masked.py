"""Masked statistics against hand-worked numbers and numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.masked import masked_mean, masked_variance, whiten

X = torch.tensor([[1.0, 2.0, 100.0], [3.0, -50.0, math.inf]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_and_variance_of_one_two_three() -> None:
    assert masked_mean(X, MASK).item() == pytest.approx(2)
    assert masked_variance(X, MASK).item() == pytest.approx(2 / 3)


def test_whitening_with_the_shift_centres_and_without_keeps_the_mean() -> None:
    unit = math.sqrt(1.5)  # 1 / SD of 1, 2, 3
    assert whiten(X, MASK)[MASK].tolist() == pytest.approx([-unit, 0, unit], abs=1e-6)
    assert whiten(X, MASK, shift_mean=False)[MASK].tolist() == pytest.approx([2 - unit, 2, 2 + unit], abs=1e-6)


def test_padding_is_zero_after_whitening_whatever_stood_there() -> None:
    assert whiten(X, MASK)[~MASK].tolist() == [0, 0, 0]
    assert whiten(X, MASK, shift_mean=False)[~MASK].tolist() == [0, 0, 0]


def test_a_mask_that_selects_nothing_gives_nan() -> None:
    assert math.isnan(masked_mean(X, torch.zeros_like(MASK)).item())


@given(st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=2, max_size=30))
def test_agrees_with_numpy_on_the_selected_elements(elements: list[tuple[float, bool]]) -> None:
    selected = np.array([value for value, taken in elements if taken])
    if len(selected) < 2 or selected.std() < 1e-2:
        return
    x = torch.tensor([[value for value, _ in elements]], dtype=torch.float64)
    mask = torch.tensor([[taken for _, taken in elements]])
    assert masked_mean(x, mask).item() == pytest.approx(selected.mean())
    assert masked_variance(x, mask).item() == pytest.approx(selected.var())
    expected = (selected - selected.mean()) / selected.std()
    assert whiten(x, mask)[mask].numpy() == pytest.approx(expected, abs=1e-3)
