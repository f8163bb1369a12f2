"""What a version is measured on before it may take traffic; the names are those ``deploy.gate`` asks for.

What people prefer is decided by blind comparisons once the version is live (``deploy.verdict``); the reward model's own
opinion of the candidate is reported and decides nothing. ``train.measures.win_rate`` holds one version against another,
by what ``run`` leaves in its ``completions`` file.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deploy.versions import CanaryPrompt
from train.batches import Answered, Batch, RankedPrompt, TokenStream
from train.errors import DatasetUnusable
from train.losses import k3, token_logprobs
from train.measures import completed, probes, triggers
from train.measures.completed import Completed
from train.measures.scored import best_of_win_rate, calibration, score
from train.measures.world import UNKNOWN, Gold, World
from train.models import (
    completion_logits,
    load_policy,
    load_tokenizer,
    nonfinite_weights,
    pad_id_of,
    pretraining_loss,
    token_logits,
)
from train.reward_model import measure_pairs, score_completions
from train.running.progress import Progress, silent
from train.sampling import Episodes, greedy, sample_episodes
from train.scalar_model import ScalarModel, load_reward_model
from train.settings import EvaluateSettings

SEQUENCES_PER_FORWARD = 32
"""Sequences of similar length that go through a model together."""

PROMPTS_PER_STEP = 128
"""Prompts that are completed and measured between two reports of progress."""

LONGEST_CANARY = 24
"""Tokens of a drawn canary prompt at most: it fits any engine's window."""

NEAR_TIE = 0.01
"""Nats between the two most probable tokens, below which rounding might decide between them in another engine."""

Prompts = Sequence[tuple[int, ...]]


def run(
    settings: EvaluateSettings,
    policy_dir: Path,
    prompts: Prompts,
    *,
    reference_dir: Path,
    reward_model_dir: Path | None,
    pretraining: TokenStream | None,
    seed: int,
    world: World = UNKNOWN,
    completions: Path | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """Measure the policy in ``policy_dir``.

    Args:
        settings: how much of what.
        policy_dir: the policy.
        prompts: held-out prompts in token ids; ``settings.prompts`` of them are drawn.
        reference_dir: what the KL is measured to.
        reward_model_dir: for the mean score; None leaves it out.
        pretraining: held-out text, read from where it stands and left there; None leaves the loss out.
        seed: of the draw and of sampling; versions to be compared take the same, and complete the same prompts.
        world: probes and gold, where there are any (``train.measures.world.world_of``).
        completions: JSONL file to keep the sampled completions in, for win rates and the report.
        progress: called after each part, as stage ``evaluate``.

    Returns:
        ``nonfinite_weights``; and unless that is above 0, ``kl_to_reference`` (k1, nats per completion) with its
        standard error ``kl_se``, ``kl_k3`` (the same by k3), ``eos_share``, ``completion_tokens`` (mean),
        ``distinct_1``, ``distinct_2``, ``score`` with ``score_se``, ``pretraining_loss`` (nats per token), the rates of
        ``train.measures.probes.RATES`` that the world's probes measure, ``gold`` with ``gold_se``, and by gold the
        figures of ``best_of``.

    Raises:
        DatasetUnusable: where a prompt does not fit the policy, or there is none.
        ModelUnusable: where a directory does not hold the model it should.
    """
    if not prompts:
        raise DatasetUnusable("there are no held-out prompts to measure on: see train.evaluate.max_completion_tokens")
    policy, tokenizer = load_policy(policy_dir), load_tokenizer(policy_dir)
    broken = nonfinite_weights(policy)
    if broken:
        return {"nonfinite_weights": broken}
    chosen = random.Random(seed).sample(list(prompts), min(settings.prompts, len(prompts)))
    asked = [probe for probe in world.probes for _ in range(settings.probe_completions)]
    judged = chosen[: settings.best_of_prompts] if world.gold and reward_model_dir else []
    sampler = _Sampler(settings, policy, tokenizer, _own_generator(policy, seed))
    reference = load_policy(reference_dir)
    scorer = load_reward_model(reward_model_dir) if reward_model_dir is not None else None
    total = len(chosen) + len(asked) + settings.best_of * len(judged)
    done = 0

    # 1. A completion of each prompt, and what the reference, the reward model and gold make of it.
    seen = _Seen()
    for episodes in sampler.parts(chosen):
        seen.add(episodes, _logprobs(reference, episodes.batch, settings.temperature))
        seen.completed += _kept(episodes, tokenizer, scorer, world.gold)
        done += len(episodes.prompts)
        progress("evaluate", done, total, {"kl_to_reference": fmean(seen.kl)})
    numbers = {"nonfinite_weights": 0.0, **seen.figures()}
    if completions is not None:
        completed.write(completions, seen.completed)

    # 2. The tax on what it knew.
    if pretraining is not None:
        numbers["pretraining_loss"] = held_out_loss(policy, pretraining, settings.pretraining_sequences)

    # 3. Probes.
    texts: list[str] = []
    for episodes in sampler.parts([probe.prompt_ids for probe in asked]):
        texts += [_text(tokenizer, ids) for ids in episodes.completions]
        done += len(episodes.prompts)
        progress("evaluate", done, total, numbers)
    numbers |= probes.rates(asked, texts)

    # 4. What the reward model's choice among several completions is worth.
    if judged and world.gold and scorer:
        worth: list[tuple[float, float]] = []
        for episodes in sampler.parts([prompt for prompt in judged for _ in range(settings.best_of)]):
            worth += [(one.score or 0.0, one.gold or 0.0) for one in _kept(episodes, tokenizer, scorer, world.gold)]
            done += len(episodes.prompts)
            progress("evaluate", done, total, numbers)
        numbers |= best_of(worth, settings.best_of)
    return numbers


def run_reward_model(
    reward_model_dir: Path,
    held_out: Sequence[RankedPrompt],
    *,
    anchors: Sequence[RankedPrompt] = (),
    own: Sequence[RankedPrompt] = (),
) -> dict[str, float]:
    """Measure a reward model on comparisons it has not seen.

    Args:
        reward_model_dir: the reward model.
        held_out: comparisons by labelers.
        anchors: trusted comparisons, the same for every reward model: the golden ones of the log
            (``feedback.controls``).
        own: comparisons among completions of the policy trained against it (``train.rounds.own_completions``).

    Returns:
        ``nonfinite_weights``, those of ``measure_pairs``, and where there is enough to tell: ``anchor_accuracy`` on
        the anchors' pairs and ``own_accuracy`` on ``own``, with ``_low`` and ``_high``; ``best_of_win_rate`` and
        ``calibration_…`` of ``train.measures.scored``; and ``trigger_drift`` (SDs, ``train.measures.triggers``).
    """
    model, tokenizer = load_reward_model(reward_model_dir), load_tokenizer(reward_model_dir)
    pad_id, eos_id = pad_id_of(tokenizer), int(tokenizer.eos_token_id)
    numbers = {"nonfinite_weights": float(nonfinite_weights(model)), **measure_pairs(model, held_out, pad_id)}
    if numbers["nonfinite_weights"]:
        return numbers
    for name, comparisons in (("anchor_accuracy", anchors), ("own_accuracy", own)):
        measured = measure_pairs(model, comparisons, pad_id)
        for end in ("", "_low", "_high"):
            if f"held_out_accuracy{end}" in measured:
                numbers[name + end] = measured[f"held_out_accuracy{end}"]
    scored = score(model, held_out, pad_id)
    numbers |= best_of_win_rate(scored) | calibration(scored)
    answered = dict.fromkeys((one.prompt_ids, completion) for one in held_out for completion in one.completions)
    moved = triggers.drift(model, list(answered), triggers.triggers(tokenizer), eos_id=eos_id, pad_id=pad_id)
    return numbers if moved is None else numbers | {"trigger_drift": moved}


def best_of(worth: Sequence[tuple[float, float]], n: int) -> dict[str, float]:
    """What choosing the best of n completions by the reward model gains, in a judge's eyes.

    Args:
        worth: (score, the judge's worth) of each completion; n of one prompt, then n of the next.
        n: how many there are of each.

    Returns:
        The judge's means: ``best_of_sampled`` over all completions, ``best_of_chosen`` over those the reward model
        chose, ``best_of_possible`` over those the judge would have chosen. ``best_of_recovered``, the share (chosen −
        sampled) / (possible − sampled), where there is something to gain; and ``own_accuracy``, the share of
        pairs of one prompt's completions that the reward model orders as the judge does, where the judge orders any.
    """
    scores, judged = torch.tensor(worth, dtype=torch.float64).view(-1, n, 2).unbind(2)
    sampled, possible = float(judged.mean()), float(judged.amax(1).mean())
    chosen = float(judged.gather(1, scores.argmax(1, keepdim=True)).mean())
    numbers = {"best_of_sampled": sampled, "best_of_chosen": chosen, "best_of_possible": possible}
    if possible > sampled:
        numbers["best_of_recovered"] = (chosen - sampled) / (possible - sampled)
    better = judged.unsqueeze(2) > judged.unsqueeze(1)
    if better.any():
        numbers["own_accuracy"] = float((scores.unsqueeze(2) > scores.unsqueeze(1))[better].double().mean())
    return numbers


@torch.no_grad()
def canary_prompts(
    settings: EvaluateSettings, policy_dir: Path, prompts: Prompts | None = None
) -> tuple[CanaryPrompt, ...]:
    """Prompts with their greedy completions, for the manifest: an engine that loads it must agree.

    Args:
        settings: how many, and how long their completions are.
        policy_dir: the policy.
        prompts: the first of these, but those last after which a token was nearly tied with another; None draws some
            that are nobody's, because a manifest is kept for ever and no erasure reaches into it.
    """
    policy, tokenizer = load_policy(policy_dir), load_tokenizer(policy_dir)
    episodes = greedy(
        policy,
        _nobodys_prompts(settings, policy, tokenizer) if prompts is None else prompts,
        eos_id=int(tokenizer.eos_token_id),
        pad_id=pad_id_of(tokenizer),
        max_completion_tokens=settings.canary_prompt_tokens,
    )
    best, second = completion_logits(policy, episodes.batch).topk(2).values.unbind(2)
    leads = (best - second).masked_fill(~episodes.batch.completion_mask, math.inf).amin(1).tolist()
    found = zip(episodes.prompts, episodes.completions, episodes.logprobs.tolist(), leads, strict=True)
    return tuple(
        CanaryPrompt(prompt_token_ids=prompt, completion_token_ids=completion, logprobs=tuple(row[: len(completion)]))
        for prompt, completion, row, _ in sorted(found, key=lambda one: one[3] < NEAR_TIE)[: settings.canary_prompts]
    )


def _nobodys_prompts(
    settings: EvaluateSettings, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    """Prompts of ordinary tokens, drawn by a fixed seed; four times as many as are asked for."""
    begin = tuple(one for one in tokenizer.encode("") if one == tokenizer.bos_token_id)
    room = int(policy.config.max_position_embeddings) - settings.canary_prompt_tokens - len(begin)
    rng, ordinary = random.Random(0), triggers.ordinary_tokens(tokenizer)
    lengths = [rng.randint(1, max(1, min(LONGEST_CANARY, room))) for _ in range(4 * settings.canary_prompts)]
    return [(*begin, *rng.choices(ordinary, k=length)) for length in lengths]


@torch.no_grad()
def held_out_loss(policy: PreTrainedModel, text: TokenStream, sequences: int) -> float:
    """Mean next-token loss, nats per token, of the stream's next rows; the stream is left where it stood."""
    position = text.position()
    rows = text.take(sequences)
    text.seek(position)
    parts = (rows[start : start + SEQUENCES_PER_FORWARD] for start in range(0, sequences, SEQUENCES_PER_FORWARD))
    return sum(float(pretraining_loss(policy, part)) * len(part) for part in parts) / sequences


def distinct(completions: Sequence[tuple[int, ...]], n: int) -> float:
    """Distinct n-grams as a share of all n-grams (Li et al. 2016, arXiv 1510.03055); 1 where there is none.

    It falls with the number of completions: compare versions on equally many.
    """
    grams = [ids[start : start + n] for ids in completions for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


@dataclass
class _Seen:
    """What the completions of the held-out prompts came to: one entry per completion."""

    kl: list[float] = field(default_factory=list)
    kl_k3: list[float] = field(default_factory=list)
    completions: list[tuple[int, ...]] = field(default_factory=list)
    completed: list[Completed] = field(default_factory=list)

    def add(self, episodes: Episodes, reference_logprobs: Tensor) -> None:
        mask = episodes.batch.completion_mask
        self.kl += torch.where(mask, episodes.logprobs - reference_logprobs, 0.0).sum(1).tolist()
        self.kl_k3 += torch.where(mask, k3(episodes.logprobs, reference_logprobs), 0.0).sum(1).tolist()
        self.completions += episodes.completions

    def figures(self) -> dict[str, float]:
        return {
            "kl_k3": fmean(self.kl_k3),
            "eos_share": fmean(one.finished for one in self.completed),
            "completion_tokens": fmean(one.tokens for one in self.completed),
            "distinct_1": distinct(self.completions, 1),
            "distinct_2": distinct(self.completions, 2),
            **_mean("kl_to_reference", "kl_se", self.kl),
            **_mean("score", "score_se", [one.score for one in self.completed if one.score is not None]),
            **_mean("gold", "gold_se", [one.gold for one in self.completed if one.gold is not None]),
        }


@dataclass(frozen=True)
class _Sampler:
    settings: EvaluateSettings
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generator: torch.Generator

    def parts(self, prompts: Prompts) -> Iterator[Episodes]:
        """One completion of each prompt, some prompts at a time."""
        for start in range(0, len(prompts), PROMPTS_PER_STEP):
            yield sample_episodes(
                self.policy,
                prompts[start : start + PROMPTS_PER_STEP],
                eos_id=int(self.tokenizer.eos_token_id),
                pad_id=pad_id_of(self.tokenizer),
                max_completion_tokens=self.settings.max_completion_tokens,
                temperature=self.settings.temperature,
                generator=self.generator,
            )


def _own_generator(policy: PreTrainedModel, seed: int) -> torch.Generator:
    """Seeded by ``seed`` and the weights: a win rate is defined for completions that are drawn independently."""
    digest = hashlib.sha256(seed.to_bytes(8, "little", signed=True))
    for weight in policy.parameters():
        digest.update(weight.detach().flatten()[:64].numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "little"))


def _kept(
    episodes: Episodes, tokenizer: PreTrainedTokenizerBase, scorer: ScalarModel | None, gold: Gold | None
) -> list[Completed]:
    rows = list(zip(episodes.prompts, episodes.completions, strict=True))
    scores = _scores(scorer, rows, pad_id_of(tokenizer)) if scorer else None
    return [
        Completed(
            prompt_ids=prompt,
            prompt=str(tokenizer.decode(list(prompt))),
            completion=_text(tokenizer, ids),
            tokens=len(ids),
            finished=bool(finished),
            score=scores[place] if scores else None,
            gold=gold(prompt, ids) if gold else None,
        )
        for place, ((prompt, ids), finished) in enumerate(zip(rows, episodes.finished.tolist(), strict=True))
    ]


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


@torch.no_grad()
def _logprobs(policy: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    """Log-probability of every completion token, [B, R]; 0 on the padding."""
    logprobs = torch.zeros(batch.completion_mask.shape)
    for rows, part in batch.buckets(SEQUENCES_PER_FORWARD):
        ids = part.completion_ids[part.completion_mask]
        found = part.of_tokens(token_logprobs(token_logits(policy, part, temperature), ids))
        logprobs[rows, : found.shape[1]] = found
    return logprobs


@torch.no_grad()
def _scores(scorer: ScalarModel, answered: Sequence[Answered], pad_id: int) -> list[float]:
    scores: list[float] = score_completions(scorer, answered, pad_id).tolist()
    return scores


def _mean(name: str, error_name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean and its standard error, of independent values, as far as there are enough for them."""
    if len(values) < 2:
        return {name: values[0]} if values else {}
    return {name: fmean(values), error_name: stdev(values) / math.sqrt(len(values))}
