"""What a version is measured on before it may take traffic; the names are those ``deploy.gate`` asks for.

None of the numbers needs a labeler. What people prefer is decided by blind comparisons once the version is
live (``deploy.verdict``); the reward model's own opinion of the candidate is reported and decides nothing.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deploy.versions import CanaryPrompt
from train.batches import Batch, RankedPrompt, TokenStream
from train.losses import token_logprobs
from train.models import completion_logits, load_policy, load_tokenizer, nonfinite_weights, pad_id_of, pretraining_loss
from train.reward_model import measure_pairs, score_sequences
from train.sampling import Episodes, greedy, sample_episodes
from train.scalar_model import load_reward_model
from train.settings import EvaluateSettings

SEQUENCES_PER_FORWARD = 32
"""Sequences of similar length that go through a model together."""

Measure = Callable[[Episodes], dict[str, float]]
"""Further numbers of a version's completions, such as a toxicity rate."""

Judge = Callable[[Episodes], Sequence[float]]
"""What each completion is worth to someone other than the reward model: [B], more is better."""


def run(
    settings: EvaluateSettings,
    policy_dir: Path,
    prompts: Sequence[tuple[int, ...]],
    *,
    reference_dir: Path,
    reward_model_dir: Path | None,
    pretraining: TokenStream | None,
    seed: int,
    measure: Measure | None = None,
) -> dict[str, float]:
    """Measure the policy in ``policy_dir``.

    Args:
        settings: how much of what.
        policy_dir: the policy.
        prompts: held-out prompts in token ids; ``settings.prompts`` of them are drawn.
        reference_dir: what the KL is measured to.
        reward_model_dir: for the mean score; None leaves it out.
        pretraining: held-out text, read from where it stands and left there; None leaves the loss out.
        seed: of the draw and of sampling; versions to be compared take the same.
        measure: further numbers of the same completions.

    Returns:
        ``nonfinite_weights``; and unless that is above 0, ``kl_to_reference`` (nats per completion) with its standard
        error ``kl_se``, ``eos_share``, ``completion_tokens`` (mean), ``distinct_2``, ``score`` with ``score_se``,
        ``pretraining_loss`` (nats per token), and what ``measure`` found.

    Raises:
        DatasetUnusable: where a prompt does not fit the policy.
        ModelUnusable: where a directory does not hold the model it should.
    """
    policy, tokenizer = load_policy(policy_dir), load_tokenizer(policy_dir)
    broken = nonfinite_weights(policy)
    if broken:
        return {"nonfinite_weights": broken}
    chosen = random.Random(seed).sample(list(prompts), min(settings.prompts, len(prompts)))
    episodes = _sample(settings, policy, tokenizer, chosen, torch.Generator().manual_seed(seed))
    reference_logprobs = _logprobs(load_policy(reference_dir), episodes.batch, settings.temperature)
    kl = torch.where(episodes.batch.completion_mask, episodes.logprobs - reference_logprobs, 0.0).sum(1).tolist()
    numbers = {
        "nonfinite_weights": 0.0,
        "kl_to_reference": fmean(kl),
        "kl_se": _standard_error(kl),
        "eos_share": float(episodes.finished.float().mean()),
        "completion_tokens": fmean(map(len, episodes.completions)),
        "distinct_2": distinct_2(episodes.completions),
    }
    if reward_model_dir is not None:
        scores = _scores(reward_model_dir, episodes, pad_id_of(tokenizer))
        numbers |= {"score": fmean(scores), "score_se": _standard_error(scores)}
    if pretraining is not None:
        numbers["pretraining_loss"] = held_out_loss(policy, pretraining, settings.pretraining_sequences)
    return numbers | (measure(episodes) if measure is not None else {})


def run_reward_model(reward_model_dir: Path, held_out: Sequence[RankedPrompt]) -> dict[str, float]:
    """Measure a reward model on comparisons it has not seen: ``nonfinite_weights`` and those of ``measure_pairs``."""
    model = load_reward_model(reward_model_dir)
    pairs = measure_pairs(model, held_out, pad_id_of(load_tokenizer(reward_model_dir)))
    return {"nonfinite_weights": nonfinite_weights(model), **pairs}


def best_of(
    settings: EvaluateSettings,
    policy_dir: Path,
    reward_model_dir: Path,
    prompts: Sequence[tuple[int, ...]],
    judge: Judge,
    *,
    seed: int,
) -> dict[str, float]:
    """What choosing the best of ``settings.best_of`` completions by the reward model gains, in a judge's eyes.

    Returns:
        The judge's means: ``sampled`` over all completions, ``best_of`` over those the reward model chose,
        ``best_possible`` over those the judge would have chosen; and ``recovered``, the share
        (best_of − sampled) / (best_possible − sampled), nan where nothing is to gain.
    """
    policy, tokenizer = load_policy(policy_dir), load_tokenizer(policy_dir)
    repeated = [prompt for prompt in prompts for _ in range(settings.best_of)]
    episodes = _sample(settings, policy, tokenizer, repeated, torch.Generator().manual_seed(seed))
    scores = torch.tensor(_scores(reward_model_dir, episodes, pad_id_of(tokenizer))).view(-1, settings.best_of)
    worth = torch.tensor(judge(episodes)).view(-1, settings.best_of)
    sampled, best_possible = float(worth.mean()), float(worth.amax(1).mean())
    chosen = float(worth.gather(1, scores.argmax(1, keepdim=True)).mean())
    headroom = best_possible - sampled
    recovered = (chosen - sampled) / headroom if headroom > 0 else math.nan
    return {"sampled": sampled, "best_of": chosen, "best_possible": best_possible, "recovered": recovered}


def canary_prompts(
    settings: EvaluateSettings, policy_dir: Path, prompts: Sequence[tuple[int, ...]]
) -> tuple[CanaryPrompt, ...]:
    """The first prompts with their greedy completions, for the manifest: an engine that loads it must agree."""
    policy, tokenizer = load_policy(policy_dir), load_tokenizer(policy_dir)
    episodes = greedy(
        policy,
        prompts[: settings.canary_prompts],
        eos_id=int(tokenizer.eos_token_id),
        pad_id=pad_id_of(tokenizer),
        max_completion_tokens=settings.canary_prompt_tokens,
    )
    return tuple(
        CanaryPrompt(prompt_token_ids=prompt, completion_token_ids=completion, logprobs=tuple(row[: len(completion)]))
        for prompt, completion, row in zip(
            episodes.prompts, episodes.completions, episodes.logprobs.tolist(), strict=True
        )
    )


@torch.no_grad()
def held_out_loss(policy: PreTrainedModel, text: TokenStream, sequences: int) -> float:
    """Mean next-token loss, nats per token, of the stream's next rows; the stream is left where it stood."""
    position = text.position()
    rows = text.take(sequences)
    text.seek(position)
    parts = (rows[start : start + SEQUENCES_PER_FORWARD] for start in range(0, sequences, SEQUENCES_PER_FORWARD))
    return sum(float(pretraining_loss(policy, part)) * len(part) for part in parts) / sequences


def distinct_2(completions: Sequence[tuple[int, ...]]) -> float:
    """Distinct bigrams as a share of all bigrams (Li et al. 2016, arXiv 1510.03055); 1 where there is none.

    It falls with the number of completions: compare versions on equally many.
    """
    bigrams = [pair for completion in completions for pair in itertools.pairwise(completion)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def _sample(
    settings: EvaluateSettings,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    generator: torch.Generator,
) -> Episodes:
    return sample_episodes(
        policy,
        prompts,
        eos_id=int(tokenizer.eos_token_id),
        pad_id=pad_id_of(tokenizer),
        max_completion_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        generator=generator,
    )


@torch.no_grad()
def _logprobs(policy: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    """Log-probability of every completion token, [B, R]; 0 on the padding."""
    logprobs = torch.zeros(batch.completion_mask.shape)
    for rows, part in batch.buckets(SEQUENCES_PER_FORWARD):
        found = token_logprobs(completion_logits(policy, part, temperature), part.completion_ids)
        logprobs[rows, : found.shape[1]] = found
    return logprobs


@torch.no_grad()
def _scores(reward_model_dir: Path, episodes: Episodes, pad_id: int) -> list[float]:
    sequences = [(*prompt, *rest) for prompt, rest in zip(episodes.prompts, episodes.completions, strict=True)]
    scores: list[float] = score_sequences(load_reward_model(reward_model_dir), sequences, pad_id).tolist()
    return scores


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; nan where one value cannot tell."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
