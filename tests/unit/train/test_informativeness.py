import math
from pathlib import Path

import pytest
import torch
from tiny_policies import saved_policy, tiny_policy

from train.measures import informativeness
from train.models import load_tokenizer
from train.scalar_model import save_reward_model, scalar_model_from
from train.settings import EvaluateSettings

SETTINGS = EvaluateSettings(max_completion_tokens=5)
PROMPTS = [(2, 3, 4), (5, 6), (7, 8, 9, 10), (11,)]


def reward_model(policy: Path, out: Path, scale: float) -> Path:
    """Random opinions, ``scale`` times as strong."""
    model = scalar_model_from(tiny_policy(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.mul_(scale)
    save_reward_model(model, load_tokenizer(policy), out)
    return out


def test_a_reward_model_that_is_sure_finds_nothing_to_ask(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path / "policy")
    unsure = informativeness.run(SETTINGS, policy, reward_model(policy, tmp_path / "a", 1e-3), PROMPTS, seed=0)
    sure = informativeness.run(SETTINGS, policy, reward_model(policy, tmp_path / "b", 1e3), PROMPTS, seed=0)
    assert len(unsure) == len(sure) == 4
    assert all(nats == pytest.approx(math.log(2), abs=1e-3) for nats in unsure)
    assert all(0 <= nats < 0.2 for nats in sure)
    assert informativeness.run(SETTINGS, policy, tmp_path / "a", PROMPTS, seed=0) == unsure
    assert informativeness.run(SETTINGS, policy, tmp_path / "a", [], seed=0) == []


def test_completions_that_are_all_the_same_leave_nothing_to_prefer(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path / "policy")
    cold = SETTINGS.model_copy(update={"temperature": 1e-3})
    found = informativeness.run(cold, policy, reward_model(policy, tmp_path / "a", 1e-3), PROMPTS, seed=0)
    assert found == [0, 0, 0, 0]


def test_an_ensemble_is_asked_where_its_heads_disagree(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path / "policy")
    model = scalar_model_from(tiny_policy(), torch.Generator().manual_seed(0), heads=3)
    save_reward_model(model, load_tokenizer(policy), tmp_path / "differing")
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[[0]].expand(3, -1))
        model.head.bias.copy_(torch.tensor([-5.0, 0.0, 5.0]))
    save_reward_model(model, load_tokenizer(policy), tmp_path / "agreeing")
    differing, agreeing = (
        informativeness.run(SETTINGS, policy, tmp_path / name, PROMPTS, seed=0) for name in ("differing", "agreeing")
    )
    assert min(differing) > 0.1
    assert agreeing == pytest.approx([0, 0, 0, 0], abs=1e-5), "what is added to all completions prefers none"
