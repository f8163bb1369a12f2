"""What the feedback log says, read on from where it was last read."""

from feedback.erasure import surviving
from feedback.records import Comparison, Erasure
from feedback.removal import position
from feedback.store import FeedbackStore, LogEntry


class LogWatch:
    """How many comparisons wait to be learnt from, and whose data was erased.

    The first look reads the whole log, later ones what is new.

    Attributes:
        erasures: stream id of the newest erasure of each principal, by ``name_digest``.
    """

    def __init__(self, feedback: FeedbackStore) -> None:
        self._feedback = feedback
        self._until = "0-0"
        self._comparisons: list[tuple[int, int]] = []
        self.erasures: dict[str, str] = {}

    async def look(self, cursor: str) -> int:
        """Read on; returns how many comparisons stand behind ``cursor``. Raises StoreUnavailable."""
        learnt = position(cursor)
        async for entry in self._feedback.scan(after=self._until):
            self._until = entry.stream_id
            if isinstance(entry.record, Erasure):
                self.erasures[entry.record.erased] = entry.stream_id
            elif isinstance(entry.record, Comparison) and position(entry.stream_id) > learnt:
                self._comparisons.append(position(entry.stream_id))
        self._comparisons = [place for place in self._comparisons if place > learnt]
        return len(self._comparisons)

    def erased_after(self, cursor: str) -> frozenset[str]:
        """``name_digest`` of the principals who were erased behind ``cursor``, as far as was read."""
        return frozenset(who for who, at in self.erasures.items() if position(at) > position(cursor))


async def log_until(feedback: FeedbackStore, cursor: str) -> list[LogEntry]:
    """The log up to and including ``cursor``, without what was erased by now. Raises StoreUnavailable."""
    entries = surviving([entry async for entry in feedback.scan()])
    return [entry for entry in entries if position(entry.stream_id) <= position(cursor)]
