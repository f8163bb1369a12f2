"""Reward model: learn from rankings which completion people prefer (InstructGPT §3.5 and §C.2).

    loss = mean over prompts of  w/|pairs| Σ −log σ(r(x, y_chosen) − r(x, y_rejected))

w is how far the labeler is trusted (``feedback.labelers``), scaled to average 1: the paper's loss where all are equal.
All pairs of a prompt sit in one batch element and each distinct completion is scored once, behind one copy of the
prompt (``train.packing``): as independent pairs they would be visited K−1 times each and overfit within one epoch
(§3.5). The loss knows differences only, so after training the shift is set to make demonstrations score 0 on average
(§C.2).

With several ``heads``, each learns from a bootstrap sample of the comparisons: one counts as often for a head as a
Poisson variable of mean 1 says (Oza and Russell 2001, "Online bagging and boosting", §3).
"""

import dataclasses
import random
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from train.batches import Answered, Demonstrated, RankedPrompt, collate
from train.errors import DatasetUnusable
from train.intervals import share_over_clusters
from train.lora import NO_ADAPTERS, adapt
from train.losses import expected_calibration_error, ranking_loss
from train.models import is_reward_model, load_policy, load_tokenizer, nonfinite_weights, pad_id_of
from train.packing import packed_scores, similar
from train.running.devices import CPU, Device
from train.running.distributed import Ranks
from train.running.optimizer import adamw, cosine_factor, update
from train.running.progress import Progress, silent
from train.scalar_model import ScalarModel, load_reward_model, save_reward_model, scalar_model_from
from train.settings import LoraSettings, RewardModelSettings

TOKENS_PER_BACKWARD = 8192
"""Tokens whose activations are in memory together; a step's prompts are passed over in such parts."""


def run(
    settings: RewardModelSettings,
    init_dir: Path,
    ranked: Sequence[RankedPrompt],
    out: Path,
    *,
    demonstrations: Sequence[Demonstrated],
    held_out: Sequence[RankedPrompt],
    seed: int,
    device: Device = CPU,
    lora: LoraSettings = NO_ADAPTERS,
    progress: Progress = silent,
) -> dict[str, float]:
    """Train a reward model on ``ranked`` and write it to ``out``.

    Args:
        settings: epochs, prompts per step, learning rate, heads.
        init_dir: a policy (its trunk gets fresh heads) or a reward model (training restarts from it; with fresh heads
            where it has another number of them).
        ranked: the comparisons to learn from; those without a pair or without weight are left out and counted.
        out: directory to write; what it holds is overwritten.
        demonstrations: score 0 on average afterwards; where there are none, the completions of ``ranked`` do.
        held_out: comparisons of other prompts or labelers, to measure accuracy on; may be empty.
        seed: of the order, of fresh heads, of their bootstrap samples and of adapters.
        device: to compute on.
        lora: adapters to train, with the heads, in place of all weights.
        progress: called after each step.

    Returns:
        ``loss`` (nats, mean of the last tenth of the steps), ``prompts``, ``prompts_without_pairs``,
        ``prompts_without_weight``, ``pairs``, ``demonstrations``, ``shift`` (mean over heads), ``shares_prompts`` (1
        where completions were scored behind one copy of their prompt), ``nonfinite_weights``, ``seconds``, and those of
        ``measure_pairs`` on held_out, where labelers are seen who were learnt from.

    Raises:
        DatasetUnusable: where no pair is left, or a sequence does not fit the model.
        ModelUnusable: where ``init_dir`` holds no model.
        TrainingDiverged: where a gradient is not finite; nothing is written.
    """
    started = time.monotonic()

    # 1. A trunk with scalar heads.
    ranks, tokenizer = Ranks.current(), load_tokenizer(init_dir)
    pad_id = pad_id_of(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    model = _initial(init_dir, settings.heads, generator)
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

    if device.checkpointed:
        model.shares_prompts = False  # keys and values that are kept for others cannot be computed again
    adapt(model.trunk, lora, seed=seed)
    device.prepare(ranks.shard(model))
    anything = device.place(collate([[pad_id]], [()], pad_id))

    # 2. Every prompt once per epoch, in a new order each time; dropout stays off.
    optimizer = adamw(model, settings.learning_rate)
    counts = bootstrap_counts(len(usable), settings.heads, generator)
    rng, order = random.Random(seed), list(range(len(usable)))
    starts = range(0, len(usable), settings.batch_prompts)
    steps = settings.epochs * len(starts)
    losses: list[float] = []
    for _ in range(settings.epochs):
        rng.shuffle(order)
        for start in starts:
            # 3. Score each distinct completion once; rank all pairs of each prompt. The gradients of parts add up.
            own, share = ranks.share(order[start : start + settings.batch_prompts])
            loss = 0.0
            with ranks.together(model, lambda: model.scores(anything)):
                for part in parts([usable[i] for i in own]):
                    chosen = [own[i] for i in part]
                    pairs = collect_pairs([usable[i] for i in chosen])
                    scores = packed_scores(model, pairs.answered, pad_id)
                    weight = pairs.weight.unsqueeze(1) * counts[chosen]
                    margin = settings.margin * (pairs.apart - 1)
                    of_part = ranking_loss(scores, pairs.chosen, pairs.rejected, pairs.prompt, weight, margin)
                    of_step = of_part * (share * len(part) / len(own))
                    torch.autograd.backward(of_step)
                    loss += float(of_step.detach())

            # 4. One step of AdamW at this step's learning rate.
            factor = cosine_factor(
                len(losses), steps, warmup=settings.warmup_steps, final_fraction=settings.final_lr_fraction
            )
            update(optimizer, model.parameters(), settings.learning_rate * factor, settings.max_grad_norm)
            losses.append(ranks.mean(loss))
            progress("reward_model", len(losses), steps, {"loss": losses[-1]})

    # 5. Demonstrations score 0 on average. Measure.
    with ranks.together(model):
        set_shift(model, demonstrations or collect_pairs(usable).answered, pad_id)
        measured = measure_pairs(model, held_out, pad_id, seen_labelers={prompt.labeler for prompt in usable})

    # 6. Save.
    save_reward_model(model, tokenizer, out)
    return {
        "loss": fmean(losses[-max(1, steps // 10) :]),
        "prompts": len(usable),
        "prompts_without_pairs": len(ranked) - len(paired),
        "prompts_without_weight": len(paired) - len(usable),
        "pairs": sum(len(informative_pairs(prompt)) for prompt in usable),
        "demonstrations": len(demonstrations),
        "shift": float(model.shift.mean()),
        "shares_prompts": float(bool(model.shares_prompts)),
        "nonfinite_weights": nonfinite_weights(model),
        "seconds": time.monotonic() - started,
        **measured,
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
    """The pairs of G prompts over N distinct completions.

    Attributes:
        answered: N prompts with a completion; each once.
        chosen, rejected: [M] positions in ``answered``.
        apart: [M] by how many ranks the two differ in their prompt's ranking, at least 1; ties share a rank.
        prompt: [M] which of the G prompts a pair belongs to.
        weight: [G] of each prompt.
    """

    answered: list[Answered]
    chosen: Tensor
    rejected: Tensor
    apart: Tensor
    prompt: Tensor
    weight: Tensor


def collect_pairs(ranked: Sequence[RankedPrompt]) -> Pairs:
    """The informative pairs of ``ranked``, over its distinct completions."""
    position: dict[Answered, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    for number, prompt in enumerate(ranked):
        wins = Counter(better for better, _ in prompt.pairs)
        rank = {won: place for place, won in enumerate(sorted({wins[i] for i in range(len(prompt.completions))}))}
        for pair in informative_pairs(prompt):
            chosen, rejected = (
                position.setdefault((prompt.prompt_ids, prompt.completions[i]), len(position)) for i in pair
            )
            apart = rank[wins[pair[0]]] - rank[wins[pair[1]]]
            rows.append((chosen, rejected, max(1, apart), number))
    chosen_ids, rejected_ids, apart_by, prompts = torch.tensor(rows).view(-1, 4).unbind(1)
    weight = torch.tensor([prompt.weight for prompt in ranked])
    return Pairs(list(position), chosen_ids, rejected_ids, apart_by, prompts, weight)


def parts(ranked: Sequence[RankedPrompt]) -> list[list[int]]:
    """Positions of ``ranked`` in parts that fit in memory: equal prompts together, lengths in a part similar."""
    of_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, prompt in enumerate(ranked):
        of_prompt[prompt.prompt_ids].append(i)
    sizes = [
        (len(prompt), sum(len(completion) for i in places for completion in ranked[i].completions))
        for prompt, places in of_prompt.items()
    ]
    groups = similar(sizes, lambda count, prompt, rest: count * (prompt + rest) <= TOKENS_PER_BACKWARD)
    together = list(of_prompt.values())
    return [[place for i in group for place in together[i]] for group in groups]


def bootstrap_counts(prompts: int, heads: int, generator: torch.Generator) -> Tensor:
    """How often each prompt's comparison counts for each head, [prompts, heads]; always once for a head alone."""
    ones = torch.ones(prompts, heads)
    return torch.poisson(ones, generator) if heads > 1 else ones


def score_completions(model: ScalarModel, answered: Sequence[Answered], pad_id: int) -> Tensor:
    """Score of each completion behind its prompt at its last token: [N], in the order given.

    Completions of equal prompts share one copy of it, wherever they stand.
    """
    return packed_scores(model, answered, pad_id).mean(1)


@torch.no_grad()
def set_shift(model: ScalarModel, answered: Sequence[Answered], pad_id: int) -> None:
    """Set the model's shift so that the completions (N ≥ 1) score 0 on average, by every head."""
    model.shift += packed_scores(model, answered, pad_id).mean(0).to(model.shift.device)


@torch.no_grad()
def measure_pairs(
    model: ScalarModel,
    held_out: Sequence[RankedPrompt],
    pad_id: int,
    *,
    seen_labelers: Collection[str] | None = None,
) -> dict[str, float]:
    """How well ``model`` predicts comparisons it has not seen; each counts the same, whoever made it.

    Args:
        model: the reward model.
        held_out: the comparisons; those without a pair are left out.
        pad_id: stands on the padding.
        seen_labelers: whose other comparisons it learnt from; None, or a comparison without a name: nobody knows.

    Returns:
        ``held_out_pairs``, and where there is one: ``held_out_accuracy`` (share of pairs whose chosen completion
        scores higher) with its 95 % interval over prompts ``_low`` and ``_high``, ``held_out_loss`` (nats), and
        ``calibration_error`` (0 to 1, ``losses.expected_calibration_error``). With ``seen_labelers``,
        ``held_out_pairs_seen_labelers`` and ``…_new_labelers``, and where there is one ``held_out_accuracy_…`` of them:
        the paper's reward models lose 2.8 points on labelers they have not seen (§4.1).
    """
    usable = [prompt for prompt in held_out if informative_pairs(prompt)]
    if not usable:
        return {"held_out_pairs": 0}
    pairs = collect_pairs(usable)
    scores = score_completions(model, pairs.answered, pad_id)
    lead = scores[pairs.chosen] - scores[pairs.rejected]
    of_pairs = [usable[number] for number in pairs.prompt.tolist()]
    accuracy = share_over_clusters((lead > 0).tolist(), [one.prompt_ids for one in of_pairs])
    even = torch.ones(len(usable), 1)
    loss = ranking_loss(scores.unsqueeze(1), pairs.chosen, pairs.rejected, pairs.prompt, even)
    numbers = {
        **_accuracy(lead, ""),
        "held_out_accuracy_low": accuracy.low,
        "held_out_accuracy_high": accuracy.high,
        "held_out_loss": float(loss),
        "calibration_error": float(expected_calibration_error(lead)),
    }
    if seen_labelers is not None:
        seen = torch.tensor([one.labeler in seen_labelers for one in of_pairs])
        named = torch.tensor([bool(one.labeler) for one in of_pairs])
        numbers |= _accuracy(lead[seen & named], "_seen_labelers") | _accuracy(lead[~seen & named], "_new_labelers")
    return numbers


def _accuracy(lead: Tensor, suffix: str) -> dict[str, float]:
    """Of pairs [M] by how much the chosen completion leads: how many, and the share that does."""
    pairs = {f"held_out_pairs{suffix}": float(len(lead))}
    return pairs | ({f"held_out_accuracy{suffix}": float((lead > 0).double().mean())} if len(lead) else {})


def _initial(init_dir: Path, heads: int, generator: torch.Generator) -> ScalarModel:
    """The model to start from: what ``init_dir`` holds, with fresh heads unless it has as many."""
    if not is_reward_model(init_dir):
        return scalar_model_from(load_policy(init_dir), generator, heads=heads)
    model = load_reward_model(init_dir)
    return model if model.heads == heads else ScalarModel(model.trunk, generator, heads=heads).eval()


def _check_lengths(ranked: Sequence[RankedPrompt], demonstrations: Sequence[Demonstrated], window: int) -> None:
    lengths = [len(prompt.prompt_ids) + max(map(len, prompt.completions)) for prompt in ranked]
    lengths += [len(prompt) + len(completion) for prompt, completion in demonstrations]
    if max(lengths) > window:
        raise DatasetUnusable(
            f"a prompt with its completion has {max(lengths)} tokens, but the reward model reads {window}: drop those"
        )
