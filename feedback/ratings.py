"""From ratings of single completions to pairs of completions, of which one was rated better.

Ratings measure versions; what comes out here trains a reward model only where a setting says so. InstructGPT ranks
completions beside rating them (§3.4) and trains on the rankings: a scale is used differently by every labeler, and by
one labeler from day to day, so only ratings of one prompt by one labeler are held against each other.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from feedback.records import Candidate, Prompt, Rating

_THUMBS = {"down": 0, "up": 1}


@dataclass(frozen=True)
class RatedPair:
    """Two completions of one prompt that one labeler rated differently."""

    principal: str
    labeler: str
    prompt: Prompt
    chosen: Candidate
    rejected: Candidate
    difference: int
    """Of the overall ratings, 1 to 6; 1 for thumbs."""


def ratings_in_force(ratings: Iterable[Rating]) -> list[Rating]:
    """The ratings that no later one of the same labeler and choice replaces, in order.

    Args:
        ratings: in log order.
    """
    latest: dict[str, Rating] = {}
    for rating in ratings:
        latest.pop(rating.choice_key(), None)
        latest[rating.choice_key()] = rating
    return list(latest.values())


def rated_pairs(ratings: Iterable[Rating]) -> Iterator[RatedPair]:
    """Each two completions of one prompt that the same labeler rated differently; thumbs and the scale do not mix.

    Args:
        ratings: in log order; of several ratings of one choice by one labeler the last counts.
    """
    groups: defaultdict[tuple[str, str, str, bool], list[Rating]] = defaultdict(list)
    for rating in ratings_in_force(ratings):
        groups[rating.principal, rating.labeler, rating.prompt.key(), rating.thumb is None].append(rating)
    for group in groups.values():
        for one, other in itertools.combinations(group, 2):
            better, worse = (one, other) if _value(one) > _value(other) else (other, one)
            if difference := _value(better) - _value(worse):
                yield RatedPair(
                    better.principal, better.labeler, better.prompt, better.candidate, worse.candidate, difference
                )


def _value(rating: Rating) -> int:
    if rating.thumb is not None:
        return _THUMBS[rating.thumb]
    assert rating.overall is not None
    return rating.overall
