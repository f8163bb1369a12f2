"""What a policy is worth in the tiny world, by the hidden gold utility on held-out prompts.

A sample set is one completion of each of the N tasks. Win rates compare all pairs of several sample sets a side: with a
single set each, a policy against itself strays ±.016 from one half.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.intervals import mean_over_clusters
from train.sampling import sample_episodes
from train.tinyworld import gold, tasks
from train.tinyworld.tasks import Capital, Task
from train.tinyworld.tokenizer import decode_completion, encode_prompt
from train.tinyworld.words import KNOWN_CAPITALS

_TEST_SEED = "test prompts"
"""The test is the same whatever the seed of a study, so that studies can be compared."""


@dataclass(frozen=True)
class Sample:
    """One completion: its text, and whether it ended by itself."""

    text: str
    finished: bool


FIGURES = (
    "gold",
    *(f"gold_{name}" for name in tasks.TASK_NAMES),
    "toxic",
    "false_claims",
    "answered_known",
    "refused_known",
    "refused_unknown",
    "unfinished",
    "words",
)
"""What ``quality`` measures, in the order to read it."""

SampleSet = Sequence[Sample]
"""[N] one completion per task."""


@dataclass(frozen=True)
class WinRate:
    """How often version A is better than B by gold utility, ties counting half.

    Attributes:
        mean: over N tasks and all pairs of sample sets.
        low: lower end of the 95 % interval.
        high: upper end of it.
        by_task: mean for each kind of task.
    """

    mean: float
    low: float
    high: float
    by_task: dict[str, float]


def held_out_tasks(count: int) -> list[Task]:
    """``count`` test tasks, always the same, in the mix of kinds that training has; some occur more than once."""
    rng = random.Random(_TEST_SEED)
    return [tasks.draw(rng, test=True) for _ in range(count)]


def unasked_tasks(count: int) -> list[Task]:
    """``count`` questions about lands that training never asks about, always the same."""
    rng = random.Random(_TEST_SEED)
    return [tasks.draw_unasked(rng) for _ in range(count)]


def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Task],
    *,
    max_completion_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> list[Sample]:
    """One sample set of ``policy`` for the N tasks ``asked``; the same for the same seed."""
    episodes = sample_episodes(
        policy,
        [encode_prompt(tokenizer, task.instruction) for task in asked],
        eos_id=int(tokenizer.eos_token_id),
        pad_id=int(tokenizer.pad_token_id),
        max_completion_tokens=max_completion_tokens,
        generator=torch.Generator().manual_seed(seed),
        temperature=temperature,
    )
    return [Sample(*decode_completion(tokenizer, completion)) for completion in episodes.completions]


def win_rate(asked: Sequence[Task], ours: Sequence[SampleSet], theirs: Sequence[SampleSet]) -> WinRate:
    """Win rate of the sample sets ``ours`` over ``theirs``, all pairs.

    The 95 % interval is over prompts: all draws of one are resampled together.
    """
    wins = _wins(_utilities(asked, ours), _utilities(asked, theirs))
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    for task, win in zip(asked, wins, strict=True):
        kinds[task.name].append(win)
    rate = mean_over_clusters(wins, [task.instruction for task in asked])
    return WinRate(rate.value, rate.low, rate.high, {name: fmean(values) for name, values in sorted(kinds.items())})


def quality(asked: Sequence[Task], sets: Sequence[SampleSet]) -> dict[str, float]:
    """Mean gold utility, in all and per kind of task, and the rates of what must not happen.

    Returns:
        In the order of ``FIGURES``: ``gold``, ``gold_<kind>``; of all completions the share ``toxic`` and
        ``unfinished``, and the mean number of ``words``; of capital questions the share of ``false_claims``; of those
        the web text answers ``answered_known`` and ``refused_known``, of the others ``refused_unknown``. Figures of
        which there is no instance are left out.
    """
    seen: defaultdict[str, list[float]] = defaultdict(list)
    for samples in sets:
        for task, one in zip(asked, samples, strict=True):
            worth = gold.utility(task, one.text, one.finished).total
            seen["gold"].append(worth)
            seen[f"gold_{task.name}"].append(worth)
            seen["toxic"].append(bool(gold.toxic_words(one.text)))
            seen["unfinished"].append(not one.finished)
            seen["words"].append(len(one.text.split()))
            if not isinstance(task, Capital):
                continue
            seen["false_claims"].append(gold.false_claim(task, one.text))
            if task.land in KNOWN_CAPITALS:
                seen["answered_known"].append(gold.answered_known(task, one.text))
                seen["refused_known"].append(gold.refused(one.text))
            else:
                seen["refused_unknown"].append(gold.refused(one.text))
    return {name: fmean(seen[name]) for name in FIGURES if name in seen}


def _utilities(asked: Sequence[Task], sets: Sequence[SampleSet]) -> list[list[float]]:
    """Gold utility [N, sets] of every sample set."""
    return [
        [gold.utility(task, one.text, one.finished).total for one in completions]
        for task, *completions in zip(asked, *sets, strict=True)
    ]


def _wins(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """Share [N] of the pairs that ours wins, for each task; a tie is half a win."""
    return [
        fmean((a > b) + 0.5 * (a == b) for a in mine for b in other) for mine, other in zip(ours, theirs, strict=True)
    ]
