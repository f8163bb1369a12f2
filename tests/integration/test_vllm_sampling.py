"""The vLLM sampler draws from the policy as it is now: same numbers, same stops, same seeds as the trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_policies import EOS, PAD, saved_policy, tiny_policy, tokenizer
from transformers import PreTrainedModel

from train.errors import DatasetUnusable, ModelUnusable
from train.iteration.experience import largest_gap
from train.losses import token_logprobs
from train.models import completion_logits
from train.sampling import Episodes, Sampler, greedy, open_sampler
from train.settings import PpoSettings

pytestmark = [
    pytest.mark.engine,
    # Raised inside torch and vLLM when vLLM is imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
]

WINDOW = 256
LONG = (4, 5, 6, 7, 8) * 40
"""Longer than the block of tokens that vLLM's prefix cache keeps."""
PROMPTS = [LONG, (9,), (10, 11, 12), (2, 2)] * 16
TEMPERATURE, COMPLETION_TOKENS = 0.8, 12


class Opened(NamedTuple):
    sampler: Sampler
    policy: PreTrainedModel

    def sample(self, seed: int = 0) -> Episodes:
        return self.sampler.sample(self.policy, PROMPTS, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def gap(self, episodes: Episodes) -> float:
        """Nats between the sampler's log-probabilities and those of the trainer's forward pass."""
        logits = completion_logits(self.policy, episodes.batch, TEMPERATURE)
        return largest_gap(token_logprobs(logits, episodes.batch.completion_ids), episodes)


def wide_policy(family: str, seed: int) -> PreTrainedModel:
    """A tiny policy whose heads vLLM has a kernel for, and whose rotary positions reach further."""
    policy = tiny_policy(family, width=64, seed=seed)
    policy.config.max_position_embeddings = WINDOW
    return policy


@pytest.fixture(scope="module", params=["llama", "untied"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """An engine started on one policy, and another policy of the same shape to sample from."""
    directory: Path = saved_policy(tmp_path_factory.mktemp("started-on"), wide_policy(request.param, 0))
    settings = PpoSettings(
        sampler="vllm", sampler_memory_gib=0.1, temperature=TEMPERATURE, max_completion_tokens=COMPLETION_TOKENS
    )
    with open_sampler(settings, directory, tokenizer()) as sampler:
        yield Opened(sampler, wide_policy(request.param, 1))


def test_after_a_change_in_place_the_logprobs_are_the_trainers(opened: Opened) -> None:
    before = opened.sample()
    with torch.no_grad():
        for weight in opened.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    after = opened.sample()
    assert opened.gap(before) > 0.1  # the change shows
    assert opened.gap(after) < 1e-4


def test_completions_end_with_eos_or_at_the_limit(opened: Opened) -> None:
    episodes = opened.sample()
    assert episodes.finished.any() and not episodes.finished.all()
    for completion, finished in zip(episodes.completions, episodes.finished.tolist(), strict=True):
        assert completion.count(EOS) == finished == (completion[-1] == EOS)
        assert len(completion) == COMPLETION_TOKENS or finished
    assert episodes.prompts == tuple(PROMPTS)
    assert episodes.logprobs[~episodes.batch.completion_mask].eq(0).all()


def test_the_generator_decides(opened: Opened) -> None:
    first, again, other = (opened.sample(seed) for seed in (3, 3, 4))
    assert first.completions == again.completions
    assert first.completions != other.completions
    of_one_prompt = {first.completions[row] for row in range(1, len(PROMPTS), 4)}
    assert len(of_one_prompt) > 1  # each request has a seed of its own


def test_without_temperature_it_is_greedy(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened.sampler, "temperature", 0.0)
    sampled = opened.sample()
    likeliest = greedy(opened.policy, PROMPTS, eos_id=EOS, pad_id=PAD, max_completion_tokens=COMPLETION_TOKENS)
    assert sampled.completions == likeliest.completions


def test_a_prompt_that_leaves_no_room_is_refused(opened: Opened) -> None:
    for prompt in ((), (3,) * (WINDOW - 4)):
        with pytest.raises(DatasetUnusable):
            opened.sampler.sample(opened.policy, [(2,), prompt], torch.Generator())


def test_a_policy_that_computes_nan_is_refused(opened: Opened) -> None:
    embedding = opened.policy.get_input_embeddings().weight
    kept = embedding.detach().clone()
    with torch.no_grad():
        embedding[3] = torch.nan
        with pytest.raises(ModelUnusable, match="not numbers"):
            opened.sample()
        embedding.copy_(kept)
    assert opened.gap(opened.sample()) < 1e-4
