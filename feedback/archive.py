"""The archive: the log in Parquet files under ``<state>/archive``, by stream id, beside Redis.

Each run first reads what is there against its digests, then adds the records behind it as one file or more; a run
without new records adds none. ``feedback.importing`` reads it back. An erasure rewrites the files that hold something
of the erased principal; their names stay.
"""

import fcntl
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from feedback.errors import FeedbackError
from feedback.log_files import (
    SUFFIX,
    ParquetLog,
    archive_files,
    publish,
    read_log,
    read_parquet_rows,
    sweep,
    unfinished_file,
)
from feedback.removal import RawEntry
from feedback.store import FeedbackStore

FOLDER = "archive"
"""The archive's place in the state directory."""
MAX_FILE_RECORDS = 100_000
"""Records of one file; ours: the least that an erasure rewrites, and the most that a run has lying unfinished."""


class ArchiveUnwritable(FeedbackError):
    """The archive's directory or a file in it cannot be written; finished files stay as they are."""


@dataclass(frozen=True)
class Archived:
    """What a run found and did.

    Attributes:
        verified: records that were there and match their digests.
        added: records added, in ``files`` new files.
        damaged: records of the log that do not match their sha256; they stay in the log only.
        last: stream id of the newest record considered, in this run or before; ``0-0`` for none.
    """

    verified: int = 0
    added: int = 0
    files: int = 0
    damaged: int = 0
    last: str = "0-0"


async def archive(store: FeedbackStore, directory: Path, advance: Callable[[int], None] = lambda _: None) -> Archived:
    """Bring the archive up to the log's end.

    Args:
        store: of the log.
        directory: of the archive; made where there is none.
        advance: told how many records were read since it was last called.

    Raises:
        ArchiveUnwritable: as where the disk is full.
        FileDamaged: a file of the archive is not what was written; nothing was added.
        StoreUnavailable: the log cannot be read; files that were finished stay.
    """
    with locked(directory):
        sweep(directory)
        done = _verify(directory, advance)
        async with aclosing(_entries(store, done.last)) as entries:
            while part := await _add_file(entries, directory, advance):
                done = Archived(
                    done.verified, done.added + part.added, done.files + 1, done.damaged + part.damaged, part.last
                )
    return done


def erase_from_archive(directory: Path, covered: Callable[[RawEntry], bool]) -> int:
    """Write the files that hold covered records anew without them; returns how many records that were.

    Raises ArchiveUnwritable; FileDamaged where a file cannot be read at all; a damaged record in it is judged by its
    bytes.
    """
    if not directory.is_dir():
        return 0
    with locked(directory):
        sweep(directory)
        return sum(_erase_from_file(file, covered) for file in archive_files(directory))


def count_in_archive(directory: Path, covered: Callable[[RawEntry], bool]) -> int:
    """How many records ``erase_from_archive`` would take out."""
    if not directory.is_dir():
        return 0
    return sum(covered(entry) for file in archive_files(directory) for entry in read_parquet_rows(file))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait for, then hold an exclusive lock on a directory, made where there is none.

    The kernel drops the lock should this process die. Raises ArchiveUnwritable for any OSError inside.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ArchiveUnwritable(f"the archive {directory} cannot be written: {error}") from error


def _verify(directory: Path, advance: Callable[[int], None]) -> Archived:
    verified, last = 0, "0-0"
    for file in archive_files(directory):
        for _ in read_log(file):
            verified += 1
            advance(1)
        last = file.stem.partition("_")[2]
    return Archived(verified=verified, last=last)


async def _entries(store: FeedbackStore, after: str) -> AsyncGenerator[RawEntry, None]:
    async for batch in store.raw_batches(after):
        for entry in batch:
            yield entry


async def _add_file(
    entries: AsyncIterator[RawEntry], directory: Path, advance: Callable[[int], None]
) -> Archived | None:
    """One file of the next records; None where there are none."""
    first, last, damaged = None, "", 0
    with unfinished_file(directory) as path:
        with ParquetLog(path) as log:
            async for entry in entries:
                first, last = first or entry.stream_id, entry.stream_id
                if entry.sound:
                    log.add(entry)
                else:
                    damaged += 1
                advance(1)
                if log.records == MAX_FILE_RECORDS:
                    break
        if first is None:
            return None
        publish(path, directory / f"{first}_{last}{SUFFIX}")
    return Archived(added=log.records, damaged=damaged, last=last)


def _erase_from_file(file: Path, covered: Callable[[RawEntry], bool]) -> int:
    erased = sum(covered(entry) for entry in read_parquet_rows(file))
    if erased:
        with unfinished_file(file.parent) as path:
            with ParquetLog(path) as log:
                for entry in read_parquet_rows(file):
                    if not covered(entry):
                        log.add(entry)
            publish(path, file)
    return erased
