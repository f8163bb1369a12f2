"""The copy that takes the log's place in an erasure, beside writers and other erasures; the wait for Redis's file."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from feedback import keys, removal
from feedback.erasure import erase
from feedback.errors import StoreUnavailable
from feedback.records import Comparison
from feedback.removal import ErasureUnderWay
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

MakeComparison = Callable[..., Comparison]


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings(socket_timeout_seconds=10))
    yield store
    await store.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


async def test_records_appended_while_the_log_is_copied_are_in_it(
    store: FeedbackStore, make_comparison: MakeComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "COPY_BATCH", 7)
    before = await asyncio.gather(*(store.append(make_comparison(labeler=f"L-{n}")) for n in range(300)))
    [batch] = [batch async for batch in store.raw_batches()]
    gone = {entry.stream_id for entry in batch[::2]}
    await store.remove([(entry, None) for entry in batch[::2]])
    acknowledged: list[str] = []

    async def writer(name: int) -> None:
        while True:
            record = make_comparison(labeler=f"{name} {len(acknowledged)}")
            acknowledged.append((await store.append(record)).stream_id)

    writers = [asyncio.create_task(writer(name)) for name in range(3)]
    async with store.erasing() as holder:
        await store.copy_log(holder)
    during = len(acknowledged)
    for one in writers:
        one.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    there = [entry.stream_id async for entry in store.scan()]
    assert during > 5
    assert set(acknowledged) | {one.stream_id for one in before} - gone <= set(there)
    assert not gone & set(there)
    assert there == sorted(set(there), key=lambda one: tuple(map(int, one.split("-"))))


async def test_a_stream_id_is_not_given_again_where_the_newest_records_went(
    store: FeedbackStore, redis: Redis, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison())
    redis.xadd(keys.LOG, {"json": "{}"}, id="99999999999999-5")
    redis.xdel(keys.LOG, "99999999999999-5")
    async with store.erasing() as holder:
        await store.copy_log(holder)
    after = await store.append(make_comparison(principal="bob"))
    assert (first.stream_id, after.stream_id) == ((await anext(store.scan())).stream_id, "99999999999999-6")


async def test_two_erasures_at_once_are_refused(store: FeedbackStore, tmp_path: Path) -> None:
    async with store.erasing():
        with pytest.raises(ErasureUnderWay, match="another erasure"):
            await erase(store, "alice", tmp_path, by="root")
    await erase(store, "alice", tmp_path, by="root")


async def test_a_copy_whose_lease_has_passed_to_another_writes_nothing(
    store: FeedbackStore, redis: Redis, make_comparison: MakeComparison
) -> None:
    await store.append(make_comparison())
    async with store.erasing():
        with pytest.raises(ErasureUnderWay, match="run again"):
            await store.copy_log("somebody else")
    assert not redis.exists(keys.LOG_COPY)
    assert redis.xlen(keys.LOG) == 1


async def test_the_lease_is_renewed_while_an_erasure_takes_long(
    store: FeedbackStore, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "ERASURE_LEASE_SECONDS", 4)
    async with store.erasing() as holder, asyncio.timeout(30):
        for _ in range(2):
            redis.expire(keys.ERASURE_LEASE, 1000)
            while redis.ttl(keys.ERASURE_LEASE) > 4:
                await asyncio.sleep(0.05)
            assert redis.get(keys.ERASURE_LEASE) == holder.encode()
    assert not redis.exists(keys.ERASURE_LEASE)


async def test_a_file_that_redis_does_not_write_in_time_leaves_the_erasure_unfinished(
    store: FeedbackStore, redis: Redis, make_comparison: MakeComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.append(make_comparison())
    redis.config_set("rdb-key-save-delay", 200_000)  # microseconds for each of the keys that are left
    try:
        with monkeypatch.context() as patch:
            patch.setattr(removal, "REWRITE_SECONDS", 0.2)
            with pytest.raises(StoreUnavailable, match="append-only file anew within"):
                await erase(store, "alice", tmp_path, by="root")
    finally:
        redis.config_set("rdb-key-save-delay", 0)
    assert len(await store.unfinished_erasures()) == 1
    await erase(store, "alice", tmp_path, by="root")
    assert await store.unfinished_erasures() == set()
