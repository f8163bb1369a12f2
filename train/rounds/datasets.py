"""From the feedback log to token ids: which comparisons count, for training or for measuring, and as what.

A comparison counts where no later one by the same labeler replaces it, as much as its labeler is trusted; where
principals share a log, none may dominate it; and what is measured on is never trained on, nor is what measures
labelers (``feedback.controls``). Prompts with personal data in them are not trained on. All of it is a function
of the log up to a cursor, the stored prompts and the settings; ``train.rounds.frozen`` keeps it as it was.
"""

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from feedback.controls import InForce, in_force
from feedback.labelers import PRIOR_WEIGHT, assess, golden_answers, weights
from feedback.records import Comparison, Demonstration, PooledPrompt
from feedback.removal import position
from feedback.store import LogEntry
from train.batches import Demonstrated, RankedPrompt
from train.encoding import Encoder, Unencodable
from train.errors import DatasetUnusable
from train.rounds.distinct import distinct
from train.rounds.personal_data import holds_personal_data
from train.settings import WorkerSettings

_Given = tuple[str, Comparison | Demonstration]
"""A judgement of completions, and its place in the log."""

MAX_TASKS = 20
"""Tasks whose numbers are reported apart; who gives feedback may name any."""


@dataclass(frozen=True)
class Judged:
    """A comparison in token ids, with its place in the log.

    Attributes:
        stream_id: where it stands in the log.
        principals: who gave it; and who asked its prompt, where that was another.
        ranked: what it says.
        task: the task its prompt belongs to, by the ``task`` in its metadata; "" where nobody said.
    """

    stream_id: str
    principals: tuple[str, ...]
    ranked: RankedPrompt
    task: str = ""

    @property
    def principal(self) -> str:
        """Who gave it."""
        return self.principals[0]

    def weighted(self, weight: float) -> "Judged":
        """The same, by a labeler who is trusted so far."""
        return replace(self, ranked=replace(self.ranked, weight=weight))


@dataclass(frozen=True)
class Written:
    """A demonstration in token ids, with the principals who gave it and asked its prompt."""

    principals: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A prompt to complete, in token ids, with the principals it came from (see ``Judged`` for its task)."""

    principals: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    task: str = ""


@dataclass(frozen=True)
class Dataset:
    """What a round learns from and is measured on.

    Attributes:
        training: comparisons to learn from, in log order.
        held_out: comparisons of other principals (or, with few principals, other prompts) to measure on.
        anchors: operators' own comparisons with a known answer (``feedback.controls``); every reward model is measured
            on them, none learns from them.
        demonstrations: labelers' completions; they set the reward model's zero.
        prompts: prompts PPO samples completions for, distinct unless the settings keep repeated ones.
        held_out_prompts: distinct prompts a version is measured on; none is in ``prompts``.
        counts: what was left out and why, and how many labelers are trusted less than one nothing is known of.
    """

    training: tuple[Judged, ...]
    held_out: tuple[Judged, ...]
    anchors: tuple[Judged, ...]
    demonstrations: tuple[Written, ...]
    prompts: tuple[Asked, ...]
    held_out_prompts: tuple[Asked, ...]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def held_out_ranked(self) -> list[RankedPrompt]:
        """The comparisons to measure on, without where they came from."""
        return [one.ranked for one in self.held_out]

    @property
    def anchors_ranked(self) -> list[RankedPrompt]:
        """The comparisons whose answer is known, without where they came from."""
        return [one.ranked for one in self.anchors]

    @property
    def demonstrated(self) -> list[Demonstrated]:
        """The demonstrations as the stages take them."""
        return [(one.prompt_ids, one.completion) for one in self.demonstrations]

    @property
    def prompt_ids(self) -> list[tuple[int, ...]]:
        """The prompts PPO samples completions for."""
        return [one.prompt_ids for one in self.prompts]

    @property
    def prompt_tasks(self) -> list[str] | None:
        """The task of each prompt: one of the ``MAX_TASKS`` most frequent, or "other"; None where nobody named any."""
        named = Counter(one.task for one in self.prompts if one.task)
        frequent = {task for task, _ in named.most_common(MAX_TASKS)}
        return [one.task if one.task in frequent else "other" for one in self.prompts] if named else None

    @property
    def held_out_prompt_ids(self) -> list[tuple[int, ...]]:
        """The prompts a version is measured on."""
        return [one.prompt_ids for one in self.held_out_prompts]


def build(
    entries: Sequence[LogEntry], pool: Sequence[PooledPrompt], encoder: Encoder, settings: WorkerSettings
) -> Dataset:
    """The dataset of a log up to some cursor.

    Args:
        entries: the log's records in order.
        pool: further stored prompts PPO may use, newest first.
        encoder: of the policy that is to be trained.
        settings: cap, split, weights, prompts per principal.

    Raises:
        DatasetUnusable: There is no pair to learn from, or none to measure on.
    """
    counts: Counter[str] = Counter()
    given = [(entry.stream_id, entry.record) for entry in entries if isinstance(entry.record, Comparison)]
    placed = {record.id: stream_id for stream_id, record in given}
    found = in_force(record for _, record in given)
    compared = [(placed[one.id], one) for one in found.ordinary]
    counts["golden"], counts["repeats"] = len(found.golden) + len(found.checks), len(found.repeats)
    counts["superseded"] = len(given) - len(compared) - counts["golden"] - counts["repeats"]
    trust = _trust(found, counts) if settings.labeler_weights else None
    kept = _within_cap(compared, entries, settings, counts)
    judged = list(_encoded([one for one in compared if one[0] in kept], encoder, counts))
    demonstrations, corrections = _demonstrated(entries, encoder, counts)
    judged += [one for one in corrections if one.stream_id in kept]
    judged.sort(key=lambda one: position(one.stream_id))
    if trust is not None:
        judged = [one.weighted(trust.get(one.ranked.labeler, PRIOR_WEIGHT)) for one in judged]
    training, held_out = split(judged, settings.held_out_fraction)
    if settings.leave_out_personal_data:
        training = list(_without_personal_data(training, encoder, counts))
    if not any(one.ranked.pairs for one in training) or not any(one.ranked.pairs for one in held_out):
        raise DatasetUnusable(
            f"{len(training)} comparisons to learn from and {len(held_out)} to measure on hold no pairs enough: "
            "more are needed, of several prompts"
        )
    measured_on = {one.ranked.group for one in held_out}
    known = measured_on | {one.ranked.group for one in training}
    asked = [Asked(one.principals, one.ranked.prompt_ids, one.task) for one in training]
    stored = _pooled(reversed(pool), encoder, known, settings.held_out_fraction, counts)
    asked += _without_personal_data(stored, encoder, counts) if settings.leave_out_personal_data else stored
    prompts = ppo_prompts(asked, settings)
    to_measure = {one.ranked.prompt_ids: Asked(one.principals, one.ranked.prompt_ids, one.task) for one in held_out}
    return Dataset(
        training=tuple(training),
        held_out=tuple(held_out),
        anchors=tuple(_encoded([(placed[one.id], one) for one in found.golden], encoder, counts)),
        demonstrations=tuple(demonstrations),
        prompts=tuple(one for one in prompts if encoder.leaves_room(one.prompt_ids)),
        held_out_prompts=tuple(one for one in to_measure.values() if encoder.leaves_room(one.prompt_ids)),
        counts=dict(counts),
    )


def _trust(found: InForce, counts: Counter[str]) -> dict[str, float]:
    """Training weight of each labeler, 0 to 1, by all that measures them."""
    judged = [*found.ordinary, *found.checks]
    trust = weights(assess(judged, golden=golden_answers(found.golden), repeats=found.repeats))
    # Whom nobody checks has the prior's weight but for rounding.
    counts["labelers"] = len(trust)
    counts["labelers_trusted_less"] = sum(weight < PRIOR_WEIGHT - 1e-6 for weight in trust.values())
    counts["labelers_not_trusted"] = sum(weight == 0 for weight in trust.values())
    counts["comparisons_trusted_less"] = sum(trust[one.labeler] < PRIOR_WEIGHT - 1e-6 for one in found.ordinary)
    counts["comparisons_not_trusted"] = sum(trust[one.labeler] == 0 for one in found.ordinary)
    return trust


def _within_cap(
    compared: Sequence[_Given], entries: Iterable[LogEntry], settings: WorkerSettings, counts: Counter[str]
) -> set[str]:
    """Stream ids of what is left of comparisons, and of demonstrations that correct something, by the cap."""
    given = [*compared]
    for entry in entries:
        if isinstance(entry.record, Demonstration) and entry.record.corrects:
            given.append((entry.stream_id, entry.record))
    limits = settings.max_principal_share, settings.min_comparisons_for_cap
    kept = capped(given, *limits)
    counts["over_cap"] = len(given) - len(kept)
    counts["largest_principal"] = max(Counter(record.principal for _, record in kept).values(), default=0)
    counts["principal_allowance"] = allowance(Counter(record.principal for _, record in given), *limits)
    return {stream_id for stream_id, _ in kept}


def capped(compared: Sequence[_Given], max_share: float, min_comparisons: int) -> list[_Given]:
    """At most the ``allowance`` of comparisons from any one principal.

    What is kept of a capped principal is chosen by the records' own random ids: of all times, and the same every round.
    """
    of_principal = Counter(record.principal for _, record in compared)
    left = Counter(dict.fromkeys(of_principal, allowance(of_principal, max_share, min_comparisons)))
    kept: set[str] = set()
    for _, record in sorted(compared, key=lambda one: hashlib.sha256(one[1].id.encode()).digest()):
        if left[record.principal] > 0:
            left[record.principal] -= 1
            kept.add(record.id)
    return [(stream_id, record) for stream_id, record in compared if record.id in kept]


def allowance(of_principal: Counter[str], max_share: float, min_comparisons: int) -> int:
    """How many comparisons one principal may have: ``max_share`` of all, or an equal share where principals are few.

    It is raised as far as needed to keep ``min_comparisons``, so that a small log is used whole.
    """
    if (total := of_principal.total()) <= min_comparisons:
        return total
    allowed = max(1, int(max_share * total), math.ceil(total / len(of_principal)))
    while sum(min(count, allowed) for count in of_principal.values()) < min_comparisons:
        allowed += 1
    return allowed


def split(judged: Sequence[Judged], held_out_fraction: float) -> tuple[list[Judged], list[Judged]]:
    """What to learn from and what to measure on.

    By principal (InstructGPT §3.2) where there are enough for the fraction to hold one, and that leaves pairs to
    measure on; else by prompt. Which side one falls on depends on nothing but its name, so it is the same in every
    round. A prompt that is learnt from is not measured on, whoever judged it.
    """
    principals = {one.principal for one in judged}
    if len(principals) * held_out_fraction >= 1:
        training = [one for one in judged if not _falls_below(one.principal, held_out_fraction)]
        learnt = {one.ranked.group for one in training}
        others = [one for one in judged if _falls_below(one.principal, held_out_fraction)]
        held_out = [one for one in others if one.ranked.group not in learnt]
        if any(one.ranked.pairs for one in held_out):
            return training, held_out
    held_out = [one for one in judged if _falls_below(one.ranked.group, held_out_fraction)]
    return [one for one in judged if not _falls_below(one.ranked.group, held_out_fraction)], held_out


def _falls_below(name: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64


def with_replay(training: Sequence[Judged], first_cursor: str, seed: int) -> list[RankedPrompt]:
    """What a refit learns from: every comparison after the first reward model's, and as many of those before.

    The first ones, of diverse completions, keep the reward model from forgetting what the policy no longer
    does; in trials, fresh comparisons alone lost ground every round.
    """
    fresh = [one.ranked for one in training if position(one.stream_id) > position(first_cursor)]
    diverse = [one.ranked for one in training if position(one.stream_id) <= position(first_cursor)]
    return fresh + random.Random(seed).sample(diverse, min(len(fresh), len(diverse)))


def ppo_prompts(asked: Sequence[Asked], settings: WorkerSettings) -> list[Asked]:
    """Distinct prompts; where several principals asked, the newest of each up to the limit (InstructGPT §3.2).

    Where they need not be distinct, a prompt that was asked twice counts twice: the mix is that of the asking.

    Args:
        asked: what was asked, the newest last.
        settings: ``max_prompts_per_principal``, ``distinct_prompts`` and ``shared_prefix_tokens``.
    """
    by_principal: defaultdict[str, list[Asked]] = defaultdict(list)
    for one in asked:
        by_principal[one.principals[-1]].append(one)  # who asked it, whoever judged the completions
    if settings.distinct_prompts:
        by_principal.update({who: _distinct(prompts, settings) for who, prompts in by_principal.items()})
    most = settings.max_prompts_per_principal if len(by_principal) > 1 else len(asked)
    kept = [one for prompts in by_principal.values() for one in prompts[-most:]]
    return _distinct(kept, settings) if settings.distinct_prompts else kept


def _distinct(asked: Sequence[Asked], settings: WorkerSettings) -> list[Asked]:
    """Of prompts that ask the same the last."""
    return [asked[i] for i in distinct([one.prompt_ids for one in asked], settings.shared_prefix_tokens)]


def _encoded(compared: Iterable[tuple[str, Comparison]], encoder: Encoder, counts: Counter[str]) -> Iterable[Judged]:
    for stream_id, record in compared:
        try:
            prompt_ids = encoder.prompt(record.prompt)
            completions = tuple(encoder.candidate(record.prompt, candidate) for candidate in record.candidates)
            encoder.check_fits(prompt_ids, *completions)
        except Unencodable:
            counts["unencodable"] += 1
            continue
        ranked = RankedPrompt(
            prompt_ids, completions, tuple(record.pairs()), labeler=record.labeler, group=record.prompt.key()
        )
        yield Judged(stream_id, _principals(record), ranked, _task(record))


def _demonstrated(
    entries: Iterable[LogEntry], encoder: Encoder, counts: Counter[str]
) -> tuple[list[Written], list[Judged]]:
    """The demonstrations; and of those that correct a completion, the pair: corrected over original."""
    demonstrations: list[Written] = []
    corrections: list[Judged] = []
    for entry in entries:
        record = entry.record
        if not isinstance(record, Demonstration):
            continue
        try:
            prompt_ids, written = encoder.prompt(record.prompt), encoder.written(record.prompt, record.completion)
            original = encoder.candidate(record.prompt, record.corrects) if record.corrects else ()
            encoder.check_fits(prompt_ids, written, original)
        except Unencodable:
            counts["unencodable"] += 1
            continue
        demonstrations.append(Written(_principals(record), prompt_ids, written))
        if original:
            ranked = RankedPrompt(
                prompt_ids, (written, original), ((0, 1),), labeler=record.labeler, group=record.prompt.key()
            )
            corrections.append(Judged(entry.stream_id, _principals(record), ranked, _task(record)))
    return demonstrations, corrections


def _pooled(
    pool: Iterable[PooledPrompt], encoder: Encoder, known: set[str], held_out_fraction: float, counts: Counter[str]
) -> list[Asked]:
    """Stored prompts beside the ``known`` ones; none that by its name will be measured on."""
    asked = []
    for pooled in pool:
        key = pooled.prompt.key()
        if key in known or _falls_below(key, held_out_fraction):
            continue
        try:
            ids = encoder.prompt(pooled.prompt)
            encoder.check_fits(ids)
        except Unencodable:
            counts["unencodable"] += 1
            continue
        asked.append(
            Asked(
                tuple(dict.fromkeys((pooled.principal, pooled.prompt.asked_by or pooled.principal))),
                ids,
                pooled.prompt.task or "",
            )
        )
    return asked


Sample = TypeVar("Sample", Judged, Written, Asked)


def _without_personal_data(found: Iterable[Sample], encoder: Encoder, counts: Counter[str]) -> Iterable[Sample]:
    """Those whose prompts, as the policy reads them, hold no personal data (InstructGPT §3.2)."""
    for one in found:
        prompt_ids = one.ranked.prompt_ids if isinstance(one, Judged) else one.prompt_ids
        if holds_personal_data(encoder.text(prompt_ids)):
            counts["personal_data"] += 1
        else:
            yield one


def _principals(record: Comparison | Demonstration) -> tuple[str, ...]:
    """Who gave a record, and who asked its prompt: whose erasure takes it along."""
    return tuple(dict.fromkeys((record.principal, record.prompt.asked_by or record.principal)))


def _task(record: Comparison | Demonstration) -> str:
    return record.metadata.get("task", "")
