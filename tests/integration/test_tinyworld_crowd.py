"""The simulated people on a real server: what they post is kept, and what fails is tallied."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from running_server import RunningServer

from feedback.records import Comparison, Demonstration
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from train.tinyworld import labelers, tasks
from train.tinyworld.crowd import Crowd, CrowdFailed
from train.tinyworld.tasks import Task

pytestmark = pytest.mark.engine


def asked(count: int, seed: int) -> list[Task]:
    rng = random.Random(seed)
    return [tasks.draw(rng, test=False) for _ in range(count)]


@pytest.fixture
async def crowd(server: RunningServer) -> AsyncIterator[Crowd]:
    async with Crowd(server.url, labelers.population(3, seed=1), at_once=4) as crowd:
        yield crowd


@pytest.fixture
async def store(server: RunningServer) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(server.redis_url, FeedbackSettings())
    yield store
    await store.close()


async def test_rankings_are_of_k_candidates_by_the_labelers_in_turn(crowd: Crowd, store: FeedbackStore) -> None:
    done: list[None] = []
    await crowd.compare(asked(6, seed=1), 4, lambda: done.append(None))
    kept = [await store.record(comparison_id) for comparison_id in crowd.acknowledged]
    assert len(done) == len(kept) == 6
    assert all(isinstance(one, Comparison) and len(one.candidates) == 4 for one in kept)
    assert sorted(one.labeler for one in kept if isinstance(one, Comparison)) == [
        f"labeler-0{n}" for n in (1, 1, 2, 2, 3, 3)
    ]
    assert (crowd.tally.requests, crowd.tally.failed) == (6 * 3, 0)


async def test_blind_pairs_and_demonstrations(crowd: Crowd, store: FeedbackStore) -> None:
    await crowd.judge_blind(asked(2, seed=2), lambda: None)
    kept = [await store.record(comparison_id) for comparison_id in crowd.acknowledged]
    assert [one.source for one in kept if isinstance(one, Comparison)] == ["task", "task"]
    before = await store.head()
    await crowd.demonstrate(asked(3, seed=3), 1, lambda: None)
    written = [entry.record async for entry in store.scan(after=before)]
    assert len(written) == 3 and all(isinstance(record, Demonstration) for record in written)
    assert crowd.tally.failed == 0


async def test_sample_sets_are_by_the_named_version_in_the_order_of_the_tasks(crowd: Crowd) -> None:
    sets = await crowd.sample_sets(asked(5, seed=4), "policy-v1", 2, lambda: None)
    assert [len(samples) for samples in sets] == [5, 5]
    with pytest.raises(CrowdFailed, match="policy-v9"):
        await crowd.sample_sets(asked(1, seed=4), "policy-v9", 1, lambda: None)
    assert crowd.tally.failed == 1


async def test_visitors_keep_asking_until_they_are_sent_away(crowd: Crowd) -> None:
    visitor = asyncio.create_task(crowd.visit(1, pause_seconds=0.01))
    async with asyncio.timeout(30):
        while crowd.tally.requests < 8:
            await asyncio.sleep(0.05)
    assert not visitor.done()
    visitor.cancel()
    await asyncio.gather(visitor, return_exceptions=True)
    assert crowd.tally.failed == 0


async def test_a_server_that_is_gone_is_tallied_and_does_not_stop_the_crowd() -> None:
    async with Crowd("http://127.0.0.1:9", labelers.population(1, seed=1)) as crowd:
        await crowd.compare(asked(2, seed=5), 3, lambda: None)
        assert crowd.tally.failed == crowd.tally.requests > 0
        assert crowd.acknowledged == set()
