"""Erasing a principal: its completions, its feedback, and whatever its prompts were shown in, wherever they lie.

In this order, so that being killed at any point loses nothing and leaves nothing that running it again would not find:

1. An ``Erasure`` goes into the log. From then on no training uses what it covers (``surviving``), whatever
   bytes of it are still there.
2. Records leave the log, each with what names it; then their idempotency keys.
3. Completions with their places in the indices, and blind tasks.
4. The log is copied without the bytes that deleted records leave in a stream, and Redis writes its file anew.
5. The archive's files are rewritten.

Until the end the principal's digest stands in ``fb:erasure:unfinished``. What the principal still sends
meanwhile may stay: revoke its keys first. That another labeler was shown a prompt is remembered by the prompt's digest
until it expires. Copies that this package does not know (exports, snapshots and replicas of
a Redis of your own, datasets frozen by training) are their makers' to rewrite; the ``Erasure`` tells them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from feedback.archive import count_in_archive, erase_from_archive
from feedback.errors import CorruptRecord
from feedback.records import (
    BlindTask,
    Erasure,
    LogRecord,
    StoredCompletion,
    decode,
    marks_of,
    name_digest,
    new_id,
    owners,
)
from feedback.removal import RawEntry, position
from feedback.store import FeedbackStore, LogEntry

Advance = Callable[[int], None]
BATCH = 200
"""Records of the log read at once: a few milliseconds of an event loop that also serves completions."""


@dataclass(frozen=True)
class ErasureReport:
    """What was erased, or would be.

    Attributes:
        erasure_id: of the record in the log; None where nothing was found, and in a dry run.
        records: feedback taken out of the log.
        completions: kept completions deleted.
        tasks: blind tasks deleted.
        archived: records taken out of the archive.
        unreadable: damaged records of which nobody can tell whose they are; they stay, and are never used.
    """

    erasure_id: str | None
    records: int
    completions: int
    tasks: int
    archived: int
    unreadable: int


class Covered:
    """Tells what an erasure of one principal takes.

    Args:
        principal: whose.
        before: stream id that records stand before; None for any place.
    """

    def __init__(self, principal: str, before: str | None = None) -> None:
        self.principal = principal
        self.marks = marks_of(principal)
        self._digest = name_digest(principal)
        self._before = None if before is None else position(before)

    def record(self, entry: RawEntry) -> tuple[bool, LogRecord | None]:
        """Whether an entry is covered, and its record where that can be decoded; a damaged one goes by its bytes."""
        if not any(mark in entry.body for mark in self.marks):
            return False, None
        if self._before is not None and entry.position >= self._before:
            return False, None
        try:
            record = decode(entry.body, entry.sha256)
        except CorruptRecord:
            return True, None
        return self._digest in owners(record), record

    def __call__(self, entry: RawEntry) -> bool:
        """Whether an entry is covered."""
        return self.record(entry)[0]

    def kept(self, one: StoredCompletion | BlindTask) -> bool:
        """Whether a completion or task is covered: the principal's own, or made from a prompt of theirs."""
        prompts = one.prompts if isinstance(one, StoredCompletion) else (one.prompt,)
        names = {one.principal, *(prompt.asked_by for prompt in prompts)}
        return self.principal in names


def surviving(entries: Sequence[LogEntry]) -> list[LogEntry]:
    """The entries that no later erasure among them covers: those that may be used.

    Args:
        entries: of the log, in order.
    """
    erased: set[str] = set()
    kept: list[LogEntry] = []
    for entry in reversed(entries):
        if isinstance(entry.record, Erasure):
            erased.add(entry.record.erased)
        if not erased or erased.isdisjoint(owners(entry.record)):
            kept.append(entry)
    return kept[::-1]


async def survey(
    store: FeedbackStore, principal: str, archive: Path, advance: Advance = lambda _: None
) -> ErasureReport:
    """What ``erase`` would find now; changes nothing. A completion may be counted twice while Redis grows.

    Raises:
        FileDamaged: a file of the archive cannot be read.
        StoreUnavailable: Redis cannot serve.
    """
    covered = Covered(principal)
    found = await _in_redis(store, covered, advance)
    return replace(found, archived=await asyncio.to_thread(count_in_archive, archive, covered))


async def _in_redis(store: FeedbackStore, covered: Covered, advance: Advance) -> ErasureReport:
    records = unreadable = completions = tasks = 0
    async for batch in store.raw_batches(size=BATCH):
        for entry in batch:
            taken = covered(entry)
            records += taken
            unreadable += not taken and not entry.sound
        advance(len(batch))
    async for found in store.completions_with(covered.marks):
        completions += sum(map(covered.kept, found))
    async for waiting in store.tasks_with(covered.marks):
        tasks += sum(map(covered.kept, waiting))
    return ErasureReport(None, records, completions, tasks, 0, unreadable)


async def erase(
    store: FeedbackStore, principal: str, archive: Path, *, by: str, advance: Advance = lambda _: None
) -> ErasureReport:
    """Erase a principal. Where it does not return, the erasure is unfinished and must be run again.

    Args:
        store: of the log.
        principal: whose completions and feedback.
        archive: the archive's directory, whether there is one or not.
        by: the principal who asks for it.
        advance: told how many records were read since it was last called; the log is read twice.

    Raises:
        ErasureUnderWay: another erasure runs.
        ArchiveUnwritable, FileDamaged: the archive cannot be written, or read; all the rest is done.
        StoreUnavailable: Redis cannot serve, or could not write its file anew.
    """
    async with store.erasing() as holder:
        found = await _in_redis(store, Covered(principal), advance)
        erased = name_digest(principal)
        unfinished = erased in await store.unfinished_erasures()
        in_redis = found.records or found.completions or found.tasks
        if not (unfinished or in_redis or await asyncio.to_thread(count_in_archive, archive, Covered(principal))):
            return found

        # 1. Say so: from here on nothing of it is used.
        await store.begin_erasure(erased)
        said = Erasure(id=new_id("era_"), created=time.time(), principal=by, erased=erased)
        appended = await store.append(said, idempotency_key=said.id)
        covered = Covered(principal, before=appended.stream_id)

        # 2. Records.
        records = 0
        async for batch in store.raw_batches(size=BATCH):
            judged = [(entry, *covered.record(entry)) for entry in batch]
            records += await store.remove([(entry, record) for entry, taken, record in judged if taken])
            advance(len(batch))
        if records or unfinished:
            await store.forget_idempotency()

        # 3. Completions and tasks.
        completions = tasks = 0
        async for kept in store.completions_with(covered.marks):
            completions += await store.delete_completions([one for one in kept if covered.kept(one)])
        completions += await store.delete_index(principal)
        async for waiting in store.tasks_with(covered.marks):
            tasks += await store.delete_tasks([one for one in waiting if covered.kept(one)])
        await store.forget_labeler(principal)

        # 4. Their bytes.
        if records or unfinished:
            await store.copy_log(holder)
        await store.rewrite_files()

        # 5. The archive.
        archived = await asyncio.to_thread(erase_from_archive, archive, covered)
        await store.end_erasure(erased)
    return ErasureReport(said.id, records, completions, tasks, archived, found.unreadable)
