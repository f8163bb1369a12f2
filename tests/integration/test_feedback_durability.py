"""What happens to feedback when Redis is killed, stopped, full, misconfigured, cut short or tampered with."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from feedback.embedded import EmbeddedRedis, start_or_join
from feedback.errors import StoreUnavailable
from feedback.records import Comparison
from feedback.settings import FeedbackSettings
from feedback.store import Appended, FeedbackStore, LogEntry

MakeComparison = Callable[..., Comparison]


@pytest.fixture
def server(state_dir: Path) -> Iterator[EmbeddedRedis]:
    with start_or_join(state_dir) as server:
        yield server


@pytest.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(server.url, FeedbackSettings())
    yield store
    await store.close()


def send_signal(url: str, number: signal.Signals) -> int:
    with Redis.from_url(url) as client:
        pid: int = client.info("server")["process_id"]
    os.kill(pid, number)
    return pid


def labeler_of(entry: Appended | LogEntry) -> str:
    assert isinstance(entry.record, Comparison)
    return entry.record.labeler


async def until_it_works(store: FeedbackStore) -> float:
    began = time.monotonic()
    while problems := await store.durability_problems():
        assert time.monotonic() - began < 10, problems
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_kill_9_under_load_loses_nothing_acknowledged_and_doubles_nothing(
    server: EmbeddedRedis, store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    acknowledged: dict[str, str] = {}
    refused = 0
    stop = asyncio.Event()

    async def client(name: int) -> None:
        nonlocal refused
        number = 0
        while not stop.is_set():
            record = make_comparison(labeler=f"L-{name}-{number}")
            try:
                appended = await store.append(record)
            except StoreUnavailable:
                refused += 1  # unknown outcome: the same record again must still be one
                await asyncio.sleep(0.02)
                continue
            assert labeler_of(appended) == record.labeler
            acknowledged[record.labeler] = appended.stream_id
            number += 1

    clients = [asyncio.create_task(client(name)) for name in range(16)]
    for _ in range(5):
        before = len(acknowledged)
        await asyncio.sleep(0.3)
        async with asyncio.timeout(30):
            while len(acknowledged) == before:
                await asyncio.sleep(0.02)
        send_signal(server.url, signal.SIGKILL)
        await asyncio.sleep(0.05)
        await until_it_works(store)
    stop.set()
    await asyncio.gather(*clients)

    stored = [(labeler_of(entry), entry.stream_id) async for entry in store.scan()]
    assert refused >= 5
    assert len({labeler for labeler, _ in stored}) == len(stored)
    assert acknowledged.items() <= dict(stored).items()
    assert store.quarantined == 0


async def test_a_stopped_redis_is_said_to_be_unavailable_in_time_and_serves_again(
    server: EmbeddedRedis, store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    await store.append(make_comparison())
    pid = send_signal(server.url, signal.SIGSTOP)
    try:
        began = time.monotonic()
        calls = [store.append(make_comparison(labeler=f"L-{i}")) for i in range(300)]
        answers = await asyncio.gather(*calls, store.completion("x"), store.head(), return_exceptions=True)
        assert time.monotonic() - began < 1.5
        assert {type(answer) for answer in answers} == {StoreUnavailable}
        assert await store.durability_problems() == [f"Redis at {server.url} did not answer within 1 s"]
    finally:
        os.kill(pid, signal.SIGCONT)
    again = await store.append(make_comparison(labeler="L-0"))
    assert [labeler_of(entry) async for entry in store.scan()].count("L-0") == 1
    assert await store.record(again.record.id) == again.record


async def test_a_redis_that_is_gone_is_said_to_be_unavailable_in_time(
    state_dir: Path, make_comparison: MakeComparison
) -> None:
    with start_or_join(state_dir) as server:
        store = FeedbackStore.connect(server.url, FeedbackSettings())
        first = await store.append(make_comparison())
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="Redis at unix://"):
        await store.append(make_comparison(labeler="L-2"))
    assert time.monotonic() - began < 1.5
    with start_or_join(state_dir):
        assert [entry.stream_id async for entry in store.scan()] == [first.stream_id]
        assert not (await store.append(make_comparison(labeler="L-2"))).replayed
        await store.close()


async def test_a_password_in_the_address_is_not_told(make_comparison: MakeComparison) -> None:
    store = FeedbackStore.connect("redis://user:hunter2@127.0.0.1:1/0", FeedbackSettings())
    with pytest.raises(StoreUnavailable) as caught:
        await store.append(make_comparison())
    assert "hunter2" not in str(caught.value)
    await store.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("appendonly", "no"), ("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")],
)
async def test_a_policy_set_wrong_live_is_reported(
    server: EmbeddedRedis, store: FeedbackStore, name: str, value: str
) -> None:
    assert await store.durability_problems() == []
    with Redis.from_url(server.url) as client:
        client.config_set(name, value)
    [problem] = await store.durability_problems()
    assert f"{name} {value}" in problem


async def test_a_full_redis_refuses_a_record_whole_and_takes_it_when_there_is_room(
    server: EmbeddedRedis, store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    await store.append(make_comparison())
    with Redis.from_url(server.url) as client:
        keys_before = sorted(client.keys("fb:*"))
        client.config_set("maxmemory", "100kb")
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            await store.append(make_comparison(labeler="L-2"))
        assert "maxmemory" in (await store.durability_problems())[0]
        assert sorted(client.keys("fb:*")) == keys_before
        client.config_set("maxmemory", "0")
    assert not (await store.append(make_comparison(labeler="L-2"))).replayed


async def fill(state: Path, make_comparison: MakeComparison) -> Path:
    """Append three records and stop; the file they are in."""
    with start_or_join(state) as server:
        store = FeedbackStore.connect(server.url, FeedbackSettings())
        for number in range(3):
            await store.append(make_comparison(labeler=f"L-{number}", comment=f"comment {number}"))
        await store.close()
    return state / "redis" / "appendonly.aof"


async def comments(state: Path) -> tuple[list[str | None], int]:
    with start_or_join(state) as server:
        store = FeedbackStore.connect(server.url, FeedbackSettings())
        found = [entry.record.comment async for entry in store.scan() if isinstance(entry.record, Comparison)]
        await store.close()
        return found, store.quarantined


async def test_a_log_cut_short_loses_only_its_last_record(state_dir: Path, make_comparison: MakeComparison) -> None:
    file = await fill(state_dir, make_comparison)
    last = file.read_bytes().rindex(b"comment 2")
    os.truncate(file, last)
    assert await comments(state_dir) == (["comment 0", "comment 1"], 0)


async def test_a_byte_flipped_inside_a_record_quarantines_that_record(
    state_dir: Path, make_comparison: MakeComparison
) -> None:
    file = await fill(state_dir, make_comparison)
    file.write_bytes(file.read_bytes().replace(b"comment 1", b"comment 9"))
    assert await comments(state_dir) == (["comment 0", "comment 2"], 1)
