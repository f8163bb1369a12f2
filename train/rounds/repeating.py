"""Doing something again and again in the event loop while something else goes on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def meanwhile(work: Callable[[], Awaitable[bool]], every_seconds: float) -> AsyncIterator[None]:
    """Do ``work`` again and again inside, until it returns False. At the end it is waited for and not cancelled."""
    ended = asyncio.Event()

    async def repeat() -> None:
        go_on = True
        while go_on and not ended.is_set():
            try:
                await asyncio.wait_for(ended.wait(), every_seconds)
            except TimeoutError:
                go_on = await work()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        ended.set()
        await task
