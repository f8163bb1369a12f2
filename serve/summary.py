"""For operators: what all the feedback says. The log is read once, then only what is new; statistics run beside it."""

import asyncio
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request

from feedback.removal import RawEntry, position
from feedback.store import FeedbackStore
from feedback.summary import Summary, Tally
from serve.auth import OperatorPrincipal
from serve.services import ServicesDep

CACHE_SECONDS = 5.0
"""How old a summary may be."""
REST = 4.0
"""A summary that took long is kept for so many times as long: computing takes a fifth of a core at most."""
BATCH = 50
"""Records read at once: a few milliseconds of the event loop's time."""

router = APIRouter(prefix="/v1/feedback")


class SummaryReader:
    """Keeps the counts of one log between requests; requests that come together share one reading."""

    def __init__(self, store: FeedbackStore) -> None:
        self._store = store
        self._tally = Tally()
        self._count_anew = False
        self._told: Summary | None = None
        self._told_until = 0.0
        self._reading = asyncio.Lock()

    async def read(self) -> Summary:
        """The summary of now, or of a few seconds ago. Raises StoreUnavailable."""
        async with self._reading:
            if self._told is None or time.monotonic() >= self._told_until:
                began = time.monotonic()
                await self._catch_up()
                self._told = await asyncio.to_thread(self._tally.summary)
                now = time.monotonic()
                self._told_until = now + max(CACHE_SECONDS, REST * (now - began))
            return self._told

    async def _catch_up(self) -> None:
        # While something is being erased, what is counted may go at any time: then nothing counted is kept.
        erasing = bool(await self._store.unfinished_erasures())
        restarted = position(await self._store.head()) < position(self._tally.head)
        if self._count_anew or restarted:
            self._tally = Tally()
        known = self._tally.kinds["erasure"]
        first = self._tally.head == "0-0"
        await self._add_new()
        if self._tally.kinds["erasure"] > known and not first:
            self._tally = Tally()
            await self._add_new()
        self._count_anew = erasing

    async def _add_new(self) -> None:
        async for batch in self._store.raw_batches(self._tally.head, BATCH):
            await asyncio.to_thread(self._count, batch)

    def _count(self, batch: Sequence[RawEntry]) -> None:
        decoded = map(self._store.decoded, batch)
        self._tally.add(entry for entry in decoded if entry is not None)


@router.get("/summary")
async def get_summary(request: Request, services: ServicesDep, principal: OperatorPrincipal) -> Summary:
    """Counts per day, version and labeler; agreement; the win rate of each two versions with its interval."""
    return await summary_reader(request, services.store).read()


def summary_reader(request: Request, store: FeedbackStore) -> SummaryReader:
    """The one reader of this server's log."""
    state = request.app.state
    if not hasattr(state, "feedback_summary"):
        state.feedback_summary = SummaryReader(store)
    reader: SummaryReader = state.feedback_summary
    return reader
