"""PPO on tiny models: one update against an independent computation, and each point where PPO goes wrong quietly."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_policies import EOS, PAD, VOCABULARY, saved_policy, tiny_policy
from tiny_ppo import PROMPTS, SETTINGS, Ran, TinyPpo, forward, logprobs_of, stream, without_times

from train import ppo
from train.batches import collate
from train.errors import DatasetUnusable, ModelUnusable, ResumePointUnusable, TrainingDiverged
from train.iteration.learner import Learner
from train.losses import policy_loss
from train.models import load_policy
from train.sampling import Episodes
from train.scalar_model import load_reward_model
from train.settings import PpoSettings


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ran]:
    return TinyPpo(tmp_path).run


def naive_advantages(
    settings: PpoSettings, episodes: Episodes, metrics: dict[str, float], policy: Any, reference: Any, reward_model: Any
) -> list[list[float]]:
    """Whitened advantages, one episode at a time in plain Python."""
    every = []
    for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True):
        ours, theirs = (logprobs_of(model, prompt, completion) for model in (policy, reference))
        rewards = [-settings.kl_coef * (p - q) for p, q in zip(ours, theirs, strict=True)]
        whole = collate([prompt], [completion], PAD)
        score = reward_model.score(whole).item() / metrics["score_sd"]
        rewards[-1] += score if completion[-1] == EOS else metrics["missing_eos_score"]
        values = [v / metrics["score_sd"] for v in forward(reward_model, prompt, completion).tolist()] + [0.0]
        errors = [rewards[t] + values[t + 1] - values[t] for t in range(len(completion))]
        every.append(
            [
                sum(settings.gae_lambda ** (s - t) * errors[s] for s in range(t, len(completion)))
                for t in range(len(completion))
            ]
        )
    flat = torch.tensor([advantage for row in every for advantage in row])
    return [((torch.tensor(row) - flat.mean()) / flat.std(correction=0)).tolist() for row in every]


@pytest.mark.parametrize("episodes_per_forward", [64, 2])
def test_one_update_is_what_the_paper_says(run: Callable[..., Ran], tmp_path: Path, episodes_per_forward: int) -> None:
    """With one minibatch the ratio is 1: the step follows −A ∇log π, plus γ_ptx times the text's gradient."""
    changes: dict[str, Any] = {"iterations": 1, "minibatches": 1, "ptx_coef": 0.7, "ptx_batch": 3, "kl_coef": 0.5}
    metrics, _, (episodes,) = run(**changes, episodes_per_forward=episodes_per_forward)
    policy, reference = load_policy(tmp_path / "policy"), load_policy(tmp_path / "reference")
    reward_model = load_reward_model(tmp_path / "rm").requires_grad_(False)
    settings = SETTINGS.model_copy(update=changes)
    advantages = naive_advantages(settings, episodes, metrics, policy, reference, reward_model)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    tokens = sum(map(len, episodes.completions))
    for prompt, completion, row in zip(episodes.prompts, episodes.completions, advantages, strict=True):
        ids = torch.tensor([prompt + completion])
        logprobs = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs[torch.arange(len(completion)), torch.tensor(completion)]
        torch.autograd.backward(-(torch.tensor(row) * chosen).sum() / tokens)
    text = stream().take(3)
    torch.autograd.backward(0.7 * policy(input_ids=text, labels=text).loss)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()

    trained = load_policy(tmp_path / "run" / "out").state_dict()
    start = load_policy(tmp_path / "policy").state_dict()
    moved = max((trained[name] - start[name]).abs().max().item() for name in start)
    assert moved > 5e-3
    for name, weight in policy.state_dict().items():
        assert torch.allclose(trained[name], weight, atol=1e-5), name


def test_the_reported_numbers_are_those_of_the_episodes(run: Callable[..., Ran], tmp_path: Path) -> None:
    metrics, (numbers, _), (episodes, _) = run(kl_coef=0.5)
    policy, reference = load_policy(tmp_path / "policy"), load_policy(tmp_path / "reference")
    reward_model = load_reward_model(tmp_path / "rm").requires_grad_(False)
    pairs = list(zip(episodes.prompts, episodes.completions, strict=True))
    scores = [reward_model.score(collate([prompt], [completion], PAD)).item() for prompt, completion in pairs]
    kls = [sum(logprobs_of(policy, *pair)) - sum(logprobs_of(reference, *pair)) for pair in pairs]
    seen = [
        score / metrics["score_sd"] if completion[-1] == EOS else metrics["missing_eos_score"]
        for score, (_, completion) in zip(scores, pairs, strict=True)
    ]
    assert 0 < numbers["eos_share"] < 1
    assert numbers["score"] == pytest.approx(sum(scores) / 8, abs=1e-4)
    assert numbers["kl_to_reference"] == pytest.approx(sum(kls) / 8, abs=1e-4)
    assert numbers["kl_se"] == pytest.approx(stdev(kls) / math.sqrt(8), abs=1e-4)
    each = [
        math.exp(theirs - ours) - 1 + ours - theirs
        for pair in pairs
        for ours, theirs in zip(logprobs_of(policy, *pair), logprobs_of(reference, *pair), strict=True)
    ]
    assert numbers["kl_k3"] == pytest.approx(sum(each) / 8, abs=1e-4)
    assert numbers["reward"] == pytest.approx((sum(seen) - 0.5 * sum(kls)) / 8, abs=1e-4)
    assert numbers["completion_tokens"] == sum(len(completion) for _, completion in pairs) / 8
    assert numbers["mine"] == 0.0
    assert numbers["seconds"] == pytest.approx(
        sum(numbers[f"{part}_seconds"] for part in ("sample", "score", "update"))
    )


def test_unfinished_completions_score_below_the_reference_whatever_the_reward_model_says(
    run: Callable[..., Ran],
) -> None:
    raw, _, _ = run("raw", normalize_score=False, missing_eos_penalty=3.0)
    scaled, _, _ = run("scaled", normalize_score=True, missing_eos_penalty=3.0)
    none, _, _ = run("none", normalize_score=False, missing_eos_penalty=0.0)
    assert raw["score_sd"] == 1
    mean, deviation = none["missing_eos_score"], scaled["score_sd"]
    assert raw["missing_eos_score"] == pytest.approx(mean - 3 * deviation, abs=1e-5)
    assert scaled["missing_eos_score"] == pytest.approx((mean - 3 * deviation) / deviation, abs=1e-5)


def test_every_log_probability_is_divided_by_the_temperature(run: Callable[..., Ran], tmp_path: Path) -> None:
    _, history, _ = run(temperature=0.6, reference=tmp_path / "policy", iterations=3)
    assert history[0]["kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert all(numbers["sampler_gap"] < 1e-5 for numbers in history)


def test_dropout_stays_off(run: Callable[..., Ran], tmp_path: Path) -> None:
    noisy = saved_policy(tmp_path / "noisy", tiny_policy("gpt2", dropout=0.5))
    _, history, _ = run(policy=noisy, reference=noisy, iterations=3)
    assert history[0]["kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert all(numbers["sampler_gap"] < 1e-5 for numbers in history)


def test_the_value_model_starts_as_the_reward_model(run: Callable[..., Ran], tmp_path: Path) -> None:
    learner = Learner.load(SETTINGS, tmp_path / "policy", tmp_path / "reference", tmp_path / "rm")
    learner.scale_scores(4.0)
    batch = collate(PROMPTS[:2], [(2, 3, EOS), (4,)], PAD)
    with torch.no_grad():
        assert torch.allclose(learner.value_model.values(batch), learner.reward_model.values(batch), atol=1e-6)
        unscaled = load_reward_model(tmp_path / "rm").values(batch)
        assert torch.allclose(learner.value_model.values(batch), unscaled / 4, atol=1e-6)
    models = (learner.policy, learner.reference, learner.reward_model, learner.value_model)
    assert [next(model.parameters()).requires_grad for model in models] == [True, False, False, True]


def test_the_first_iterations_update_the_value_model_alone(run: Callable[..., Ran], tmp_path: Path) -> None:
    _, history, episodes = run(iterations=4, value_only_iterations=2, value_lr=3e-3)
    assert [numbers["policy_updates"] for numbers in history] == [0, 0, 2, 2]
    policy = load_policy(tmp_path / "policy")
    for iteration, unchanged in enumerate([True, True, True, False]):
        prompt, completion = episodes[iteration].prompts[0], episodes[iteration].completions[0]
        ours = logprobs_of(policy, prompt, completion)
        found = episodes[iteration].logprobs[0, : len(completion)].tolist()
        assert (found == pytest.approx(ours, abs=1e-5)) is unchanged


def test_updates_stop_where_the_policy_left_what_it_sampled(run: Callable[..., Ran]) -> None:
    _, history, _ = run(target_kl=1e-8, minibatches=4)
    assert [numbers["policy_updates"] for numbers in history] == [1, 1]
    assert [numbers["stopped_early"] for numbers in history] == [0.75, 0.75]
    _, free, _ = run("free", target_kl=None, minibatches=4)
    assert [numbers["policy_updates"] for numbers in free] == [4, 4]
    assert [numbers["stopped_early"] for numbers in free] == [0, 0]


def test_every_pass_asks_every_prompt_once_in_a_new_order(run: Callable[..., Ran]) -> None:
    _, _, episodes = run(iterations=3)  # 24 episodes: 4 passes over 6 prompts
    asked = [prompt for iteration in episodes for prompt in iteration.prompts]
    passes = [asked[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(one) == sorted(PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_every_iteration_samples_anew(run: Callable[..., Ran]) -> None:
    _, _, (first, second) = run(prompts=[(2, 3)], value_only_iterations=1)  # the same policy and prompts twice
    assert first.prompts == second.prompts
    assert first.completions != second.completions


def test_the_minibatches_of_an_iteration_hold_every_episode_once(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[float] = []

    def recorded(new: Any, old: torch.Tensor, advantages: Any, mask: torch.Tensor, clip: float) -> Any:
        learnt.extend(old[mask].tolist())
        return policy_loss(new, old, advantages, mask, clip)

    monkeypatch.setattr("train.iteration.updates.policy_loss", recorded)
    _, _, (episodes,) = run(iterations=1, minibatches=4)
    sampled = episodes.logprobs[episodes.batch.completion_mask].tolist()
    assert sorted(learnt) == sorted(sampled)
    assert learnt != sampled


def test_the_averaged_policy_is_saved(run: Callable[..., Ran], tmp_path: Path) -> None:
    run("plain", iterations=1)
    run("averaged", iterations=1, ema=0.9)
    start, plain, averaged = (
        load_file(directory / "model.safetensors")
        for directory in (tmp_path / "policy", tmp_path / "plain" / "out", tmp_path / "averaged" / "out")
    )
    for name, weight in start.items():
        assert torch.allclose(averaged[name], 0.9 * weight + 0.1 * plain[name], atol=1e-6)


CHANGED = {"iterations": 5, "save_every": 2, "ema": 0.5, "ptx_coef": 0.3, "ptx_batch": 2, "value_only_iterations": 1}


class Stopped(Exception):
    """Stands for whatever ends a run early."""


def test_a_stopped_run_resumed_is_the_same_run(run: Callable[..., Ran], tmp_path: Path) -> None:
    schedule = {"policy_lr_warmup_iterations": 3, "policy_lr_final_fraction": 0.1, "adaptive_kl_target": 0.5}
    metrics, history, _ = run("whole", **CHANGED, **schedule)

    def stop(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if done == 4:
            raise Stopped  # after iteration 3 ran, whose work is lost: the last save was after iteration 1

    with pytest.raises(Stopped):
        ppo.run(
            SETTINGS.model_copy(update={**CHANGED, **schedule}),
            tmp_path / "policy",
            tmp_path / "reference",
            tmp_path / "rm",
            PROMPTS,
            tmp_path / "stopped" / "out",
            pretraining=stream(),
            resume_dir=tmp_path / "stopped",
            seed=0,
            progress=stop,
        )
    assert not (tmp_path / "stopped" / "out").exists()
    resumed, resumed_history, episodes = run("stopped", **CHANGED, **schedule)
    assert len(episodes) == 3  # iterations 2, 3 and 4
    for mine, theirs in [(resumed, metrics), *zip(resumed_history[2:], history[2:], strict=True)]:
        assert without_times(mine) == without_times(theirs)
    whole, stopped = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    again, _, none = run("stopped", **CHANGED, **schedule)  # a finished run has nothing left to do
    assert none == []
    assert again["score"] == metrics["score"]


def test_a_resume_point_of_another_run_is_refused(run: Callable[..., Ran], tmp_path: Path) -> None:
    run()
    with pytest.raises(ResumePointUnusable, match="other settings"):
        run(kl_coef=0.03)
    saved_policy(tmp_path / "reference", tiny_policy(seed=9))
    with pytest.raises(ResumePointUnusable, match=r"ppo\.pt"):
        run()


def test_what_cannot_work_is_refused_at_once(run: Callable[..., Ran], tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match="no room"):
        run(max_completion_tokens=61)
    wide = tiny_policy(seed=1)
    wide.resize_token_embeddings(VOCABULARY + 4)
    with pytest.raises(ModelUnusable, match="vocabularies"):
        run(reference=saved_policy(tmp_path / "wide", wide))
    arguments: dict[str, Any] = {"pretraining": None, "resume_dir": None, "seed": 0}
    directories = (tmp_path / "policy", tmp_path / "reference", tmp_path / "rm")
    with pytest.raises(DatasetUnusable, match="ptx_coef"):
        ppo.run(SETTINGS.model_copy(update={"ptx_coef": 1.0}), *directories, PROMPTS, tmp_path / "x", **arguments)
    with pytest.raises(DatasetUnusable, match="no prompts"):
        ppo.run(SETTINGS, *directories, [], tmp_path / "x", **arguments)


def test_a_diverging_run_stops_and_keeps_its_last_resume_point(run: Callable[..., Ran], tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged):
        run(value_lr=1e30, iterations=9)
    assert not (tmp_path / "run" / "out").exists()
