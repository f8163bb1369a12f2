"""Options of PPO: an adaptive KL coefficient, numbers per task, a pessimistic score of several heads."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_policies import EOS, PAD
from tiny_ppo import PROMPTS, SETTINGS, Ran, TinyPpo, logprobs_of

from train.batches import collate
from train.errors import DatasetUnusable, ModelUnusable
from train.iteration.learner import Learner
from train.models import load_policy
from train.scalar_model import load_reward_model
from train.settings import PpoSettings


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ran]:
    return TinyPpo(tmp_path).run


def test_an_adaptive_coefficient_follows_the_kl_and_rewards_with_what_it_became(run: Callable[..., Ran]) -> None:
    changes = {"adaptive_kl_target": 0.01, "adaptive_kl_horizon": 80, "iterations": 4, "value_only_iterations": 1}
    _, history, _ = run(**changes)
    assert all(numbers["kl_to_reference"] > 0.012 for numbers in history)  # far above the target
    # Eight of eighty episodes at the largest error, 0.2: times 1.02; not while the policy does not learn.
    assert [numbers["kl_coef"] for numbers in history] == pytest.approx([0.02, 0.02, 0.0204, 0.020808])
    _, fixed, _ = run("fixed", iterations=4)
    assert [numbers["kl_coef"] for numbers in fixed] == [0.02] * 4


def test_an_adaptive_coefficient_cannot_start_from_zero() -> None:
    with pytest.raises(ValidationError, match="kl_coef above 0"):
        PpoSettings(kl_coef=0.0, adaptive_kl_target=1.0)


def test_numbers_of_each_task_are_those_of_its_episodes(run: Callable[..., Ran], tmp_path: Path) -> None:
    tasks = ["count", "name", "count", "name", "rare", "count"]
    _, (numbers, _), (episodes, _) = run(tasks=tasks)
    policy, reference = load_policy(tmp_path / "policy"), load_policy(tmp_path / "reference")
    reward_model = load_reward_model(tmp_path / "rm").requires_grad_(False)
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True):
        kl = sum(logprobs_of(policy, prompt, completion)) - sum(logprobs_of(reference, prompt, completion))
        score = reward_model.score(collate([prompt], [completion], PAD)).item()
        found[tasks[PROMPTS.index(prompt)]].append((score, kl, len(completion)))
    assert len(found) == 3
    for task, rows in found.items():
        for name, column in zip(("score", "kl", "completion_tokens"), zip(*rows, strict=True), strict=True):
            assert numbers[f"{name}[{task}]"] == pytest.approx(fmean(column), abs=1e-4)


def test_tasks_are_asked_for_every_prompt_or_for_none(run: Callable[..., Ran]) -> None:
    with pytest.raises(DatasetUnusable, match="2 tasks for 6 prompts"):
        run(tasks=["count", "name"])


def test_tasks_change_nothing_but_the_report(run: Callable[..., Ran], tmp_path: Path) -> None:
    _, (numbers, _), _ = run("without")
    assert not [name for name in numbers if "[" in name]
    run("with", tasks=["a", "b"] * 3)
    with_tasks, without = ((tmp_path / n / "out" / "model.safetensors").read_bytes() for n in ("with", "without"))
    assert with_tasks == without


def test_a_pessimistic_score_is_lower_where_the_heads_disagree(tmp_path: Path) -> None:
    ppo = TinyPpo(tmp_path, heads=3)
    changes: dict[str, Any] = {"iterations": 1, "kl_coef": 0.0, "normalize_score": False}
    _, (numbers,), (episodes,) = ppo.run("pessimistic", **changes, score_pessimism=0.5)
    metrics, (plain,), (same,) = ppo.run("plain", **changes)
    assert episodes.completions == same.completions
    reward_model = load_reward_model(tmp_path / "rm").requires_grad_(False)
    heads = [
        reward_model.scores(collate([prompt], [completion], PAD))[0].tolist()
        for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True)
    ]
    ended = [completion[-1] == EOS for completion in episodes.completions]
    assert 0 < sum(ended) < 8
    penalty = sum(0.5 * pstdev(scores) for scores, end in zip(heads, ended, strict=True) if end) / 8
    unfinished = (numbers["reward"] - plain["reward"] + penalty) * 8 / (8 - sum(ended))
    assert penalty > 0.01
    assert numbers["score"] == pytest.approx(fmean(map(fmean, heads)), abs=1e-4)  # what is reported is the mean
    assert numbers["score_disagreement"] == pytest.approx(fmean(map(pstdev, heads)), abs=1e-4)
    pessimistic = ppo.run("pessimistic", **changes, score_pessimism=0.5)[0]["missing_eos_score"]
    assert unfinished == pytest.approx(pessimistic - metrics["missing_eos_score"], abs=1e-4)


def test_one_head_cannot_be_pessimistic(run: Callable[..., Ran]) -> None:
    with pytest.raises(ModelUnusable, match="one head"):
        run(score_pessimism=1.0)


def test_the_value_model_starts_as_the_mean_of_the_heads(tmp_path: Path) -> None:
    home = TinyPpo(tmp_path, heads=3).home
    learner = Learner.load(SETTINGS, home / "policy", home / "reference", home / "rm")
    batch = collate(PROMPTS[:2], [(2, 3, EOS), (4,)], PAD)
    assert learner.value_model.heads == 1
    with torch.no_grad():
        assert torch.allclose(learner.value_model.values(batch), learner.reward_model.values(batch), atol=1e-6)
