"""What blind comparisons since a canary began say of it, read from the feedback log as it grows.

``CanaryEvidence`` reads each record once. It keeps of a comparison what the verdict needs, a few hundred bytes,
and the verdict is computed anew from these, so that a labeler's later judgement replaces an earlier one, and what is
erased no longer counts.
"""

import asyncio
from collections.abc import Sequence

from deploy.release import Attempt, Release
from deploy.settings import VerdictSettings
from deploy.task_kinds import opening, task_kinds
from deploy.verdict import Verdict, judge, promotions_in_a_row, tasks_down
from feedback.controls import in_force
from feedback.preference import outcomes
from feedback.records import Comparison, Erasure, Prompt
from feedback.removal import position
from feedback.store import FeedbackStore, LogEntry

HISTORY = 1000
"""Newest attempts in which earlier promotions are looked for."""
_BATCH = 50
"""Records read at once: a few milliseconds of an event loop that also serves completions."""


class CanaryEvidence:
    """The comparisons that bear on the canary of the moment. One reader at a time."""

    def __init__(self, feedback: FeedbackStore) -> None:
        self._feedback = feedback
        self._generation = 0
        self._cursor = "0-0"
        self._given: dict[tuple[str, str | None], Comparison] = {}
        """Comparisons by who judged what in which task, in log order."""
        self._told: tuple[Comparison, ...] = ()
        self._changed = False
        """Whether ``_given`` has what ``_told`` lacks, as after a read that Redis broke off."""

    async def read(self, release: Release) -> tuple[Comparison, ...]:
        """Those of the canary and the stable version since the canary began, in log order; () without a canary.

        The same object as last time where there is nothing new.

        Raises:
            StoreUnavailable: The feedback log cannot be read now.
        """
        if release.canary is None or release.stable is None:
            return ()
        restarted = position(await self._feedback.head()) < position(self._cursor)
        if restarted or self._generation != release.generation:
            self._generation = release.generation
            self._cursor = f"{int(release.changed_at * 1000)}-0"
            self._given, self._told, self._changed = {}, (), False
        async for batch in self._feedback.batches(self._cursor, _BATCH):
            for entry in batch:
                self._changed |= self._add(entry, {release.canary, release.stable})
        if self._changed:
            self._told, self._changed = tuple(self._given.values()), False
        return self._told

    def _add(self, entry: LogEntry, arms: set[int]) -> bool:
        """Take in one record; True where it bears on the verdict."""
        record, self._cursor = entry.record, entry.stream_id
        if isinstance(record, Erasure):
            self._given = {key: kept for key, kept in self._given.items() if not record.covers(kept)}
            return True
        if isinstance(record, Comparison) and arms <= {one.policy_version for one in record.candidates}:
            slim = _slim(record)
            key = slim.candidates_key(), slim.task_id  # in another task the same candidates are a repeat
            self._given.pop(key, None)  # what is replaced goes to the end, too
            self._given[key] = slim
            return True
        return False


async def verdict_on(
    given: Sequence[Comparison], release: Release, settings: VerdictSettings, history: Sequence[Attempt]
) -> Verdict:
    """The verdict on the release's canary, computed beside the event loop.

    Args:
        given: comparisons since it began, in log order; a labeler who judged the same candidates twice counts once.
        release: whose canary; without one the verdict is undecided.
        settings: when to decide.
        history: the audit log, newest first, for the promotions before this one.
    """
    if release.canary is None or release.stable is None:
        return Verdict()
    return await asyncio.to_thread(_verdict, given, release.canary, release.stable, settings, history)


def _verdict(
    given: Sequence[Comparison], canary: int, stable: int, settings: VerdictSettings, history: Sequence[Attempt]
) -> Verdict:
    judged = list(outcomes(in_force(given).ordinary, canary, stable))
    verdict = judge([outcome for _, outcome in judged], settings)
    if verdict.decision != "not_worse":
        return verdict
    down = tasks_down(
        [outcome for _, outcome in judged], task_kinds([comparison for comparison, _ in judged]), settings
    )
    if down:
        full = verdict.comparisons >= settings.max_comparisons
        return verdict.model_copy(update={"decision": "undecided", "tasks_down": down, "held": full})
    must_be_better = promotions_in_a_row(history) + 1 >= settings.strict_every
    return verdict.model_copy(update={"must_be_better": must_be_better})


def _slim(record: Comparison) -> Comparison:
    """The same to the verdict: candidates by name, and of the prompt what tells its kind."""
    candidates = tuple(
        one.model_copy(update={"text": "", "token_ids": None}) if one.completion_id else one
        for one in record.candidates
    )
    prompt = Prompt(text=opening(record), asked_by=record.prompt.asked_by)
    task = {name: value for name, value in record.metadata.items() if name == "task"}
    return record.model_copy(update={"candidates": candidates, "prompt": prompt, "metadata": task, "comment": None})
