"""Reward model: learn from rankings which completion people prefer (InstructGPT §3.5 and §C.2).

    loss = mean over prompts of  w/|pairs| Σ −log σ(r(x, y_chosen) − r(x, y_rejected))

w is how far the labeler is trusted (``feedback.labelers``), scaled to average 1: the paper's loss where all are equal.
All pairs of a prompt sit in one batch element and each distinct completion is scored once: as independent
pairs they would be visited K−1 times each and overfit within one epoch (§3.5). The loss knows differences
only, so after training the shift is set to make demonstrations score 0 on average (§C.2).
"""

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from feedback.preference import wilson
from train.batches import Demonstrated, RankedPrompt, collate, length_buckets
from train.errors import DatasetUnusable
from train.losses import ranking_loss
from train.models import is_reward_model, load_policy, load_tokenizer, nonfinite_weights, pad_id_of
from train.optimizer import adamw, cosine_factor, update
from train.progress import Progress, silent
from train.scalar_model import ScalarModel, load_reward_model, save_reward_model, scalar_model_from
from train.settings import RewardModelSettings

SEQUENCES_PER_FORWARD = 32
"""Sequences of similar length that go through the trunk together; more means more padding."""


def run(
    settings: RewardModelSettings,
    init_dir: Path,
    ranked: Sequence[RankedPrompt],
    out: Path,
    *,
    demonstrations: Sequence[Demonstrated],
    held_out: Sequence[RankedPrompt],
    seed: int,
    progress: Progress = silent,
) -> dict[str, float]:
    """Train a reward model on ``ranked`` and write it to ``out``.

    Args:
        settings: epochs, prompts per step, learning rate.
        init_dir: a policy (its trunk gets a fresh head) or a reward model (training restarts from it).
        ranked: the comparisons to learn from; those without a pair or without weight are left out and counted.
        out: directory to write; what it holds is overwritten.
        demonstrations: score 0 on average afterwards; where there are none, the completions of ``ranked`` do.
        held_out: comparisons of other prompts or labelers, to measure accuracy on; may be empty.
        seed: of the order and of a fresh head.
        progress: called after each step.

    Returns:
        ``loss`` (nats, mean of the last tenth of the steps), ``prompts``, ``prompts_without_pairs``,
        ``prompts_without_weight``, ``pairs``, ``demonstrations``, ``shift``, ``nonfinite_weights``, ``seconds``, and of
        ``measure_pairs`` on held_out.

    Raises:
        DatasetUnusable: where no pair is left, or a sequence does not fit the model.
        ModelUnusable: where ``init_dir`` holds no model.
        TrainingDiverged: where a gradient is not finite; nothing is written.
    """
    started = time.monotonic()

    # 1. A trunk with a scalar head.
    tokenizer = load_tokenizer(init_dir)
    pad_id = pad_id_of(tokenizer)
    if is_reward_model(init_dir):
        model = load_reward_model(init_dir)
    else:
        model = scalar_model_from(load_policy(init_dir), torch.Generator().manual_seed(seed))
    paired = [prompt for prompt in ranked if informative_pairs(prompt)]
    if not paired:
        raise DatasetUnusable(f"none of {len(ranked)} comparisons prefers one completion to a different one")
    usable = with_mean_weight_1([prompt for prompt in paired if prompt.weight > 0])
    if not usable:
        raise DatasetUnusable(
            f"all of {len(paired)} comparisons are by labelers who guess or invert: see GET /v1/feedback/summary, or "
            "turn worker.labeler_weights off"
        )
    _check_lengths([*ranked, *held_out], demonstrations, int(model.trunk.config.max_position_embeddings))

    # 2. Every prompt once per epoch, in a new order each time; dropout stays off.
    optimizer = adamw(model, settings.learning_rate)
    rng = random.Random(seed)
    starts = range(0, len(usable), settings.batch_prompts)
    steps = settings.epochs * len(starts)
    losses: list[float] = []
    for _ in range(settings.epochs):
        rng.shuffle(usable)
        for start in starts:
            # 3. Score each distinct completion once; rank all pairs of each prompt.
            pairs = collect_pairs(usable[start : start + settings.batch_prompts])
            scores = score_sequences(model, pairs.sequences, pad_id)
            loss = ranking_loss(scores, pairs.chosen, pairs.rejected, pairs.prompt, pairs.weight)
            torch.autograd.backward(loss)

            # 4. One step of AdamW at this step's learning rate.
            factor = cosine_factor(
                len(losses), steps, warmup=settings.warmup_steps, final_fraction=settings.final_lr_fraction
            )
            update(optimizer, model.parameters(), settings.learning_rate * factor, settings.max_grad_norm)
            losses.append(float(loss.detach()))
            progress("reward_model", len(losses), steps, {"loss": losses[-1]})

    # 5. Demonstrations score 0 on average.
    anchors = [(*prompt, *completion) for prompt, completion in demonstrations]
    set_shift(model, anchors or collect_pairs(usable).sequences, pad_id)

    # 6. Measure and save.
    save_reward_model(model, tokenizer, out)
    return {
        "loss": fmean(losses[-max(1, steps // 10) :]),
        "prompts": len(usable),
        "prompts_without_pairs": len(ranked) - len(paired),
        "prompts_without_weight": len(paired) - len(usable),
        "pairs": sum(len(informative_pairs(prompt)) for prompt in usable),
        "demonstrations": len(demonstrations),
        "shift": float(model.shift),
        "nonfinite_weights": nonfinite_weights(model),
        "seconds": time.monotonic() - started,
        **measure_pairs(model, held_out, pad_id),
    }


def informative_pairs(ranked: RankedPrompt) -> list[tuple[int, int]]:
    """The (chosen, rejected) pairs whose completions differ: a preference between equal texts teaches nothing."""
    return [(i, j) for i, j in ranked.pairs if ranked.completions[i] != ranked.completions[j]]


def with_mean_weight_1(ranked: Sequence[RankedPrompt]) -> list[RankedPrompt]:
    """The same, with weights in proportion (all above 0) that average 1, so that the learning rate means the same."""
    if not ranked:
        return []
    mean = fmean(prompt.weight for prompt in ranked)
    return [dataclasses.replace(prompt, weight=prompt.weight / mean) for prompt in ranked]


@dataclass(frozen=True)
class Pairs:
    """The pairs of G prompts over N distinct sequences.

    Attributes:
        sequences: N prompts with a completion, in token ids; each once.
        chosen, rejected: [M] positions in ``sequences``.
        prompt: [M] which of the G prompts a pair belongs to.
        weight: [G] of each prompt.
    """

    sequences: list[tuple[int, ...]]
    chosen: Tensor
    rejected: Tensor
    prompt: Tensor
    weight: Tensor


def collect_pairs(ranked: Sequence[RankedPrompt]) -> Pairs:
    """The informative pairs of ``ranked``, over its distinct sequences."""
    position: dict[tuple[int, ...], int] = {}
    rows: list[tuple[int, int, int]] = []
    for number, prompt in enumerate(ranked):
        sequences = [(*prompt.prompt_ids, *completion) for completion in prompt.completions]
        for pair in informative_pairs(prompt):
            chosen, rejected = (position.setdefault(sequences[i], len(position)) for i in pair)
            rows.append((chosen, rejected, number))
    chosen_ids, rejected_ids, prompts = torch.tensor(rows).view(-1, 3).unbind(1)
    weight = torch.tensor([prompt.weight for prompt in ranked])
    return Pairs(list(position), chosen_ids, rejected_ids, prompts, weight)


def score_sequences(model: ScalarModel, sequences: Sequence[tuple[int, ...]], pad_id: int) -> Tensor:
    """Score of each sequence (prompt and completion, token ids) at its last token: [N], in the order given."""
    groups = length_buckets([len(sequence) for sequence in sequences], SEQUENCES_PER_FORWARD)
    scores = [model.score(collate([sequences[i] for i in group], [()] * len(group), pad_id)) for group in groups]
    order = torch.tensor([i for group in groups for i in group])
    return torch.cat(scores)[order.argsort()]


@torch.no_grad()
def set_shift(model: ScalarModel, sequences: Sequence[tuple[int, ...]], pad_id: int) -> None:
    """Set the model's shift so that ``sequences`` (N ≥ 1) score 0 on average."""
    model.shift += score_sequences(model, sequences, pad_id).mean()


@torch.no_grad()
def measure_pairs(model: ScalarModel, held_out: Sequence[RankedPrompt], pad_id: int) -> dict[str, float]:
    """How well ``model`` predicts comparisons it has not seen; each counts the same, whoever made it.

    Returns:
        ``held_out_pairs``, and where there is one: ``held_out_accuracy`` (share of pairs whose chosen completion
        scores higher) with its 95 % Wilson interval ``_low`` and ``_high``, and ``held_out_loss`` (nats). The interval
        takes pairs as independent; those of one prompt are not quite, so it is a little too narrow.
    """
    usable = [prompt for prompt in held_out if informative_pairs(prompt)]
    if not usable:
        return {"held_out_pairs": 0}
    pairs = collect_pairs(usable)
    scores = score_sequences(model, pairs.sequences, pad_id)
    correct = int((scores[pairs.chosen] > scores[pairs.rejected]).sum())
    low, high = wilson(correct, len(pairs.chosen))
    return {
        "held_out_pairs": len(pairs.chosen),
        "held_out_accuracy": correct / len(pairs.chosen),
        "held_out_accuracy_low": low,
        "held_out_accuracy_high": high,
        "held_out_loss": float(
            ranking_loss(scores, pairs.chosen, pairs.rejected, pairs.prompt, torch.ones(len(usable)))
        ),
    }


def _check_lengths(ranked: Sequence[RankedPrompt], demonstrations: Sequence[Demonstrated], window: int) -> None:
    lengths = [len(prompt.prompt_ids) + max(map(len, prompt.completions)) for prompt in ranked]
    lengths += [len(prompt) + len(completion) for prompt, completion in demonstrations]
    if max(lengths) > window:
        raise DatasetUnusable(
            f"a prompt with its completion has {max(lengths)} tokens, but the reward model reads {window}: drop those"
        )
