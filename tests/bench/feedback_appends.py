"""Appends in this process, without HTTP: group commit beside one EVALSHA a record, and many records in a row."""

import asyncio
import time
from collections.abc import Callable, Iterator

from feedback_comparisons import comparison
from redis.asyncio import Redis

from feedback.batcher import Answer, Batcher, Item
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore


class _OneByOne(Batcher[Item, Answer]):
    """Sends each item by itself, at once."""

    async def submit(self, item: Item) -> Answer:
        (answer,) = await self._send([item])
        if isinstance(answer, Exception):
            raise answer
        return answer


class NaiveStore(FeedbackStore):
    """The same records by the same script, each a command of its own on a connection of its own."""

    def __init__(self, client: Redis, settings: FeedbackSettings, where: str) -> None:
        super().__init__(client, settings, where)
        self._appends = _OneByOne(self._send_appends, max_wait_seconds=0.0, too_late=TimeoutError)


async def append_many(
    store: FeedbackStore, numbers: Iterator[int], count: int, callers: int, tick: Callable[[int], None] | None = None
) -> float:
    """``callers`` append ``count`` comparisons in all; returns the seconds it took.

    Args:
        tick: Called now and then with how many are appended.
    """
    left, done = iter(range(count)), 0

    async def call() -> None:
        nonlocal done
        for _ in left:
            await store.append(comparison(next(numbers)))
            done += 1
            if tick is not None and done % 1000 == 0:
                tick(done)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(call())
    return time.perf_counter() - began
