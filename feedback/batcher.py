"""Group commit: callers that arrive while a batch is under way share the next one, and so one fsync."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_BATCH = 256
"""Most items in one batch: about 0.1 s of redis-server's time, so that overload sheds callers and not batches."""


@dataclass(frozen=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    since: float
    answer: asyncio.Future[Answer]


class Batcher(Generic[Item, Answer]):
    """Sends what its callers submit in batches, one batch at a time, and gives each caller its own answer.

    Args:
        send: sends a batch; returns one answer, or the exception to raise, for each item in order. Where it raises,
            nobody in the batch or waiting behind it gets another answer than that exception.
        max_wait_seconds: longest time an item waits for its batch to begin.
        too_late: makes the exception for an item that waited longer; the item was not sent.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | Exception]]],
        *,
        max_wait_seconds: float,
        too_late: Callable[[], Exception],
    ) -> None:
        self._send = send
        self._max_wait_seconds = max_wait_seconds
        self._too_late = too_late
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Answer:
        """Send ``item`` with the next batch and return its answer. An item whose caller leaves first is not sent."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(_Waiting(item, loop.time(), answer))
        if self._sender is None or self._sender.done():
            self._sender = loop.create_task(self._send_batches())
        return await answer

    async def close(self) -> None:
        """Wait until everything submitted so far is answered."""
        if self._sender is not None:
            await self._sender

    async def _send_batches(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # the callers that are ready in this turn of the event loop come along
            batch = self._next_batch()
            try:
                answers = await self._send([waiting.item for waiting in batch])
            except Exception as error:
                behind, self._waiting = self._waiting, deque()
                for waiting in [*batch, *behind]:
                    _settle(waiting.answer, error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                _settle(waiting.answer, answer)

    def _next_batch(self) -> list[_Waiting[Item, Answer]]:
        batch: list[_Waiting[Item, Answer]] = []
        oldest = asyncio.get_running_loop().time() - self._max_wait_seconds
        while self._waiting and len(batch) < MAX_BATCH:
            waiting = self._waiting.popleft()
            if waiting.since < oldest:
                _settle(waiting.answer, self._too_late())
            elif not waiting.answer.done():
                batch.append(waiting)
        return batch


def _settle(future: asyncio.Future[Answer], answer: Answer | Exception) -> None:
    if future.done():  # its caller was cancelled
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
