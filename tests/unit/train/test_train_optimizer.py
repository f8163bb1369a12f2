"""The schedule by hand, and an update that clips, clears and refuses what is not finite."""

import copy
import math

import pytest
import torch
from torch import nn

from train.errors import TrainingDiverged
from train.running.optimizer import adamw, cosine_factor, update


def test_the_factor_warms_up_from_a_tenth_and_falls_by_half_a_cosine() -> None:
    factors = [cosine_factor(step, 9, warmup=4, final_fraction=0.2) for step in range(9)]
    assert factors[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    assert factors[6] == pytest.approx(0.6)  # half way between 1 and 0.2
    assert factors[8] == pytest.approx(0.2)
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_without_decay_the_factor_stays_one() -> None:
    assert [cosine_factor(step, 5, final_fraction=1.0) for step in range(5)] == [1.0] * 5


def test_a_single_step_takes_the_peak() -> None:
    assert cosine_factor(0, 1) == 1.0


def test_only_matrices_decay() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    optimizer = adamw(model, 0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.weight.detach().flatten().tolist() == pytest.approx([0.95] * 4)  # 1 − lr · decay
    assert model.bias.tolist() == [1.0, 1.0]


def test_three_steps_by_hand() -> None:
    # Gradients 1, 2, 4 at rate 0.1, in plain floats from Loshchilov & Hutter 2019, algorithm 2.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = adamw(model, 0.1, weight_decay=0.5, epsilon=1e-5)
    weight, mean, square = 1.0, 0.0, 0.0
    for step, gradient in enumerate((1.0, 2.0, 4.0), start=1):
        model.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        weight -= 0.1 * 0.5 * weight
        weight -= 0.1 * mean / (1 - 0.9**step) / (math.sqrt(square / (1 - 0.95**step)) + 1e-5)
        assert model.weight.item() == pytest.approx(weight, abs=1e-6)


def test_an_optimizer_saved_and_restored_goes_on_bit_for_bit() -> None:
    gradients = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))

    def stepped(model: nn.Linear, optimizer: torch.optim.AdamW, times: range) -> None:
        for time in times:
            model.weight.grad = gradients[time].clone()
            optimizer.step()

    torch.manual_seed(0)
    whole, resumed = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
    optimizer = adamw(whole, 0.1)
    stepped(whole, optimizer, range(3))
    resumed.load_state_dict(whole.state_dict())
    restored = adamw(resumed, 0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stepped(whole, optimizer, range(3, 6))
    stepped(resumed, restored, range(3, 6))
    assert resumed.weight.equal(whole.weight)


def test_an_update_clips_to_the_norm_sets_the_rate_and_clears_the_gradients() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=123.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert update(optimizer, [weight], learning_rate=0.5, max_norm=1.0) == pytest.approx(5.0)
    assert weight.tolist() == pytest.approx([-0.3, -0.4], abs=1e-5)
    assert weight.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(TrainingDiverged, match="nan"):
        update(torch.optim.SGD([weight], lr=1.0), [weight], learning_rate=1.0, max_norm=1.0)
    assert weight.tolist() == [1.0, 1.0]
