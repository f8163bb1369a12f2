"""Scores of several completions of one prompt, with the prompt computed once: exact, and K times less work on prompts.

A completion sees its prompt and itself, never another completion, and its positions go on where the prompt ends. So
the trunk reads each distinct prompt once and keeps its keys and values; every completion is a branch that reads those
and its own. This is a block-sparse attention mask of which the empty blocks are never computed, and gradients flow
through the keys and values into the prompt. Branches of similar length go through the trunk together, whatever their
prompts, so ragged completions cost little padding.

Letters in shapes: N completions, n heads, b branches, P prompt tokens (left-padded), C completion tokens
(right-padded).
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import Cache

from train.batches import TOKENS_PER_FORWARD, TOKENS_PER_FORWARD_ELSEWHERE, Answered, Batch, collate
from train.running.devices import Device, exact
from train.scalar_model import ScalarModel

KEYS_PER_TOKEN = 8
"""A forward's branches read at most this many keys per token of ``TOKENS_PER_FORWARD``; ours: bounds their copies."""
TOLERANCE = 1e-3
"""By how much, relative to the greatest score, scores with a shared prompt may differ from those without; ours: fp32
keeps 1e-5, and a model that sees another completion or a wrong position differs in the first digit."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pack:
    """A prompt, and where its completions (each with at least one token) stand in what is to be scored."""

    prompt: tuple[int, ...]
    rows: list[int]


def packed_scores(model: ScalarModel, answered: Sequence[Answered], pad_id: int) -> Tensor:
    """What each head says at the last token of each completion behind its prompt: [N, n], in the order given.

    A model that cannot continue several completions from one prompt's keys and values is found out by comparison the
    first time, named in the log, and reads every completion with its own copy of the prompt from then on.

    Args:
        model: whose trunk and heads.
        answered: N ≥ 1 prompts with a completion, each together at least one token.
        pad_id: stands on the padding; which id does not matter.
    """
    packs, alone = _packs(answered)
    if packs and model.shares_prompts is None:
        model.shares_prompts = _shares_prompts(model, answered, packs, pad_id)
    if not model.shares_prompts:
        packs, alone = [], list(range(len(answered)))
    rows, found = _plain(model, answered, alone, pad_id)
    longest = _budget(model)
    for group in similar([(len(pack.prompt), 0) for pack in packs], lambda count, width, _: count * width <= longest):
        scored, scores = _behind_prompts(model, answered, [packs[i] for i in group], pad_id)
        rows, found = rows + scored, found + scores
    return torch.cat(found).cpu()[torch.tensor(rows).argsort()]


def similar(sizes: Sequence[tuple[int, int]], fits: Callable[[int, int, int], bool]) -> list[list[int]]:
    """Positions of ``sizes`` in groups of similar size, as large as they may be.

    Args:
        sizes: two lengths of each, by which to order.
        fits: whether a group may be, by its count and the greatest first and second length in it; one alone always may.
    """
    groups: list[list[int]] = []
    first = second = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        first, second = max(first, sizes[i][0]), max(second, sizes[i][1])
        if groups and fits(len(groups[-1]) + 1, first, second):
            groups[-1].append(i)
        else:
            groups.append([i])
            first, second = sizes[i]
    return groups


def _packs(answered: Sequence[Answered]) -> tuple[list[_Pack], list[int]]:
    """The prompts that several completions share, and the rows that gain nothing from sharing."""
    of_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    alone: list[int] = []
    for row, (prompt, completion) in enumerate(answered):
        if prompt and completion:
            of_prompt[prompt].append(row)
        else:
            alone.append(row)
    alone += [rows[0] for rows in of_prompt.values() if len(rows) == 1]
    return [_Pack(prompt, rows) for prompt, rows in of_prompt.items() if len(rows) > 1], alone


def _plain(
    model: ScalarModel, answered: Sequence[Answered], rows: Sequence[int], pad_id: int
) -> tuple[list[int], list[Tensor]]:
    """Scores of ``rows``, each with its own copy of the prompt: the rows as they come, and their scores in parts."""
    whole = [(*answered[row][0], *answered[row][1]) for row in rows]
    longest = _budget(model)
    groups = similar([(len(text), 0) for text in whole], lambda count, width, _: count * width <= longest)
    scores = [model.scores(_collated(model, [whole[i] for i in group], pad_id)) for group in groups]
    return [rows[i] for group in groups for i in group], scores


def _behind_prompts(
    model: ScalarModel, answered: Sequence[Answered], packs: Sequence[_Pack], pad_id: int
) -> tuple[list[int], list[Tensor]]:
    """Scores of the completions in ``packs``, whose prompts are read in one forward; returned as by ``_plain``."""
    prompts = _collated(model, [pack.prompt for pack in packs], pad_id)
    prefix = model.trunk(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        use_cache=True,
    ).past_key_values
    branches = [(number, row) for number, pack in enumerate(packs) for row in pack.rows]
    tokens, keys = _budget(model), KEYS_PER_TOKEN * _budget(model)
    groups = similar(
        [(len(answered[row][1]), 0) for _, row in branches],
        lambda count, width, _: count * width <= tokens and count * (prompts.prompt_length + width) <= keys,
    )
    scores = []
    for group in groups:
        chosen = torch.tensor([branches[i][0] for i in group], device=prompts.input_ids.device)
        completions = [answered[branches[i][1]][1] for i in group]
        scores.append(_branch_scores(model, prefix, prompts.attention_mask, chosen, completions, pad_id))
    return [branches[i][1] for group in groups for i in group], scores


def _branch_scores(
    model: ScalarModel,
    prefix: Cache,
    prompt_mask: Tensor,
    chosen: Tensor,
    completions: Sequence[tuple[int, ...]],
    pad_id: int,
) -> Tensor:
    """Scores [b, n] of ``completions`` behind the prompts ``chosen`` [b] of ``prefix``, whose mask is [B, P]."""
    width = max(map(len, completions))
    lengths = torch.tensor([len(completion) for completion in completions])
    own = (torch.arange(width) < lengths.unsqueeze(1)).long().to(prompt_mask.device)
    ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in completions])
    mask = torch.cat([prompt_mask[chosen], own], 1)
    hidden = model.trunk(
        input_ids=ids.to(prompt_mask.device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1)[:, -width:],
        past_key_values=_of_prompts(prefix, chosen),
        use_cache=True,
    ).last_hidden_state
    return model.numbers(hidden[torch.arange(len(hidden)), lengths - 1])


def _of_prompts(prefix: Cache, chosen: Tensor) -> Cache:
    """Keys and values of the prompts ``chosen`` [b], to be continued without touching ``prefix``."""
    branch = copy.copy(prefix)
    branch.layers = [copy.copy(layer) for layer in prefix.layers]
    for layer in branch.layers:
        layer.keys, layer.values = _rows(layer.keys, chosen), _rows(layer.values, chosen)
    return branch


def _rows(x: Tensor, chosen: Tensor) -> Tensor:
    """``x[chosen]`` as an embedding look-up: on a CPU the backward of an index takes a tenth of the whole step."""
    return embedding(chosen, x.flatten(1)).view(-1, *x.shape[1:])


@torch.no_grad()
def _shares_prompts(model: ScalarModel, answered: Sequence[Answered], packs: Sequence[_Pack], pad_id: int) -> bool:
    """Whether the longest and the shortest prompt's completions score the same with and without sharing."""
    ordered = sorted(packs, key=lambda pack: len(pack.prompt))
    trial = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    name = f"{type(model.trunk).__name__} ({model.trunk.config.model_type})"
    with exact(model):
        plain_rows, plain = _plain(model, answered, [row for pack in trial for row in pack.rows], pad_id)
        try:
            rows, shared = _behind_prompts(model, answered, trial, pad_id)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            _log.warning("%s keeps no keys and values to share: %s; each completion reads its prompt anew", name, error)
            return False
        expected = torch.cat(plain)[torch.tensor(plain_rows).argsort()]
        gap = float((torch.cat(shared)[torch.tensor(rows).argsort()] - expected).abs().max())
    if not gap <= TOLERANCE * float(expected.abs().max()):
        _log.warning(
            "%s scores differ by %.2g behind a shared prompt; each completion reads its prompt anew", name, gap
        )
        return False
    return True


def _collated(model: ScalarModel, texts: Sequence[tuple[int, ...]], pad_id: int) -> Batch:
    return Device(model.head.weight.device).place(collate(texts, [()] * len(texts), pad_id))


def _budget(model: ScalarModel) -> int:
    """Tokens that should go through the trunk together on the device it is on."""
    return TOKENS_PER_FORWARD.get(model.head.weight.device.type, TOKENS_PER_FORWARD_ELSEWHERE)
