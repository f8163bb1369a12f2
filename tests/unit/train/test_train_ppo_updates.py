"""A pass of PPO's updates against a plain one: an episode at a time, without padding, from the formulas' text."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policies import EOS, PAD
from tiny_ppo import PROMPTS, SETTINGS, TinyPpo, differentiable_forward

from train.batches import collate
from train.errors import TrainingDiverged
from train.iteration.experience import Experience, parts, pessimistic
from train.iteration.learner import Learner
from train.iteration.updates import learn

COMPLETIONS = [(2, 3, EOS), (4,), (5, 6, 7, 8, 9, EOS), (10, EOS), (EOS,), (11, 12)]
PASS = SETTINGS.model_copy(update={"minibatches": 3, "policy_lr": 0.05, "value_lr": 0.05})


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    home = TinyPpo(tmp_path).home
    return Learner.load(PASS, home / "policy", home / "reference", home / "rm")


@torch.no_grad()
def made_up(learner: Learner) -> Experience:
    """Six episodes whose log-probabilities and values are the models' own, with any advantages and returns."""
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    logprobs, values = (torch.zeros(batch.completion_mask.shape) for _ in range(2))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        chosen = differentiable_forward(learner.policy, prompt, completion).log_softmax(-1)
        logprobs[row, : len(completion)] = chosen[torch.arange(len(completion)), torch.tensor(completion)]
        values[row, : len(completion)] = differentiable_forward(learner.value_model, prompt, completion)
    random = torch.Generator().manual_seed(1)
    advantages, returns = (torch.randn(values.shape, generator=random) for _ in range(2))
    return Experience(batch, logprobs, values, advantages, returns)


def plain_pass(learner: Learner, experience: Experience, order: torch.Tensor) -> tuple[Any, Any, int]:
    """Policy and value model after the pass, and how many tokens were clipped."""
    policy, value_model, clipped = copy.deepcopy(learner.policy), copy.deepcopy(learner.value_model), 0
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        for model in (policy, value_model)
    ]
    for rows in order.chunk(PASS.minibatches):
        tokens = sum(len(COMPLETIONS[row]) for row in rows)
        policy_loss = value_loss = torch.zeros(())
        for row in rows.tolist():
            prompt, completion = PROMPTS[row], COMPLETIONS[row]
            logits, values = (differentiable_forward(model, prompt, completion) for model in (policy, value_model))
            for t, token in enumerate(completion):
                old, old_value, advantage, goal = (
                    x[row, t].item()
                    for x in (experience.logprobs, experience.values, experience.advantages, experience.returns)
                )
                ratio = (logits[t, token] - logits[t].logsumexp(0) - old).exp()
                if (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8):
                    clipped += 1  # its gradient is 0
                else:
                    policy_loss = policy_loss - advantage * ratio / tokens
                near = old_value + max(-0.2, min(0.2, values[t].item() - old_value))
                if (values[t].item() - goal) ** 2 >= (near - goal) ** 2:
                    value_loss = value_loss + 0.5 * (values[t] - goal) ** 2 / tokens
        for model, optimizer, loss in zip((policy, value_model), optimizers, (policy_loss, value_loss), strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return policy, value_model, clipped


@pytest.mark.parametrize("episodes_per_forward", [64, 1])
def test_a_pass_is_that_of_the_formulas(learner: Learner, episodes_per_forward: int) -> None:
    experience = made_up(learner)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    policy, value_model, clipped = plain_pass(learner, experience, order)
    assert clipped > 2
    settings = PASS.model_copy(update={"episodes_per_forward": episodes_per_forward})
    numbers = learn(learner, experience, None, settings, torch.Generator().manual_seed(3))
    assert numbers["policy_updates"] == 3
    for mine, plain in ((learner.policy, policy), (learner.value_model, value_model)):
        for (name, weight), other in zip(mine.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(weight, other, atol=2e-4), name


def test_parts_hold_every_token_once_and_their_shares_make_the_mean(learner: Learner) -> None:
    experience = made_up(learner)
    mask = experience.batch.completion_mask
    found = list(parts(learner, experience, PASS.model_copy(update={"episodes_per_forward": 4})))
    assert len(found) == 2 and max(len(part) for part, _ in found) <= 4
    assert sum(share for _, share in found) == pytest.approx(1)
    mean = sum(share * part.returns[part.batch.completion_mask].mean().item() for part, share in found)
    assert mean == pytest.approx(experience.returns[mask].mean().item(), abs=1e-6)
    held = sorted(x for part, _ in found for x in part.advantages[part.batch.completion_mask].tolist())
    assert held == sorted(experience.advantages[mask].tolist())
    ((_, share),) = parts(learner, experience, PASS)
    assert share == 1


def test_a_step_that_would_leave_the_sampling_policy_leaves_no_gradient_behind(learner: Learner) -> None:
    experience = made_up(learner)
    settings = PASS.model_copy(update={"target_kl": 1e-9})
    numbers = learn(learner, experience, None, settings, torch.Generator().manual_seed(3))
    assert numbers["policy_updates"] == 1
    assert all(weight.grad is None for weight in learner.policy.parameters())


def test_a_return_that_is_not_finite_is_refused(learner: Learner) -> None:
    experience = made_up(learner)
    experience.returns[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged):
        learn(learner, experience, None, PASS, torch.Generator())


def test_pessimism_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, -4.0]])
    assert pessimistic(scores, 0.0).tolist() == [2, 2, -2]
    assert pessimistic(scores, 1.5).tolist() == [0.5, 2, -5]
    assert pessimistic(torch.tensor([[7.0]]), 3.0).tolist() == [7]
