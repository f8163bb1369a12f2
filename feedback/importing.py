"""Putting a native export or an archive back into Redis, with the same ids and cursors.

Meant for an empty Redis that nobody writes to yet. The whole file is read and held against the log before the first
record is written, so that a refusal leaves the log as it was. Running it again goes on where it was killed; what is
there already is left alone, and what an erasure covers does not come back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from feedback.errors import CorruptRecord, FeedbackError
from feedback.log_files import FileDamaged, read_log
from feedback.records import Erasure, LogRecord, decode, owners
from feedback.removal import RawEntry, position
from feedback.store import FeedbackStore

BATCH, BATCH_BYTES = 256, 4 << 20
"""Records, and bytes of JSON, written at once."""

_ERASURE_MARK = b'"kind":"erasure"'
"""Every erasure's JSON has it; others may, too."""

Advance = Callable[[int], None]
Position = tuple[int, int]


class ImportRefused(FeedbackError):
    """The log has other records where the file's would have to stand; nothing was written."""


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        added: records written.
        present: records that were there already.
        erased: records left out because an erasure covers them.
        head: stream id of the log's newest record.
    """

    added: int
    present: int
    erased: int
    head: str


async def restore(store: FeedbackStore, path: Path, advance: Advance = lambda _: None) -> Imported:
    """Put the records of ``path`` back.

    Args:
        store: of the log to fill.
        path: JSON lines, Parquet, or an archive's directory.
        advance: told how many records were read since it was last called; the file is read twice.

    Raises:
        FileDamaged: the file is no native export, or not what was written. Nothing was written.
        ImportRefused: the log has other records there. Nothing was written.
        StoreUnavailable: Redis cannot serve, or somebody else appends; run it again.
    """
    erasures = await _erasures(store, path)
    head = position(await store.head())
    present, erased = await _check(store, path, head, erasures, advance)
    added = waiting = 0
    batch: list[tuple[RawEntry, LogRecord]] = []
    for entry, record in _records(path):
        advance(1)
        if entry.position <= head or _is_erased(entry, record, erasures):
            continue
        batch.append((entry, record))
        waiting += len(entry.body)
        if len(batch) == BATCH or waiting >= BATCH_BYTES:
            await store.restore(batch)
            added, batch, waiting = added + len(batch), [], 0
    await store.restore(batch)
    return Imported(added + len(batch), present, erased, await store.head())


async def _erasures(store: FeedbackStore, path: Path) -> dict[str, Position]:
    """For each erased principal's digest the place of the last erasure, in the log or the file."""
    last: dict[str, Position] = {}

    def note(entry: RawEntry, record: LogRecord) -> None:
        if isinstance(record, Erasure):
            last[record.erased] = max(entry.position, last.get(record.erased, (0, 0)))

    async for batch in store.raw_batches():
        for entry in batch:
            if _ERASURE_MARK in entry.body and (decoded := store.decoded(entry)):
                note(entry, decoded.record)
    for entry in read_log(path):
        if _ERASURE_MARK in entry.body:
            note(entry, _record(entry, path))
    return last


async def _check(
    store: FeedbackStore, path: Path, head: Position, erasures: dict[str, Position], advance: Advance
) -> tuple[int, int]:
    """How many records of the file are in the log, and how many are erased. Raises where one cannot be restored."""
    present = erased = 0
    new: list[RawEntry] = []
    async with aclosing(store.raw_batches()) as batches:
        there: dict[Position, str] = {}
        reached = (0, 0)
        for entry, record in _records(path):
            advance(1)
            while reached < min(entry.position, head) and (batch := await anext(batches, None)):
                there = {one.position: one.sha256 for one in batch}
                reached = batch[-1].position
            if there.get(entry.position) == entry.sha256:
                present += 1
            elif _is_erased(entry, record, erasures):
                erased += 1
            elif entry.position <= head:
                raise ImportRefused(
                    f"{path}: record {entry.id} belongs at {entry.stream_id}, but the log has other records up to "
                    f"{head[0]}-{head[1]}; import into an empty Redis"
                )
            else:
                new.append(entry)
            if len(new) == BATCH:
                await _refuse_taken(store, path, new)
                new.clear()
    await _refuse_taken(store, path, new)
    return present, erased


async def _refuse_taken(store: FeedbackStore, path: Path, entries: Sequence[RawEntry]) -> None:
    for entry, place in zip(entries, await store.places([entry.id for entry in entries]), strict=True):
        if place is not None:
            raise ImportRefused(
                f"{path}: the log has a record {entry.id} already, at {place} and not at {entry.stream_id}; "
                "import into an empty Redis"
            )


def _records(path: Path) -> Iterator[tuple[RawEntry, LogRecord]]:
    """The file's records. Kind and id are the record's own: no digest of the log covers what stands beside it."""
    for entry in read_log(path):
        record = _record(entry, path)
        yield replace(entry, kind=record.kind, id=record.id), record


def _record(entry: RawEntry, path: Path) -> LogRecord:
    try:
        return decode(entry.body, entry.sha256)
    except CorruptRecord as error:
        raise FileDamaged(f"{path}: record {entry.stream_id}: {error}") from error


def _is_erased(entry: RawEntry, record: LogRecord, erasures: dict[str, Position]) -> bool:
    return any(entry.position < erasures[owner] for owner in owners(record) & erasures.keys())
