"""Reward models and PPO with adapters: two trunks for four models, small resume points, plain models published."""

import json
from pathlib import Path

import pytest
import torch
from distributed_stages import ADAPTERS, prepare, run_ppo, run_ppo_twice, run_reward_model
from improved_policies import PPO, PROMPTS
from safetensors.torch import load_file
from tiny_policies import EOS, saved_policy, tiny_policy
from torch import Tensor

from train.batches import Batch, collate
from train.iteration.learner import Learner
from train.lora import NO_ADAPTERS, learning
from train.models import completion_logits, load_policy
from train.ppo import RESUME_FILE
from train.settings import LoraSettings

STEEP = {
    "iterations": 14,
    "episodes_per_iteration": 32,
    "policy_lr": 1e-2,
    "ema": 0.0,
    "alarms": {"max_length_ratio": 100.0},
}
"""The tiny reward model likes short completions; that is let pass."""
BATCH = collate(PROMPTS, [(5, 7, EOS), (6, 6, 2, 3, EOS), (4,), (5, EOS), (9, 9), (8, EOS)], 0)


def _weights(directory: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return weights


def _said(learner: Learner, batch: Batch) -> list[Tensor]:
    """What reference and reward model say."""
    with torch.no_grad():
        return [completion_logits(learner.reference, batch), learner.reward_model.scores(batch)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


def test_four_models_stand_on_two_trunks_and_the_frozen_two_do_not_move(home: Path) -> None:
    def load(reference: str, lora: LoraSettings) -> Learner:
        return Learner.load(PPO, home / "policy", home / reference, home / "scorer", lora=lora)

    adapted, whole = load("policy", ADAPTERS), load("policy", NO_ADAPTERS)
    before = _said(adapted, BATCH)
    assert all(ours.equal(expected) for ours, expected in zip(before, _said(whole, BATCH), strict=True))
    with torch.no_grad():
        for model in (adapted.policy, adapted.value_model.trunk):
            for _, weight in learning(model):
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        assert not completion_logits(adapted.policy, BATCH).equal(before[0])
    assert all(ours.equal(expected) for ours, expected in zip(_said(adapted, BATCH), before, strict=True))

    def trunks(learner: Learner) -> int:
        models = [getattr(model, "adapted", model) for model in (learner.policy, learner.reference)]
        scalar = [getattr(model.trunk, "adapted", model.trunk) for model in (learner.value_model, learner.reward_model)]
        return len({model.get_input_embeddings().weight.data_ptr() for model in (*models, *scalar)})

    saved_policy(home / "parent", tiny_policy(seed=1))
    assert (trunks(adapted), trunks(whole), trunks(load("parent", ADAPTERS))) == (2, 4, 3)


def test_ppo_with_adapters_raises_the_score_and_publishes_a_plain_policy(home: Path) -> None:
    figures = run_ppo(home / "out", lora=ADAPTERS, changes=STEEP)
    scores = [numbers["score"] for numbers in _history(home)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.25 * figures["score_sd"]
    before, after = load_policy(home / "policy").state_dict(), load_policy(home / "out").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert {int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)) for name in changed} == {2}


def test_ppo_with_adapters_resumes_bit_for_bit_from_a_smaller_point(home: Path) -> None:
    run_ppo(home / "whole", lora=ADAPTERS)
    run_ppo_twice(home / "resumed", lora=ADAPTERS)
    resumed = _weights(home / "resumed")
    assert all(weight.equal(resumed[name]) for name, weight in _weights(home / "whole").items())
    run_ppo(home / "full")
    sizes = [(home / f"{name}-resume" / RESUME_FILE).stat().st_size for name in ("whole", "full")]
    assert sizes[0] < 0.8 * sizes[1]  # of these models names and headers are most


def test_the_averaged_adapters_are_published(home: Path) -> None:
    run_ppo(home / "averaged", lora=ADAPTERS, changes={"ema": 0.9})
    run_ppo(home / "last", lora=ADAPTERS, changes={"ema": 0.0})
    start, averaged, last = (_weights(home / name) for name in ("policy", "averaged", "last"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert 0 < (averaged[name] - start[name]).norm() < 0.6 * (last[name] - start[name]).norm()


def test_a_reward_model_with_adapters_is_published_whole(home: Path) -> None:
    figures = run_reward_model(home / "out", lora=ADAPTERS)
    assert figures["held_out_accuracy"] > 0.6
    before, after = _weights(home / "policy"), _weights(home / "out")
    trunk = {name.removeprefix("model."): weight for name, weight in before.items()}
    assert trunk.keys() == after.keys()
    assert {name for name in trunk if not trunk[name].equal(after[name])} == {
        name for name in trunk if name.endswith("_proj.weight")
    }


def _history(home: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (home / "out-resume" / "ppo-history.jsonl").read_text().splitlines()]
