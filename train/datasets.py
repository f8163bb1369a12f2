"""From the feedback log to token ids: which comparisons count, for training or for measuring, and as what.

A comparison counts where no later one by the same labeler replaces it, as much as its labeler is trusted; where
principals share a log, none may dominate it; and what is measured on is never trained on, nor is what measures
labelers (``feedback.controls``). All of it is a function of the log up to a
cursor and the settings: the same cursor gives the same dataset.
"""

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from feedback.controls import InForce, in_force
from feedback.labelers import PRIOR_WEIGHT, assess, golden_answers, weights
from feedback.records import Candidate, Comparison, Demonstration, PooledPrompt, Prompt
from feedback.store import LogEntry
from train.batches import Demonstrated, RankedPrompt
from train.errors import DatasetUnusable
from train.settings import WorkerSettings


@dataclass(frozen=True)
class Judged:
    """A comparison in token ids, with its place in the log."""

    stream_id: str
    principal: str
    ranked: RankedPrompt

    def weighted(self, weight: float) -> "Judged":
        """The same, by a labeler who is trusted so far."""
        return replace(self, ranked=replace(self.ranked, weight=weight))


@dataclass(frozen=True)
class Dataset:
    """What a round learns from and is measured on.

    Attributes:
        training: comparisons to learn from, in log order.
        held_out: comparisons of other principals (or, with few principals, other prompts) to measure on.
        demonstrations: labelers' completions; they set the reward model's zero.
        prompts: prompts PPO samples completions for, distinct unless the settings keep repeated ones.
        held_out_prompts: distinct prompts a version is measured on; none is in ``prompts``.
        counts: what was left out and why, and how many labelers are trusted less than one nothing is known of.
    """

    training: tuple[Judged, ...]
    held_out: tuple[RankedPrompt, ...]
    demonstrations: tuple[Demonstrated, ...]
    prompts: tuple[tuple[int, ...], ...]
    held_out_prompts: tuple[tuple[int, ...], ...]
    counts: dict[str, int] = field(default_factory=dict)


class Unencodable(Exception):
    """A record whose text cannot be turned into this tokenizer's ids; it is left out and counted."""


class Encoder:
    """Turns records into token ids of one tokenizer.

    Ids that the serving tokenizer recorded are taken as they are: they are what the policy sampled. Text is
    tokenized where there are none, or where another tokenizer made them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, digest: str, window: int, max_completion_tokens: int
    ) -> None:
        """Encode for one policy.

        Args:
            tokenizer: the policy's.
            digest: sha256 of its tokenizer.json.
            window: tokens the policy reads at most.
            max_completion_tokens: room a prompt must leave where completions are sampled for it.
        """
        self._tokenizer = tokenizer
        self._digest = digest
        self._window = window
        self._longest_prompt = window - max_completion_tokens
        self._eos = int(tokenizer.eos_token_id)

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of a prompt, up to where the completion starts. Raises Unencodable."""
        if prompt.token_ids and prompt.tokenizer == self._digest:
            return prompt.token_ids
        if prompt.messages is not None:
            return self._ids(self._rendered(prompt))
        if prompt.text:
            return tuple(self._tokenizer.encode(prompt.text))
        raise Unencodable("the prompt is token ids of another tokenizer, without its text")

    def candidate(self, prompt: Prompt, candidate: Candidate) -> tuple[int, ...]:
        """Ids of a sampled completion, with its EOS unless it was cut off at the length limit. Raises Unencodable."""
        if candidate.token_ids and prompt.tokenizer == self._digest:
            ids = candidate.token_ids
            cut_off = candidate.finish_reason == "length"
            return ids if cut_off or ids[-1] == self._eos else (*ids, self._eos)
        return self.written(prompt, candidate.text)

    def written(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Ids of a finished completion given as text; after messages, as the chat template writes it.

        Raises Unencodable.
        """
        if prompt.messages is not None:
            before, after = self._rendered(prompt), self._rendered(prompt, answer=text)
            if after.startswith(before):
                ids = self._ids(after.removeprefix(before))
                return ids[: ids.index(self._eos) + 1] if self._eos in ids else (*ids, self._eos)
        return (*self._ids(text), self._eos)

    def check_fits(self, prompt_ids: Sequence[int], *completions: Sequence[int]) -> None:
        """Raise Unencodable where a prompt with its longest completion is longer than the model's window."""
        if len(prompt_ids) + max(map(len, completions), default=0) > self._window:
            raise Unencodable(f"longer than {self._window} tokens")

    def leaves_room(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a completion of the greatest length can be sampled for a prompt."""
        return len(prompt_ids) <= self._longest_prompt

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _rendered(self, prompt: Prompt, answer: str | None = None) -> str:
        messages = list(prompt.messages or ())
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise Unencodable(f"the chat template refuses the messages: {error}") from error
        return str(text)


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
    kept = capped(compared, settings.max_principal_share, settings.min_comparisons_for_cap)
    counts["over_cap"] = len(compared) - len(kept)
    judged = list(_encoded(kept, encoder, counts))
    demonstrations, corrections = _demonstrated(entries, encoder, counts)
    judged = sorted([*judged, *corrections], key=lambda one: position(one.stream_id))
    if trust is not None:
        judged = [one.weighted(trust.get(one.ranked.labeler, PRIOR_WEIGHT)) for one in judged]
    training, held_out = split(judged, settings.held_out_fraction)
    if not any(one.ranked.pairs for one in training) or not any(one.ranked.pairs for one in held_out):
        raise DatasetUnusable(
            f"{len(training)} comparisons to learn from and {len(held_out)} to measure on hold no pairs enough: "
            "more are needed, of several prompts"
        )
    measured_on = {one.ranked.group for one in held_out}
    asked = [(one.principal, one.ranked.prompt_ids) for one in training]
    known = measured_on | {one.ranked.group for one in training}
    asked += _pooled(reversed(pool), encoder, known, settings.held_out_fraction, counts)
    prompts = ppo_prompts(asked, settings.max_prompts_per_principal, distinct=settings.distinct_prompts)
    return Dataset(
        training=tuple(training),
        held_out=tuple(one.ranked for one in held_out),
        demonstrations=tuple(demonstrations),
        prompts=tuple(filter(encoder.leaves_room, prompts)),
        held_out_prompts=tuple(filter(encoder.leaves_room, dict.fromkeys(one.ranked.prompt_ids for one in held_out))),
        counts=dict(counts),
    )


def position(stream_id: str) -> tuple[int, int]:
    """A stream id as numbers that order as the log does."""
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds), int(sequence or 0)


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


def capped(
    compared: Sequence[tuple[str, Comparison]], max_share: float, min_comparisons: int
) -> list[tuple[str, Comparison]]:
    """At most ``max_share`` of the comparisons from any one principal, or an equal share where they are few.

    The allowance is raised as far as needed to keep ``min_comparisons``, so that a small log is used whole. What
    is kept of a capped principal is chosen by the records' own random ids: of all times, and the same every round.
    """
    of_principal = Counter(record.principal for _, record in compared)
    if len(compared) <= min_comparisons:
        return list(compared)
    allowance = max(1, int(max_share * len(compared)), math.ceil(len(compared) / len(of_principal)))
    while sum(min(count, allowance) for count in of_principal.values()) < min_comparisons:
        allowance += 1
    left = Counter(dict.fromkeys(of_principal, allowance))
    kept: set[str] = set()
    for _, record in sorted(compared, key=lambda one: hashlib.sha256(one[1].id.encode()).digest()):
        if left[record.principal] > 0:
            left[record.principal] -= 1
            kept.add(record.id)
    return [(stream_id, record) for stream_id, record in compared if record.id in kept]


def split(judged: Sequence[Judged], held_out_fraction: float) -> tuple[list[Judged], list[Judged]]:
    """What to learn from and what to measure on.

    By principal (InstructGPT §3.2) where there are enough for the fraction to hold one; else by prompt. Which
    side one falls on depends on nothing but its name, so it is the same in every round. A prompt that is
    learnt from is not measured on, whoever judged it.
    """
    principals = {one.principal for one in judged}
    if len(principals) * held_out_fraction >= 1:
        held_out = [one for one in judged if _falls_below(one.principal, held_out_fraction)]
        training = [one for one in judged if not _falls_below(one.principal, held_out_fraction)]
        learnt = {one.ranked.group for one in training}
        return training, [one for one in held_out if one.ranked.group not in learnt]
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


def ppo_prompts(
    asked: Sequence[tuple[str, tuple[int, ...]]], per_principal: int, *, distinct: bool
) -> tuple[tuple[int, ...], ...]:
    """Distinct prompts; where several principals asked, the newest ``per_principal`` of each (InstructGPT §3.2).

    Where they need not be ``distinct``, a prompt that was asked twice counts twice: the mix is that of the asking.
    """
    by_principal: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)
    for principal, ids in asked:
        by_principal[principal].append(ids)
    if distinct:
        # The last time something was asked is its place.
        by_principal.update({who: list(dict.fromkeys(ids[::-1]))[::-1] for who, ids in by_principal.items()})
    if len(by_principal) > 1:
        kept = [ids for prompts in by_principal.values() for ids in prompts[-per_principal:]]
    else:
        kept = [ids for prompts in by_principal.values() for ids in prompts]
    return tuple(dict.fromkeys(kept) if distinct else kept)


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
        yield Judged(stream_id, record.principal, ranked)


def _demonstrated(
    entries: Iterable[LogEntry], encoder: Encoder, counts: Counter[str]
) -> tuple[list[Demonstrated], list[Judged]]:
    """The demonstrations; and of those that correct a completion, the pair: corrected over original."""
    demonstrations: list[Demonstrated] = []
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
        demonstrations.append((prompt_ids, written))
        if original:
            ranked = RankedPrompt(
                prompt_ids, (written, original), ((0, 1),), labeler=record.labeler, group=record.prompt.key()
            )
            corrections.append(Judged(entry.stream_id, record.principal, ranked))
    return demonstrations, corrections


def _pooled(
    pool: Iterable[PooledPrompt], encoder: Encoder, known: set[str], held_out_fraction: float, counts: Counter[str]
) -> list[tuple[str, tuple[int, ...]]]:
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
        asked.append((pooled.principal, ids))
    return asked
