"""Comparisons between completions of one policy version: where its reward model is most needed, and most doubtful."""

from collections.abc import Iterable

from feedback.controls import in_force
from feedback.records import Comparison
from feedback.store import LogEntry
from train.batches import RankedPrompt
from train.encoding import Encoder, Unencodable
from train.rounds.datasets import Dataset


def among_held_out(entries: Iterable[LogEntry], dataset: Dataset, version: int, encoder: Encoder) -> list[RankedPrompt]:
    """``comparisons_among`` of a log, of the prompts alone that ``dataset`` holds out."""
    held_out = {one.ranked.group for one in dataset.held_out}
    found = in_force(entry.record for entry in entries if isinstance(entry.record, Comparison)).ordinary
    return comparisons_among((one for one in found if one.prompt.key() in held_out), version, encoder)


def comparisons_among(comparisons: Iterable[Comparison], version: int, encoder: Encoder) -> list[RankedPrompt]:
    """What labelers said of two or more completions that ``version`` sampled for one prompt, and of those alone.

    Args:
        comparisons: those in force.
        version: the policy version.
        encoder: of its tokenizer; what it cannot encode is left out.
    """
    found = []
    for one in comparisons:
        own = [place for place, candidate in enumerate(one.candidates) if candidate.policy_version == version]
        if len(own) < 2:
            continue
        number = {place: new for new, place in enumerate(own)}
        try:
            prompt_ids = encoder.prompt(one.prompt)
            completions = tuple(encoder.candidate(one.prompt, one.candidates[place]) for place in own)
            encoder.check_fits(prompt_ids, *completions)
        except Unencodable:
            continue
        pairs = tuple((number[i], number[j]) for i, j in one.pairs() if i in number and j in number)
        found.append(RankedPrompt(prompt_ids, completions, pairs, labeler=one.labeler, group=one.prompt.key()))
    return found
