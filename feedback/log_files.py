"""Records of the log in files, byte for byte, each with its place: what is exported natively and archived.

- JSON lines: ``{"stream_id": …, "sha256": …, <the record's own JSON>}``. What follows the two is the record exactly as
  it is stored, so that its digest still holds when it is read back.
- Parquet (zstd): columns ``stream_id kind id json sha256``, as the log's own fields; the footer has a digest over all
  rows. It is what an archive consists of.

Files are written under another name, fsynced, and renamed: whatever has the name is whole.
"""

import hashlib
import itertools
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from feedback.errors import FeedbackError
from feedback.removal import RawEntry

SUFFIX = ".parquet"
GROUP_ROWS, GROUP_BYTES = 2_000, 4 << 20
"""A row group is written when it has so many rows, or so many bytes of JSON: what a reader holds at once."""

_SCHEMA = pa.schema([(name, pa.string()) for name in ("stream_id", "kind", "id", "json", "sha256")])
_DIGEST, _RECORDS = b"instructloop.sha256", b"instructloop.records"
_STREAM_ID = r"\d+-\d+"
_LINE = re.compile(rb'\{"stream_id":"(' + _STREAM_ID.encode() + rb')","sha256":"([0-9a-f]{64})",(.*\})\n?', re.DOTALL)


class FileDamaged(FeedbackError):
    """A file of records is not what was written, or never was one; the message names file and place."""


def json_line(entry: RawEntry) -> bytes:
    """One line of a JSON lines file."""
    return b'{"stream_id":"%b","sha256":"%b",%b\n' % (entry.stream_id.encode(), entry.sha256.encode(), entry.body[1:])


class ParquetLog:
    """A Parquet file of records in the making; a context manager around ``add``.

    Args:
        file: where to write; see ``unfinished_file``.
    """

    def __init__(self, file: Path) -> None:
        self._writer = pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_page_checksum=True)
        self._rows: list[tuple[str, str, str, str, str]] = []
        self._bytes = 0
        self._digest = hashlib.sha256()
        self.records = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write_group()
            footer = {_DIGEST: self._digest.hexdigest(), _RECORDS: str(self.records)}
            self._writer.add_key_value_metadata(footer)
        self._writer.close()

    def add(self, entry: RawEntry) -> None:
        """Write a record; in the order of the log."""
        self._rows.append((entry.stream_id, entry.kind, entry.id, entry.body.decode(), entry.sha256))
        self._bytes += len(entry.body)
        self._digest.update(_fingerprint(entry))
        self.records += 1
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        if self._rows:
            columns = [pa.array(column, pa.string()) for column in zip(*self._rows, strict=True)]
            self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._rows, self._bytes = [], 0


def read_log(path: Path) -> Iterator[RawEntry]:
    """The records of a native export, be it JSON lines, Parquet or an archive's directory, in order.

    Raises:
        FileDamaged: a file cannot be read, is no such export, or a digest does not match.
    """
    if path.is_dir():
        for file in archive_files(path):
            yield from read_log(file)
        return
    last = (-1, -1)
    for entry in _read_parquet(path) if path.suffix == SUFFIX else _read_json_lines(path):
        if not entry.sound:
            raise FileDamaged(f"{path}: record {entry.stream_id} does not match its sha256")
        if entry.position <= last:
            raise FileDamaged(f"{path}: record {entry.stream_id} is not behind the one before it")
        last = entry.position
        yield entry


def read_parquet_rows(path: Path) -> Iterator[RawEntry]:
    """The rows of a Parquet file as they are, damaged or not. Raises FileDamaged where there is no reading it."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(_SCHEMA):
                raise FileDamaged(f"{path}: is no native export; its columns are {', '.join(file.schema_arrow.names)}")
            for group in range(file.num_row_groups):
                columns = file.read_row_group(group).itercolumns()
                for stream_id, kind, record_id, body, sha256 in zip(*(c.to_pylist() for c in columns), strict=True):
                    yield RawEntry(stream_id, kind, record_id, body.encode(), sha256)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise FileDamaged(f"{path}: cannot be read: {error}") from error


def archive_files(directory: Path) -> list[Path]:
    """The files of an archive by stream id: each is named ``<first>_<last>.parquet`` for the places it covers.

    Raises:
        FileDamaged: two of them cover the same place.
    """
    named = {
        path: [tuple(map(int, end.split("-"))) for end in path.stem.split("_")]
        for path in directory.glob(f"*{SUFFIX}")
        if re.fullmatch(rf"{_STREAM_ID}_{_STREAM_ID}", path.stem)
    }
    files = sorted(named, key=lambda path: named[path])
    for one, other in itertools.pairwise(files):
        if named[one][1] >= named[other][0]:
            raise FileDamaged(f"{directory}: {one.name} and {other.name} cover the same records")
    return files


@contextmanager
def unfinished_file(directory: Path) -> Iterator[Path]:
    """A path to write at; what ``publish`` has not moved from there is deleted."""
    path = directory / f".{secrets.token_hex(8)}.unfinished"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(unfinished: Path, target: Path) -> None:
    """Give a written file its name, once it is on disk; a file that had the name is replaced."""
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    unfinished.replace(target)
    _sync_directory(target.parent)


def sweep(directory: Path) -> None:
    """Delete what killed writers left; only while no other writes there."""
    for left in directory.glob(".*.unfinished"):
        left.unlink()


def _fingerprint(entry: RawEntry) -> bytes:
    return f"{entry.stream_id} {entry.kind} {entry.id} {entry.sha256}\n".encode()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json_lines(path: Path) -> Iterator[RawEntry]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not (match := _LINE.fullmatch(line)):
                    raise FileDamaged(f"{path}: line {number} is no record as `export --format native` writes it")
                body = b"{" + match[3]
                kind = record_id = ""
                with suppress(ValueError, KeyError):  # such a record is refused by its digest or its schema
                    said = from_json(body)
                    kind, record_id = said["kind"], said["id"]
                yield RawEntry(match[1].decode(), kind, record_id, body, match[2].decode())
    except OSError as error:
        raise FileDamaged(f"{path}: cannot be read: {error}") from error


def _read_parquet(path: Path) -> Iterator[RawEntry]:
    digest, records = hashlib.sha256(), 0
    for entry in read_parquet_rows(path):
        digest.update(_fingerprint(entry))
        records += 1
        yield entry
    footer = pq.read_metadata(path).metadata or {}
    if (footer.get(_DIGEST), footer.get(_RECORDS)) != (digest.hexdigest().encode(), str(records).encode()):
        raise FileDamaged(f"{path}: {records} records do not match the file's own digest")
