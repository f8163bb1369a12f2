"""Erasing a principal: what is gone from Redis, its files and the archive; what stays; and being killed half way."""

import asyncio
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from feedback import erasure, keys
from feedback.archive import archive
from feedback.embedded import EmbeddedRedis, start_or_join
from feedback.erasure import erase, survey, surviving
from feedback.errors import FeedbackError, StoreUnavailable
from feedback.log_files import FileDamaged, read_log
from feedback.records import (
    BlindTask,
    Candidate,
    Choice,
    Comparison,
    Demonstration,
    Erasure,
    Prompt,
    Rating,
    StoredCompletion,
    decode,
    name_digest,
    new_id,
)
from feedback.removal import RawEntry
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore, LogEntry

MakeComparison = Callable[..., Comparison]

CANARY = "xanadu-canary-7"
BOB = {"principal": "bob", "labeler": "L-bob"}


@pytest.fixture
def server(state_dir: Path) -> Iterator[EmbeddedRedis]:
    with start_or_join(state_dir) as server:
        # What Redis compresses, no search of its files would find.
        with Redis.from_url(server.url) as client:
            client.config_set("rdbcompression", "no")
        yield server


@pytest.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(server.url, FeedbackSettings(socket_timeout_seconds=10))
    yield store
    await store.close()


@pytest.fixture
def redis(server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url, decode_responses=False) as client:
        yield client


def completion(name: str, principal: str, text: str, *, store: bool | None = None, **changes: Any) -> StoredCompletion:
    return StoredCompletion(
        id=name,
        object="text_completion",
        created=1000,
        principal=principal,
        model="policy-v1",
        policy_version=1,
        prompts=(Prompt(text=f"prompt {text}", token_ids=(1,)),),
        choices=(Choice(index=0, text=text, token_ids=(2,), logprobs=(-0.1,), finish_reason="stop"),),
        store=store,
    ).model_copy(update=changes)


def task(name: str, principal: str, prompt: Prompt) -> BlindTask:
    candidates = (Candidate(text=f"one for {principal}"), Candidate(text="two"))
    return BlindTask(id=name, created=1, expires=2, principal=principal, prompt=prompt, candidates=candidates)


def demonstration(principal: str, text: str) -> Demonstration:
    return Demonstration(
        id=new_id("demo_"), created=1, principal=principal, labeler="L", prompt=Prompt(text="p"), completion=text
    )


def rating(principal: str, text: str) -> Rating:
    candidate = Candidate(completion_id=f"cmpl-{principal}", policy_version=1, text=text)
    return Rating(
        id=new_id("rat_"),
        created=1,
        principal=principal,
        labeler="L",
        prompt=Prompt(text="p"),
        candidate=candidate,
        overall=3,
        comment=text,
    )


async def fill(store: FeedbackStore, make_comparison: MakeComparison) -> list[str]:
    """Everything that alice can leave, each with the canary in it, among bob's; returns the ids of bob's records."""
    bobs = []
    for number in range(150):  # more than one node of the stream
        mine = make_comparison(comment=f"{CANARY} {number}", candidates=texts(f"{CANARY} {number}"))
        await store.append(mine, idempotency_key=f"a{number}")
        other = make_comparison(**BOB, candidates=texts(f"bob {number}"))
        await store.append(other)
        bobs.append(other.id)
    for record in (
        demonstration("alice", CANARY),
        rating("alice", CANARY),
        demonstration("bob", "b"),
        rating("bob", "b"),
    ):
        await store.append(record)
        bobs += [record.id] if record.principal == "bob" else []
    await store.keep([completion("cmpl-alice", "alice", CANARY), completion("cmpl-bob", "bob", "b", store=True)])
    await store.keep([completion("cmpl-stored", "alice", f"{CANARY} stored", store=True)])
    pooled = next(one.prompt for one in await store.pool_prompts(10) if one.principal == "alice")
    assert CANARY in str(pooled.text)
    # Alice's prompt is shown to bob, who judges what the policy made of it.
    await store.keep_task(task("task_alice", "alice", Prompt(text=CANARY)))
    await store.keep_task(task("task_shown", "bob", pooled))
    await store.keep_task(task("task_bob", "bob", Prompt(text="his own")))
    await store.keep([completion("cmpl-shown", "bob", "shown", prompts=(pooled,))])
    await store.give("alice", pooled)
    await store.append(make_comparison(**BOB, source="task", prompt=pooled))
    return bobs


def texts(name: str) -> tuple[Candidate, ...]:
    return Candidate(text=f"{name} one"), Candidate(text=f"{name} two")


def files_with(state: Path, canary: str = CANARY) -> list[str]:
    """Files under the state directory that have the canary in them, as they are or in Parquet."""
    found = []
    for path in (path for path in state.rglob("*") if path.is_file()):
        held = b"".join(e.body for e in read_log(path)) if path.suffix == ".parquet" else path.read_bytes()
        if canary.encode() in held:
            found.append(path.name)
    return found


def in_memory(redis: Redis, canary: str = CANARY) -> list[bytes]:
    """Keys of whatever Redis would write to a file with the canary in it, names among it."""
    found = []
    for key in redis.scan_iter():
        kept: Any = redis.dump(key)
        value: Any = redis.get(key) if redis.type(key) == b"string" else b""
        body = zlib.decompress(value) if value.startswith(b"\x78\x9c") else value
        if canary.encode() in key + kept + body:
            found.append(key)
    return found


async def test_nothing_of_the_principal_is_left_anywhere_and_all_of_others_is(
    store: FeedbackStore, redis: Redis, state_dir: Path, make_comparison: MakeComparison
) -> None:
    bobs = await fill(store, make_comparison)
    folder = state_dir / "archive"
    await archive(store, folder)
    assert files_with(state_dir) and in_memory(redis)
    assert len([key for key in redis.scan_iter("fb:idem:*")]) == 305
    expected = await survey(store, "alice", folder)
    assert (expected.erasure_id, expected.records, expected.completions) == (None, 153, 3)
    assert files_with(state_dir)

    done = await erase(store, "alice", folder, by="root")
    assert (done.records, done.completions, done.tasks, done.archived) == (153, 3, 2, 153)
    assert files_with(state_dir) == []
    assert in_memory(redis) == []
    entries = [entry async for entry in store.scan()]
    assert [entry.record.id for entry in entries] == [*bobs, done.erasure_id]
    assert entries[-1].record == Erasure(
        id=done.erasure_id or "", created=entries[-1].record.created, principal="root", erased=name_digest("alice")
    )
    assert [entry.record.id for entry in map(as_entry, read_log(sorted(folder.glob("*.parquet"))[0]))] == bobs

    assert {key for key in redis.scan_iter() if b"alice" in key} == set()
    assert len(list(redis.scan_iter("fb:idem:*"))) == len(bobs) + 1
    assert len(list(redis.scan_iter("fb:id:*"))) == len(bobs) + 1
    assert len(list(redis.scan_iter("fb:pair:*"))) == 151
    assert sorted(redis.scan_iter("gen:*")) == [b"gen:by:bob", b"gen:cmpl-bob"]
    seen = {keys.given_prompts(labeler).encode() for labeler in ("L-bob", "bob")}
    assert set(redis.scan_iter("task:*")) - seen == {b"task:task_bob"}
    assert redis.zrange(keys.POOL, 0, -1) == [b"cmpl-bob"]
    assert await store.unfinished_erasures() == set()
    assert not redis.exists(keys.LOG_COPY, keys.ERASURE_LEASE)
    assert all(await store.in_force([e.record for e in entries if isinstance(e.record, Comparison)]))


def as_entry(entry: RawEntry) -> LogEntry:
    return LogEntry(entry.stream_id, decode(entry.body, entry.sha256))


async def test_deleting_alone_would_leave_the_bytes(
    store: FeedbackStore, redis: Redis, state_dir: Path, make_comparison: MakeComparison
) -> None:
    """Why the log is copied: should a Redis ever clean its streams itself, this says so."""
    await store.append(make_comparison(comment=CANARY))
    await store.append(make_comparison(**BOB))
    [batch] = [batch async for batch in store.raw_batches()]
    assert await store.remove([(batch[0], None)]) == 1
    assert await store.remove([(batch[0], None)]) == 0
    await store.rewrite_files()
    assert files_with(state_dir) == ["appendonly.aof"]
    async with store.erasing() as holder:
        await store.copy_log(holder)
    await store.rewrite_files()
    assert files_with(state_dir) == []


async def test_who_is_unknown_leaves_no_trace(
    store: FeedbackStore, state_dir: Path, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison())
    done = await erase(store, "nobody", state_dir / "archive", by="root")
    assert done == erasure.ErasureReport(None, 0, 0, 0, 0, 0)
    assert await store.head() == first.stream_id
    assert not (state_dir / "archive").exists()


async def test_what_comes_after_an_erasure_is_kept_and_may_be_posted_again(
    store: FeedbackStore, state_dir: Path, make_comparison: MakeComparison
) -> None:
    before = make_comparison()
    await store.append(before, idempotency_key="k", body_digest="b")
    await erase(store, "alice", state_dir / "archive", by="root")
    after = await store.append(make_comparison(), idempotency_key="k", body_digest="another")
    assert not after.replayed
    kept = [entry async for entry in store.scan()]
    assert [entry.record.kind for entry in kept] == ["erasure", "comparison"]
    assert surviving(kept) == kept


async def test_a_reader_that_knows_the_erasure_uses_nothing_it_covers(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    shown = make_comparison(**BOB, prompt=Prompt(text="hers", asked_by="alice"))
    erased = Erasure(id="era_1", created=1, principal="root", erased=name_digest("alice"))
    for record in (make_comparison(), shown, make_comparison(**BOB), erased, make_comparison(comment="later")):
        await store.append(record)
    kept = surviving([entry async for entry in store.scan()])
    assert [entry.record.principal for entry in kept] == ["bob", "root", "alice"]


async def test_damaged_records_go_where_their_bytes_name_the_principal(
    store: FeedbackStore, redis: Redis, state_dir: Path, make_comparison: MakeComparison
) -> None:
    body = make_comparison(comment=CANARY).model_dump_json()
    redis.xadd(keys.LOG, {"kind": "comparison", "id": "cmp_x", "json": body, "sha256": "0" * 64})
    redis.xadd(keys.LOG, {"kind": "comparison", "id": "cmp_y", "json": "{}", "sha256": "0" * 64})
    await store.append(make_comparison(**BOB))
    done = await erase(store, "alice", state_dir / "archive", by="root")
    assert (done.records, done.unreadable) == (1, 1)
    assert files_with(state_dir) == []


async def test_a_stored_completion_that_cannot_be_read_goes_with_its_makers_index(
    store: FeedbackStore, redis: Redis, state_dir: Path
) -> None:
    await store.keep([completion("cmpl-1", "alice", CANARY, store=True)])
    redis.set("gen:cmpl-1", f"not zlib {CANARY}")
    await store.keep([completion("cmpl-2", "alice", "fine", store=True)])
    done = await erase(store, "alice", state_dir / "archive", by="root")
    assert done.completions == 2
    assert list(redis.scan_iter("gen:*")) == []
    assert files_with(state_dir) == []


async def test_a_damaged_archive_keeps_nothing_else_from_being_erased(
    store: FeedbackStore, redis: Redis, state_dir: Path, make_comparison: MakeComparison
) -> None:
    bobs = await fill(store, make_comparison)
    folder = state_dir / "archive"
    await archive(store, folder)
    [file] = folder.glob("*.parquet")
    whole = file.read_bytes()
    file.write_bytes(b"PAR1")
    with pytest.raises(FileDamaged, match="cannot be read"):
        await erase(store, "alice", folder, by="root")
    assert in_memory(redis) == []
    assert [e.record.id async for e in store.scan() if e.record.kind != "erasure"] == bobs
    assert await store.unfinished_erasures() == {name_digest("alice")}
    file.write_bytes(whole)  # as it came back from a backup
    assert (await erase(store, "alice", folder, by="root")).archived == 153
    assert files_with(state_dir) == []


async def test_what_only_the_archive_has_is_erased(
    store: FeedbackStore, state_dir: Path, make_comparison: MakeComparison
) -> None:
    folder = state_dir / "archive"
    await store.append(make_comparison(comment=CANARY))
    await archive(store, folder)
    [batch] = [batch async for batch in store.raw_batches()]
    await store.remove([(entry, None) for entry in batch])
    done = await erase(store, "alice", folder, by="root")
    assert (done.records, done.archived) == (0, 1)
    assert [list(read_log(file)) for file in folder.glob("*.parquet")] == [[]]


STEPS = ["begin_erasure", "append", "remove", "forget_idempotency", "delete_completions", "delete_tasks", "copy_log"]


@pytest.mark.parametrize("step", [*STEPS, "rewrite_files", "end_erasure"])
async def test_interrupted_at_any_step_it_is_finished_by_running_it_again(
    store: FeedbackStore,
    redis: Redis,
    state_dir: Path,
    make_comparison: MakeComparison,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    bobs = await fill(store, make_comparison)
    folder = state_dir / "archive"
    await archive(store, folder)
    honest = getattr(store, step)

    async def done_then_cut_off(*arguments: Any, **more: Any) -> None:
        await honest(*arguments, **more)
        raise StoreUnavailable("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(store, step, done_then_cut_off)
        with pytest.raises(FeedbackError, match="cut off"):
            await erase(store, "alice", folder, by="root")
    if step != "end_erasure":
        assert await store.unfinished_erasures() == {name_digest("alice")}
    await erase(store, "alice", folder, by="root")
    assert files_with(state_dir) == []
    assert in_memory(redis) == []
    assert [e.record.id async for e in store.scan() if e.record.kind != "erasure"] == bobs
    assert not list(redis.scan_iter("gen:*alice*")) and not redis.exists(keys.LOG_COPY)
    assert len(list(redis.scan_iter("fb:idem:*"))) == redis.xlen(keys.LOG)
    assert await store.unfinished_erasures() == set()


async def test_killed_for_real_it_is_finished_by_running_it_again(
    store: FeedbackStore, redis: Redis, server: EmbeddedRedis, state_dir: Path, make_comparison: MakeComparison
) -> None:
    bobs = await fill(store, make_comparison)
    await archive(store, state_dir / "archive")
    command = [sys.executable, "-m", "feedback", "erase", "alice", "--state", str(state_dir)]
    killed = 0
    for seconds in (0.0, 0.01, 0.03, 0.08):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not redis.exists(keys.ERASURE_LEASE) and process.poll() is None:
                await asyncio.sleep(0.001)
            await asyncio.sleep(seconds)
            killed += process.poll() is None
            process.kill()
        redis.delete(keys.ERASURE_LEASE)  # rather than wait until it expires
    assert killed
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert files_with(state_dir) == []
    assert in_memory(redis) == []
    assert [e.record.id async for e in store.scan() if e.record.kind != "erasure"] == bobs
