"""The log in files and back: native exports, the archive, and importing them into another Redis."""

import asyncio
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from redis import Redis

from feedback import archive as archives
from feedback import keys
from feedback.archive import ArchiveUnwritable, archive
from feedback.embedded import EmbeddedRedis, start_or_join
from feedback.erasure import erase
from feedback.errors import StoreUnavailable
from feedback.importing import Imported, ImportRefused, restore
from feedback.log_files import FileDamaged, ParquetLog, json_line, read_log
from feedback.records import (
    Candidate,
    Comparison,
    Demonstration,
    Erasure,
    LogRecord,
    Prompt,
    Rating,
    encode,
    name_digest,
    new_id,
)
from feedback.removal import RawEntry
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

MakeComparison = Callable[..., Comparison]


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings(socket_timeout_seconds=10))
    yield store
    await store.close()


@pytest.fixture
def other_redis(state_dir: Path) -> Iterator[EmbeddedRedis]:
    with start_or_join(state_dir) as server:
        yield server


@pytest.fixture
async def other(other_redis: EmbeddedRedis) -> AsyncIterator[FeedbackStore]:
    """A store on another, empty Redis."""
    store = FeedbackStore.connect(other_redis.url, FeedbackSettings(socket_timeout_seconds=10))
    yield store
    await store.close()


async def raw(store: FeedbackStore) -> list[RawEntry]:
    return [entry async for batch in store.raw_batches() for entry in batch]


def contents(url: str) -> dict[bytes, Any]:
    """Everything about the log that an import restores."""
    with Redis.from_url(url) as redis:
        kept = {key: redis.get(key) for pattern in ("fb:id:*", "fb:pair:*") for key in redis.scan_iter(pattern)}
        return kept | {b"log": redis.xrange(keys.LOG)}


async def fill(store: FeedbackStore, make_comparison: MakeComparison, records: int = 12) -> list[RawEntry]:
    for number in range(records):
        labeler = f"L-{number}"
        await store.append(
            make_comparison(labeler=labeler, comment="ünï\u2028 🐸 \x00 \\", metadata={"n": str(number)})
        )
    await store.append(make_comparison(labeler="L-0"))  # replaces the first
    await store.append(
        Demonstration(
            id="demo_1",
            created=1e-7,
            principal="bob",
            labeler="b",
            prompt=Prompt(messages=({"x": 1e300},)),
            completion="c",
        )
    )
    candidate = Candidate(completion_id="cmpl-1", text="t")
    flags: Any = {"hallucination": True}
    await store.append(
        Rating(
            id=new_id("rat_"),
            created=2,
            principal="bob",
            labeler="b",
            prompt=Prompt(text="p"),
            candidate=candidate,
            overall=7,
            flags=flags,
        )
    )
    return await raw(store)


def write_lines(path: Path, entries: list[RawEntry]) -> Path:
    path.write_bytes(b"".join(map(json_line, entries)))
    return path


def write_parquet(path: Path, entries: list[RawEntry]) -> Path:
    with ParquetLog(path) as log:
        for entry in entries:
            log.add(entry)
    return path


WRITERS = {"log.jsonl": write_lines, "log.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
async def test_an_export_brings_every_byte_id_and_place_back(
    store: FeedbackStore,
    redis_url: str,
    other: FeedbackStore,
    other_redis: EmbeddedRedis,
    make_comparison: MakeComparison,
    tmp_path: Path,
    name: str,
) -> None:
    entries = await fill(store, make_comparison)
    path = WRITERS[name](tmp_path / name, entries)
    assert list(read_log(path)) == entries
    done = await restore(other, path)
    assert done == Imported(len(entries), 0, 0, entries[-1].stream_id)
    assert contents(other_redis.url) == contents(redis_url)
    assert [e.record async for e in other.scan()] == [e.record async for e in store.scan()]
    again = await restore(other, path)
    assert again == Imported(0, len(entries), 0, entries[-1].stream_id)
    assert contents(other_redis.url) == contents(redis_url)
    later = await other.append(make_comparison(labeler="later"))
    assert [e.stream_id async for e in other.scan(after=entries[-1].stream_id)] == [later.stream_id]


async def test_a_repetition_is_none_in_force_after_an_import_either(
    store: FeedbackStore,
    redis_url: str,
    other: FeedbackStore,
    other_redis: EmbeddedRedis,
    make_comparison: MakeComparison,
    tmp_path: Path,
) -> None:
    tasks = [make_comparison(source="task", task_id=name, comment=name) for name in ("task_1", "task_2", "task_1")]
    for record in tasks:
        await store.append(record, idempotency_key=record.id)
    await restore(other, write_lines(tmp_path / "log.jsonl", await raw(store)))
    assert await store.in_force(tasks) == await other.in_force(tasks) == [False, False, True]
    assert contents(other_redis.url) == contents(redis_url)


async def test_an_import_that_was_cut_off_goes_on(
    store: FeedbackStore, other: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    entries = await fill(store, make_comparison)
    await restore(other, write_lines(tmp_path / "part.jsonl", entries[:5]))
    done = await restore(other, write_lines(tmp_path / "all.jsonl", entries))
    assert (done.added, done.present) == (len(entries) - 5, 5)
    assert await raw(other) == entries


async def test_a_log_with_other_records_refuses_the_import_whole(
    store: FeedbackStore, other: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    entries = await fill(store, make_comparison)
    await other.append(make_comparison(labeler="its own"))
    with pytest.raises(ImportRefused, match="import into an empty Redis"):
        await restore(other, write_lines(tmp_path / "log.jsonl", entries))
    assert len(await raw(other)) == 1


async def test_a_record_id_at_another_place_is_refused_before_anything_is_written(
    store: FeedbackStore, other: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    await other.append(make_comparison(id="cmp_same"))
    await asyncio.sleep(0.002)
    await store.append(make_comparison(labeler="first"))
    await store.append(make_comparison(id="cmp_same"))
    with pytest.raises(ImportRefused, match="a record cmp_same already"):
        await restore(other, write_lines(tmp_path / "log.jsonl", await raw(store)))
    assert len(await raw(other)) == 1


async def test_a_place_that_is_taken_meanwhile_is_refused_by_redis_itself(
    store: FeedbackStore, other: FeedbackStore, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison())
    [entry] = await raw(store)
    await other.append(make_comparison(labeler="newer"))
    with pytest.raises(StoreUnavailable, match="equal or smaller"):
        await other.restore([(entry, first.record)])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda lines: [lines[0].replace(b"frog", b"toad"), *lines[1:]], "does not match its sha256"),
        (lambda lines: [lines[1], lines[0]], "not behind the one before"),
        (lambda lines: [lines[0], lines[0]], "not behind the one before"),
        (lambda lines: [lines[0], lines[1][:40]], "line 2 is no record"),
        (lambda lines: [b'{"prompt": "p", "chosen": "c"}\n'], "line 1 is no record"),
    ],
)
async def test_damaged_lines_are_refused_with_their_place(
    store: FeedbackStore,
    other: FeedbackStore,
    make_comparison: MakeComparison,
    tmp_path: Path,
    damage: Callable[[list[bytes]], list[bytes]],
    why: str,
) -> None:
    entries = await fill(store, make_comparison, 2)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(damage([json_line(entry) for entry in entries])))
    with pytest.raises(FileDamaged, match=why):
        await restore(other, path)
    assert await raw(other) == []


async def test_files_that_are_none_are_refused(other: FeedbackStore, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["p"]}), tmp_path / "pairs.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    for name, why in {"pairs": "its columns are prompt", "text": "cannot be read", "none": "cannot be read"}.items():
        with pytest.raises(FileDamaged, match=why):
            await restore(other, tmp_path / f"{name}.parquet")
    with pytest.raises(FileDamaged, match="cannot be read"):
        await restore(other, tmp_path / "none.jsonl")


async def test_a_parquet_file_that_lost_or_gained_a_row_is_refused(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "log.parquet", await fill(store, make_comparison, 3))
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(FileDamaged, match="do not match the file's own digest"):
        list(read_log(path))


async def test_a_flipped_byte_in_a_parquet_file_changes_no_record_unnoticed(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    entries = await fill(store, make_comparison, 3)
    path = write_parquet(tmp_path / "log.parquet", entries)
    whole, found = path.read_bytes(), 0
    for place in range(4, len(whole), 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert list(read_log(path)) == entries  # it fell where nothing of the records is
        except FileDamaged:
            found += 1
    assert found > 20


async def test_the_archive_grows_by_what_is_new_and_is_verified_each_time(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_RECORDS", 6)
    folder = tmp_path / "state" / archives.FOLDER
    entries = await fill(store, make_comparison)
    done = await archive(store, folder)
    assert (done.verified, done.added, done.files, done.last) == (0, 15, 3, entries[-1].stream_id)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert list(read_log(folder)) == entries
    assert all(f"{e[0].stream_id}_{e[-1].stream_id}.parquet" == f.name for f in files if (e := list(read_log(f))))

    done = await archive(store, folder)
    assert (done.verified, done.added, done.files) == (15, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files

    await store.append(make_comparison(labeler="new"))
    done = await archive(store, folder)
    assert (done.verified, done.added, done.files) == (15, 1, 1)
    assert list(read_log(folder)) == await raw(store)


async def test_an_archive_comes_back_from_its_directory(
    store: FeedbackStore, other: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    entries = await fill(store, make_comparison)
    await archive(store, tmp_path)
    (tmp_path / "notes.txt").write_text("not of the archive")
    assert (await restore(other, tmp_path)).added == len(entries)
    assert await raw(other) == entries


async def test_an_archive_that_is_not_what_was_written_takes_nothing_more(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    await fill(store, make_comparison)
    await archive(store, tmp_path)
    [file] = tmp_path.iterdir()
    write_parquet(file, [e.__class__(e.stream_id, e.kind, e.id, e.body, "0" * 64) for e in read_log(file)])
    await store.append(make_comparison(labeler="new"))
    with pytest.raises(FileDamaged, match=file.name):
        await archive(store, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


async def test_files_of_the_archive_that_overlap_are_refused(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    await fill(store, make_comparison)
    await archive(store, tmp_path)
    [file] = tmp_path.iterdir()
    first = file.stem.partition("_")[0]
    file.with_name(f"{first}_{first}.parquet").write_bytes(file.read_bytes())
    with pytest.raises(FileDamaged, match="cover the same records"):
        await archive(store, tmp_path)


async def test_damaged_records_stay_in_the_log_only(
    store: FeedbackStore, redis_url: str, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    await store.append(make_comparison())
    with Redis.from_url(redis_url) as redis:
        redis.xadd(keys.LOG, {"json": "{}", "sha256": "0"})
    done = await archive(store, tmp_path)
    assert (done.added, done.damaged) == (1, 1)
    assert (await archive(store, tmp_path)).added == 0


async def test_a_flipped_byte_beside_a_record_keeps_none_of_the_archive_from_coming_back(
    store: FeedbackStore, redis_url: str, other: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    erasure = Erasure(id="era_1", created=1, principal="root", erased=name_digest("alice"))
    given: list[LogRecord] = [make_comparison(labeler="L-2", principal="bob"), make_comparison(), erasure]
    with Redis.from_url(redis_url) as redis:
        for record, kind in zip(given, ("comparison", "comparison", "erasurd"), strict=True):
            body, sha256 = encode(record)
            redis.xadd(keys.LOG, {"kind": kind, "id": f"{record.id[:-1]}~", "json": body, "sha256": sha256})
    assert (await archive(store, tmp_path)).added == 3
    done = await restore(other, tmp_path)
    assert (done.added, done.erased) == (2, 1)
    assert [(entry.kind, entry.id) for entry in await raw(other)] == [("comparison", given[0].id), ("erasure", "era_1")]
    assert await other.record(given[0].id) == given[0]


async def test_an_archive_that_cannot_be_written_says_so(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    await store.append(make_comparison())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveUnwritable, match=r"archive .*file/archive cannot be written"):
        await archive(store, tmp_path / "file" / "archive")
    with resource_limit(resource.RLIMIT_FSIZE, 100), pytest.raises(ArchiveUnwritable, match="File too large"):
        await archive(store, tmp_path / "archive")
    assert list((tmp_path / "archive").iterdir()) == []
    assert (await archive(store, tmp_path / "archive")).added == 1


@contextmanager
def resource_limit(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


async def test_what_a_killed_writer_left_is_swept(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    await store.append(make_comparison())
    (tmp_path / ".0123.unfinished").write_text("half")
    await archive(store, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


async def test_what_was_erased_does_not_come_back_from_an_older_export(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    entries = await fill(store, make_comparison)
    path = write_lines(tmp_path / "old.jsonl", entries)
    await erase(store, "alice", tmp_path / "archive", by="root")
    done = await restore(store, path)
    assert (done.added, done.present, done.erased) == (0, 2, 13)
    assert {entry.record.principal async for entry in store.scan()} == {"bob", "root"}


async def test_erasures_in_the_file_count_too(
    store: FeedbackStore, other: FeedbackStore, make_comparison: MakeComparison, tmp_path: Path
) -> None:
    before = await fill(store, make_comparison)
    await erase(store, "alice", tmp_path / "archive", by="root")
    joined = write_lines(tmp_path / "joined.jsonl", [*before, (await raw(store))[-1]])
    done = await restore(other, joined)
    assert (done.added, done.erased) == (3, 13)
