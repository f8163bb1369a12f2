"""The equations against hand-worked numbers, exact enumeration and independent implementations."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train import losses

Categorical: Any = torch.distributions.Categorical
GARBAGE = 1e6  # stands on the padding; no result may depend on it


def test_token_logprobs_and_entropy_agree_with_torch_distributions() -> None:
    logits = 3 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(losses.token_logprobs(logits, ids), Categorical(logits=logits).log_prob(ids), atol=1e-6)
    assert torch.allclose(losses.entropy(logits), Categorical(logits=logits).entropy(), atol=1e-6)


def test_ranking_loss_averages_over_a_prompts_pairs_and_then_over_prompts() -> None:
    # Prompt 0 has one pair with difference 1, prompt 1 three with differences 0, 0 and 2.
    scores = torch.tensor([[1.0], [0.0], [5.0], [5.0], [3.0]])
    chosen, rejected = torch.tensor([0, 2, 3, 2]), torch.tensor([1, 3, 2, 4])
    prompt = torch.tensor([0, 1, 1, 1])
    first = 0.3132617  # -log sigmoid(1)
    second = (0.6931472 + 0.6931472 + 0.1269280) / 3  # -log sigmoid of 0, 0, 2
    even = losses.ranking_loss(scores, chosen, rejected, prompt, torch.tensor([[1.0], [1.0]]))
    weighted = losses.ranking_loss(scores, chosen, rejected, prompt, torch.tensor([[1.5], [0.5]]))
    assert even.item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert weighted.item() == pytest.approx((1.5 * first + 0.5 * second) / 2, abs=1e-6)


def test_a_margin_is_taken_off_the_lead() -> None:
    # Leads of 1 and 2 with margins of 0 and 2: -log sigmoid of 1 and of 0.
    scores = torch.tensor([[2.0], [1.0], [0.0]])
    pair = (torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0, 0]), torch.ones(1, 1))
    found = losses.ranking_loss(scores, *pair, torch.tensor([0.0, 2.0]))
    assert found.item() == pytest.approx((0.3132617 + 0.6931472) / 2, abs=1e-6)


def test_each_head_of_an_ensemble_learns_from_its_own_weights_only() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, generator=generator, requires_grad=True)
    chosen, rejected, prompt = torch.tensor([0, 2, 3]), torch.tensor([1, 3, 4]), torch.tensor([0, 1, 1])
    weight = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    loss = losses.ranking_loss(scores, chosen, rejected, prompt, weight)
    (gradient,) = torch.autograd.grad(loss, scores)
    alone = [
        losses.ranking_loss(scores[:, [head]], chosen, rejected, prompt, weight[:, [head]]).item() for head in range(3)
    ]
    assert loss.item() == pytest.approx(sum(alone) / 3, abs=1e-6)
    assert gradient[2:, 1].eq(0).all(), "head 1 gives prompt 1 no weight"
    assert gradient[:2, 2].eq(0).all(), "head 2 gives prompt 0 no weight"
    assert gradient[:2, 1].ne(0).all()


def test_calibration_error_by_hand() -> None:
    # σ(ln 3) = 0.75 and σ(ln 9) = 0.9. Two bins split at 0.75: the first holds an even score (confidence ½, half
    # right), the second 0.75 right, 0.75 wrong and 0.9 right: |½ − ½| + |(1 − .75) + (0 − .75) + (1 − .9)| = 0.4, over
    # 4 pairs.
    lead = torch.tensor([0.0, math.log(3) + 1e-6, -math.log(3) - 1e-6, math.log(9)])
    assert losses.expected_calibration_error(lead, bins=2).item() == pytest.approx(0.1, abs=1e-5)
    # Ten bins tell 0.75 and 0.9 apart: (|1.0 − 1.5| + |1 − .9|) / 4.
    assert losses.expected_calibration_error(lead).item() == pytest.approx(0.15, abs=1e-5)
    certain = torch.tensor([1e4, -1e4])
    assert losses.expected_calibration_error(certain[:1]).item() == 0
    assert losses.expected_calibration_error(certain[1:]).item() == 1


def test_who_prefers_as_often_as_predicted_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    lead = 2 * torch.randn(40_000, generator=generator).abs()
    agreed = torch.rand(len(lead), generator=generator) < lead.sigmoid()
    signed = torch.where(agreed, lead, -lead)
    assert losses.expected_calibration_error(signed).item() < 0.01
    assert losses.expected_calibration_error(3 * signed).item() > 0.08, "too sure"
    assert losses.expected_calibration_error(signed / 3).item() > 0.08, "too modest"


def test_disagreement_by_hand() -> None:
    # Heads say 0, 0, 0 and 1, 2, 6 of two completions: the SD of 1, 2, 6 is √7. The third prompt's heads differ only in
    # what they add to both, so they agree; the second prompt's completions are the same.
    scores = torch.tensor(
        [[[0.0, 0.0, 0.0], [1.0, 2.0, 6.0]], [[0.0, 0.0, 0.0], [1.0, 2.0, 6.0]], [[0.0, 5.0, -3.0], [1.0, 6.0, -2.0]]]
    )
    differs = ~torch.eye(2, dtype=torch.bool).repeat(3, 1, 1)
    differs[1] = False
    assert losses.disagreement(scores, differs).tolist() == pytest.approx([math.sqrt(7), 0, 0], abs=1e-6)


def test_preference_entropy_by_hand() -> None:
    # H(1/2) = ln 2; H(sigma(ln 4)) = H(0.8) = 0.5004; the third completion is the first again.
    scores = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0 + math.log(4), 1.0], [0.0, 0.0, 100.0]])
    differs = ~torch.eye(3, dtype=torch.bool).repeat(3, 1, 1)
    differs[1, 0, 2] = differs[1, 2, 0] = False
    found = losses.preference_entropy(scores, differs).tolist()
    assert found == pytest.approx([math.log(2), 2 * 0.5004024 / 3, math.log(2) / 3], abs=1e-6)
    assert losses.preference_entropy(scores, torch.zeros_like(differs)).tolist() == [0, 0, 0], "nothing to choose"


def test_ranking_loss_pulls_the_chosen_up_and_the_rejected_down_and_knows_differences_only() -> None:
    scores = torch.tensor([[0.0], [1.0]], requires_grad=True)
    pair = (torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.ones(1, 1))
    loss = losses.ranking_loss(scores, *pair)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.flatten().tolist() == pytest.approx([-0.7310586, 0.7310586])  # sigmoid(1): the model is wrong by 1
    assert losses.ranking_loss(scores + 10, *pair).item() == pytest.approx(loss.item(), abs=1e-6)


def test_kl_rewards_charge_every_token_and_put_the_score_on_the_last_real_one() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, GARBAGE, GARBAGE]])
    reference = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -GARBAGE, math.inf]])
    rewards = losses.kl_rewards(torch.tensor([10.0, -2.0]), logprobs, reference, mask, kl_coef=0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.1, 10.0])
    assert rewards[1].tolist() == pytest.approx([-2.05, 0.0, 0.0])


def test_advantages_by_hand() -> None:
    # γ = 0.9, λ = 0.5: δ₂ = 2−1 = 1; δ₁ = 0+0.9·1−2 = −1.1; δ₀ = 1+0.9·2−3 = −0.2; A₁ = −1.1+0.45·1; A₀ = −0.2+0.45·A₁.
    rewards, values = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[3.0, 2.0, 1.0, GARBAGE]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = losses.advantages_and_returns(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    assert advantages[0].tolist() == pytest.approx([-0.4925, -0.65, 1.0, 0.0])
    assert returns[0].tolist() == pytest.approx([2.5075, 1.35, 2.0, 0.0])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.8, 0.7)])
def test_advantages_agree_with_the_sum_they_are_defined_by(gamma: float, gae_lambda: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    lengths = [6, 1, 4, 3]
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    rewards = torch.where(mask, rewards, 0.0)
    advantages, returns = losses.advantages_and_returns(rewards, values, mask, gamma, gae_lambda)
    for row, length in enumerate(lengths):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (s - t) * errors[s] for s in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
            if gae_lambda == 1.0 and gamma == 1.0:
                assert returns[row, t].item() == pytest.approx(sum(r[t:length]), abs=1e-5)  # Monte Carlo
    assert advantages[~mask].eq(0).all()


def test_policy_loss_by_hand() -> None:
    # A = 1: ratio 1.5 is clipped to 1.2, ratio 0.5 is free. A = −1: ratio 1.5 is free, ratio 0.5 clipped to 0.8.
    old = torch.zeros(1, 5)
    new = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5), GARBAGE]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, GARBAGE]])
    mask = torch.tensor([[True, True, True, True, False]])
    loss, clipped = losses.policy_loss(new, old, advantages, mask, clip=0.2)
    assert loss.item() == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8) / 4)
    assert clipped.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient[0, :4].tolist() == pytest.approx([0, -0.5 / 4, 1.5 / 4, 0])  # a clipped token teaches nothing


def test_policy_loss_starts_as_the_policy_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = losses.policy_loss(logprobs, logprobs.detach(), torch.tensor([[3.0, -5.0]]), torch.ones(1, 2).bool(), 0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [[-1.5, 2.5]]


def test_value_loss_by_hand() -> None:
    # Return 1, old value 0, clip 0.2. V = 0.1: free ½·0.81. V = 0.9: clipped to 0.2, ½·0.64. V = −1: free ½·4.
    values = torch.tensor([[0.1, 0.9, -1.0, GARBAGE]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    loss = losses.value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), mask, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 4) / 3)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient[0].tolist() == pytest.approx([-0.9 / 3, 0, -2 / 3, 0])


def test_k3_is_unbiased_by_exact_enumeration() -> None:
    p = Categorical(logits=torch.tensor([0.3, -1.0, 2.0, 0.0]))
    q = Categorical(logits=torch.tensor([-0.5, 0.2, 1.0, 1.0]))
    every = torch.arange(4)
    expected = (p.probs * losses.k3(p.log_prob(every), q.log_prob(every))).sum()
    assert expected.item() == pytest.approx(torch.distributions.kl_divergence(p, q).item(), abs=1e-6)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(logprob: float, other: float) -> None:
    estimate = losses.k3(torch.tensor(logprob, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))
    assert estimate.item() >= -1e-12


def test_explained_variance_is_one_zero_or_negative() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, GARBAGE]]), torch.tensor([[True, True, True, False]])
    assert losses.explained_variance(returns + 7, returns, mask).item() == pytest.approx(1)
    assert losses.explained_variance(torch.full_like(returns, 2.0), returns, mask).item() == pytest.approx(0)
    assert losses.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
