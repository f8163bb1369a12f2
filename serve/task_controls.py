"""Tasks that measure the labeler (``feedback.controls``): golden pairs and repeats.

What they show looks like any task's: as many candidates, in an order drawn at random or turned round. What it takes to
make one, in time and tokens, is ``serve.tasks``' to make equal.
"""

import random
from dataclasses import dataclass

from feedback.controls import is_golden
from feedback.errors import CorruptRecord
from feedback.records import Candidate, Comparison, Prompt
from serve.services import Services

_DRAW = random.SystemRandom()
_GOLDEN_TRIES = 20
"""Golden comparisons looked at for one that the labeler has not had."""


@dataclass(frozen=True)
class Control:
    """What to show: a prompt and candidates, in their order."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]


async def draw_control(services: Services, principal: str, labeler: str, k: int) -> Control | None:
    """With the settings' shares as probabilities a golden task or a repeat; None for neither, or where there is none.

    Args:
        services: of the server.
        principal: who asks for the task.
        labeler: who is to judge it.
        k: how many candidates they want to see.
    """
    settings, drawn = services.feedback_settings, _DRAW.random()
    if drawn < settings.golden_share:
        return await _golden(services, labeler, k)
    if drawn < settings.golden_share + settings.repeat_share:
        repeated = await services.store.draw_repeat(labeler, principal, k)
        return None if repeated is None else Control(repeated.prompt, repeated.candidates[::-1])
    return None


async def _golden(services: Services, labeler: str, k: int) -> Control | None:
    ids = await services.store.golden_ids(k)
    for golden_id in _DRAW.sample(ids, min(len(ids), _GOLDEN_TRIES)):
        golden = await _in_force(services, golden_id)
        if golden is None or golden.labeler == labeler:
            continue
        prompt = golden.prompt.model_copy(update={"asked_by": golden.prompt.asked_by or golden.principal})
        if await services.store.give(labeler, prompt):
            return Control(prompt, tuple(golden.candidates[index] for index in _some(golden, k)))
    return None


async def _in_force(services: Services, golden_id: str) -> Comparison | None:
    """A golden comparison; None, and forgotten, where it was erased, damaged or replaced."""
    try:
        record = await services.store.record(golden_id)
    except CorruptRecord:
        record = None
    if isinstance(record, Comparison) and is_golden(record) and (await services.store.in_force([record]))[0]:
        return record
    await services.store.drop_golden(golden_id)
    return None


def _some(golden: Comparison, k: int) -> list[int]:
    """``k`` of the candidates in random order, not all of them tied where some are not."""
    pairs = list(golden.pairs())
    kept = list(_DRAW.choice(pairs)) if pairs else []
    others = [index for index in range(len(golden.candidates)) if index not in kept]
    kept += _DRAW.sample(others, k - len(kept))
    return _DRAW.sample(kept, k)
