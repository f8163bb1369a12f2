"""Which prompts ask the same: equal ones, and those that begin alike for long (InstructGPT §3.2).

The paper removes prompts that share a long common prefix: one template, filled in again and again, would otherwise
outweigh everything else. Prompts behind one long system message begin alike, too, and ask different things; so a
prefix counts as long only where it is also most of the longer prompt.
"""

import itertools
from collections.abc import Sequence

_MOST = 0.75
"""Share of the longer prompt that a common prefix must make up; ours."""


def distinct(prompts: Sequence[tuple[int, ...]], min_prefix_tokens: int) -> list[int]:
    """Positions of the prompts to keep, ascending: of those that ask the same, the last.

    Args:
        prompts: in token ids, the newest last.
        min_prefix_tokens: a common prefix that is shorter is no sign of anything; 0 goes by equality alone.
    """
    order = sorted(range(len(prompts)), key=lambda place: (prompts[place], place))
    kept: list[int] = []
    newest: int | None = None
    for place, following in itertools.zip_longest(order, order[1:]):
        # What begins alike stands together once sorted, so neighbours tell where a group ends.
        newest = place if newest is None else max(newest, place)
        if following is None or not _same(prompts[place], prompts[following], min_prefix_tokens):
            kept.append(newest)
            newest = None
    return sorted(kept)


def _same(one: tuple[int, ...], other: tuple[int, ...], min_prefix_tokens: int) -> bool:
    if one == other:
        return True
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return 0 < min_prefix_tokens <= shared and shared >= _MOST * max(len(one), len(other))
