"""What principals asked to keep: walked in order, changed and deleted while others do the same."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis import Redis

from feedback.completion_store import NotStored
from feedback.records import Choice, Prompt, StoredCompletion
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings())
    yield store
    await store.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def completion(name: str, created: int = 1000, *, principal: str = "alice", **changes: Any) -> StoredCompletion:
    return StoredCompletion(
        id=name,
        object="chat.completion",
        created=created,
        principal=principal,
        model="policy-v1",
        policy_version=1,
        prompts=(Prompt(messages=({"role": "user", "content": f"prompt of {name}"},), token_ids=(1, 2)),),
        choices=(Choice(index=0, text="text", token_ids=(3,), logprobs=(-0.1,), finish_reason="stop"),),
        store=True,
    ).model_copy(update=changes)


async def ids(store: FeedbackStore, principal: str = "alice", **how: Any) -> list[str]:
    return [found.id async for found in store.stored(principal, **how)]


async def pages(store: FeedbackStore, size: int, *, newest_first: bool) -> list[str]:
    """All ids, read as a client pages: each page begins behind the last id of the one before."""
    seen: list[str] = []
    while True:
        page = []
        async for found in store.stored(
            "alice", after=seen[-1] if seen else None, newest_first=newest_first, batch=size
        ):
            page.append(found.id)
            if len(page) == size:
                break
        seen += page
        if len(page) < size:
            return seen


async def test_only_a_principals_own_with_store_true_by_time_then_id(store: FeedbackStore) -> None:
    await store.keep(
        [
            completion("c", 3),
            completion("b2", 2),
            completion("b1", 2),
            completion("a", 1),
            completion("text", 2, object="text_completion"),
            completion("expires", 2, store=None),
            completion("bob's", 2, principal="bob"),
        ]
    )
    assert await ids(store) == ["a", "b1", "b2", "text", "c"]
    assert await ids(store, newest_first=True) == ["c", "text", "b2", "b1", "a"]
    assert await ids(store, after="b1", batch=1) == ["b2", "text", "c"]
    assert await ids(store, after="b2", newest_first=True) == ["b1", "a"]
    assert await ids(store, after="c") == []
    assert await ids(store, "bob") == ["bob's"]
    assert await ids(store, "nobody") == []


@pytest.mark.parametrize("unknown", ["never", "expires", "bob's", ""])
async def test_behind_what_is_not_stored_there_is_no_place(store: FeedbackStore, unknown: str) -> None:
    await store.keep([completion("a"), completion("expires", store=None), completion("bob's", principal="bob")])
    with pytest.raises(NotStored):
        await ids(store, after=unknown)


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_pages_of_one_second_hold_each_completion_once(store: FeedbackStore, size: int) -> None:
    names = [f"{number:03d}" for number in range(150)]
    await store.keep([completion(name) for name in random.Random(1).sample(names, len(names))])
    assert await pages(store, size, newest_first=False) == names
    assert await pages(store, size, newest_first=True) == names[::-1]


@pytest.mark.parametrize("newest_first", [False, True])
async def test_deleting_each_on_the_way_misses_none(store: FeedbackStore, redis: Redis, newest_first: bool) -> None:
    kept = [completion(f"{number:02d}", 1000 + number // 7) for number in range(40)]
    await store.keep(kept)
    seen = []
    async for found in store.stored("alice", newest_first=newest_first, batch=1):
        seen.append(found)
        assert await store.delete_completion(found)
    assert seen == (kept[::-1] if newest_first else kept)
    assert redis.keys("gen:*") == []


@pytest.mark.parametrize("seed", range(8))
async def test_a_walk_sees_what_stays_once_and_in_order_whatever_else_goes(store: FeedbackStore, seed: int) -> None:
    draw = random.Random(seed)
    kept = [completion(f"{number:03d}", 1000 + draw.randrange(5)) for number in range(60)]
    await store.keep(kept)
    left = {one.id: one for one in kept}
    newest_first, seen = draw.random() < 0.5, list[StoredCompletion]()
    async for found in store.stored("alice", newest_first=newest_first, batch=draw.randrange(1, 9)):
        seen.append(found)
        for name in draw.sample(sorted(left), min(len(left), draw.randrange(3))):
            await store.delete_completion(left.pop(name))
    order = [(one.created, one.id) for one in seen]
    assert order == sorted(set(order), reverse=newest_first)
    assert set(left) <= {one.id for one in seen}


async def test_ids_without_a_completion_leave_the_index(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([completion(f"{number:02d}") for number in range(20)])
    redis.delete(*(f"gen:{number:02d}" for number in range(5, 20)))
    assert await ids(store, batch=3) == ["00", "01", "02", "03", "04"]
    assert redis.zrange("gen:by:alice", 0, -1) == ["00", "01", "02", "03", "04"]


async def test_a_damaged_one_is_left_out_and_said(
    store: FeedbackStore, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await store.keep([completion("a"), completion("b"), completion("c")])
    redis.set("gen:b", "not zlib")
    with caplog.at_level(logging.ERROR):
        assert await ids(store) == ["a", "c"]
    assert "completion b is left out" in caplog.text
    assert redis.exists("gen:b")


async def test_ten_thousand_are_walked_a_part_at_a_time(store: FeedbackStore, redis: Redis) -> None:
    names = [f"chatcmpl-{number:032x}" for number in range(10_000)]
    for start in range(0, len(names), 250):
        await store.keep([completion(name, 1000 + start // 1000) for name in names[start : start + 250]])

    def sent() -> int:
        figures: Any = redis.info("stats")
        return int(figures["total_net_output_bytes"])

    before = sent()
    first = []
    walk = store.stored("alice", after=names[5000], batch=21)
    async for found in walk:
        first.append(found.id)
        if len(first) == 21:
            break
    await walk.aclose()
    assert first == names[5001:5022]
    assert sent() - before < 50_000  # the ids alone are 410 000 bytes
    assert await pages(store, 1000, newest_first=False) == names


async def test_new_metadata_changes_nothing_else(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([completion("a", metadata={"old": "1"}), completion("b", store=None)])
    redis.expire("gen:b", 100)
    changed = await store.set_metadata("a", {"new": "2"})
    assert changed == completion("a", metadata={"new": "2"}) == await store.completion("a")
    assert await store.set_metadata("b", {"k": "v"}) == await store.completion("b")
    assert redis.ttl("gen:a") == -1
    assert 95 <= redis.ttl("gen:b") <= 100
    assert await store.set_metadata("never", {"k": "v"}) is None
    assert not redis.exists("gen:never")


async def test_a_change_never_brings_a_deleted_one_back(store: FeedbackStore, redis: Redis) -> None:
    outcomes = set()
    for number in range(100):
        one = completion(f"{number}")
        await store.keep([one])
        # What changes it reads before and writes after the deletion, in some rounds.
        *changed, deleted = await asyncio.gather(
            *(store.set_metadata(one.id, {"round": str(i)}) for i in range(4)), store.delete_completion(one)
        )
        assert deleted
        outcomes |= {change is None for change in changed}
        assert await store.completion(one.id) is None
    assert True in outcomes
    assert redis.keys("gen:*") == []


async def test_a_deleted_one_is_nowhere(store: FeedbackStore, redis: Redis) -> None:
    both = [completion("a"), completion("b", store=None), completion("c")]
    await store.keep(both)
    assert [await store.delete_completion(one) for one in both[:2]] == [True, True]
    assert redis.zrange("pool:prompts", 0, -1) == redis.zrange("gen:by:alice", 0, -1) == ["c"]
    assert sorted(redis.keys("gen:*")) == ["gen:by:alice", "gen:c"]
    assert await store.delete_completion(both[0]) is False
    assert [p.prompt.key() for p in await store.pool_prompts(5)] == [both[2].prompts[0].key()]


async def test_an_id_that_spells_another_key_is_no_completion(store: FeedbackStore) -> None:
    await store.keep([completion("a")])
    assert await store.completion("by:alice") is None
    assert await store.set_metadata("by:alice", {}) is None
    assert await ids(store) == ["a"]
