import asyncio
from collections.abc import Sequence

import pytest

from feedback.batcher import MAX_BATCH, Batcher


class Late(Exception):
    pass


class Doubler:
    """Answers twice the number, an error for a negative one; a batch with 13 fails as a whole.

    Once ``hold`` was awaited, a batch is under way, until ``let_go``.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self._free = asyncio.Event()
        self._free.set()

    async def send(self, batch: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(batch))
        await self._free.wait()
        if 13 in batch:
            raise ConnectionError("13")
        return [2 * n if n >= 0 else ValueError(n) for n in batch]

    async def hold(self, group: Batcher[int, int], number: int) -> asyncio.Task[int]:
        self._free.clear()
        task = asyncio.create_task(group.submit(number))
        while not self.batches:
            await asyncio.sleep(0)
        return task

    def let_go(self) -> None:
        self._free.set()


def batcher(doubler: Doubler, max_wait_seconds: float = 10.0) -> Batcher[int, int]:
    return Batcher(doubler.send, max_wait_seconds=max_wait_seconds, too_late=Late)


async def test_callers_of_one_turn_share_a_batch_and_get_their_own_answers() -> None:
    doubler = Doubler()
    answers = await asyncio.gather(*map(batcher(doubler).submit, range(100, 164)))
    assert answers == [2 * n for n in range(100, 164)]
    assert len(doubler.batches) <= 2


async def test_one_error_is_only_its_callers() -> None:
    answers = await asyncio.gather(*map(batcher(Doubler()).submit, [1, -1, 2]), return_exceptions=True)
    assert answers[0] == 2
    assert isinstance(answers[1], ValueError)
    assert answers[2] == 4


async def test_a_failed_batch_fails_those_who_wait_behind_it_and_the_next_one_works() -> None:
    doubler = Doubler()
    group = batcher(doubler)
    first = await doubler.hold(group, 13)
    behind = asyncio.create_task(group.submit(1))
    await asyncio.sleep(0)
    doubler.let_go()
    for task in (first, behind):
        with pytest.raises(ConnectionError, match="13"):
            await task
    assert doubler.batches == [[13]]
    assert await group.submit(2) == 4


async def test_a_batch_is_bounded() -> None:
    doubler = Doubler()
    await asyncio.gather(*map(batcher(doubler).submit, range(2 * MAX_BATCH + 20, 4 * MAX_BATCH + 40)))
    assert max(len(batch) for batch in doubler.batches) == MAX_BATCH


async def test_who_waited_too_long_is_told_so_and_not_sent() -> None:
    doubler = Doubler()
    group = batcher(doubler, max_wait_seconds=0.2)
    first = await doubler.hold(group, 1)
    late = asyncio.create_task(group.submit(2))
    await asyncio.sleep(0.25)
    doubler.let_go()
    with pytest.raises(Late):
        await late
    assert await first == 2
    await group.close()
    assert [n for batch in doubler.batches for n in batch] == [1]


async def test_an_item_whose_caller_left_is_not_sent() -> None:
    doubler = Doubler()
    group = batcher(doubler)
    first = await doubler.hold(group, 1)
    left = asyncio.create_task(group.submit(2))
    await asyncio.sleep(0)
    left.cancel()
    doubler.let_go()
    await first
    await group.close()
    assert [n for batch in doubler.batches for n in batch] == [1]


async def test_close_waits_for_what_was_submitted() -> None:
    doubler = Doubler()
    group = batcher(doubler)
    await group.close()
    task = await doubler.hold(group, 4)
    closing = asyncio.create_task(group.close())
    await asyncio.sleep(0)
    assert not closing.done()
    doubler.let_go()
    await closing
    assert await task == 8
