"""Posts comparisons: on a fixed schedule whatever the server does, or as fast as some callers get their answers."""

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from feedback_comparisons import comparison_request
from load import Answer, Connection, RequestFailed

NO_ANSWER = 0
"""Stands for a status where none came, or the connection ended first."""
ANSWER_SECONDS = 30.0
"""Longest wait for an answer."""

_ID = re.compile(rb'"id": ?"(cmp_[0-9a-f]{32})"')
_IDLE_SECONDS = 3.0
"""A connection that rested longer is not used again: the server hangs up after five."""
_HEALTH_EVERY_SECONDS = 0.1


@dataclass
class Posted:
    """What became of the comparisons that were posted.

    Attributes:
        seconds: From when the first was due to the last answer.
        late_ms: How long after it was due this process came to each; of closed loops empty.
        acknowledged: Ids of those answered 201.
        milliseconds: For each status, how long each answer took from when its comparison was due.
        sheds_without_retry_after: Answers 429 and 503 that do not say when to come again.
        generator_cpu_seconds: What this process itself used meanwhile.
    """

    seconds: float = 0.0
    late_ms: list[float] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    milliseconds: dict[int, list[float]] = field(default_factory=dict)
    sheds_without_retry_after: int = 0
    generator_cpu_seconds: float = 0.0

    def statuses(self) -> Counter[int]:
        """How many answers had each status."""
        return Counter({status: len(times) for status, times in self.milliseconds.items()})

    def note(self, due: float, answer: Answer | None) -> None:
        """Count an answer, or that none came."""
        status = int(answer.head.split(b" ", 2)[1]) if answer else NO_ANSWER
        ended = answer.ended if answer else time.perf_counter()
        self.milliseconds.setdefault(status, []).append((ended - due) * 1000)
        if answer and status == 201:
            found = _ID.search(answer.body)
            if found is None:
                raise RequestFailed("an answer 201 has no comparison's id")
            self.acknowledged.append(found[1].decode())
        elif answer and status in (429, 503):
            self.sheds_without_retry_after += b"retry-after:" not in answer.head.lower()


class _Connections:
    """Keep-alive connections; the one used last is used next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._resting: deque[tuple[float, Connection]] = deque()

    async def take(self) -> Connection:
        while self._resting and time.perf_counter() - self._resting[0][0] > _IDLE_SECONDS:
            self._resting.popleft()[1].close()
        return self._resting.pop()[1] if self._resting else await Connection.open(self._port)

    def give_back(self, connection: Connection) -> None:
        self._resting.append((time.perf_counter(), connection))

    def close(self) -> None:
        for _, connection in self._resting:
            connection.close()


async def open_loop(port: int, numbers: Iterator[int], per_second: float, seconds: float) -> Posted:
    """Post a comparison every ``1 / per_second`` seconds, however many are still unanswered, and await all answers.

    Latency counts from when a comparison was due, so that neither a stall of the server nor one of this process hides.
    """
    posted, connections = Posted(), _Connections(port)
    cpu, began = time.process_time(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for place in range(round(per_second * seconds)):
                due = began + place / per_second
                if (ahead := due - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                elif place % 16 == 0:
                    await asyncio.sleep(0)  # late, but answers must be read, too
                group.create_task(_post(connections, comparison_request(next(numbers)), due, posted))
    finally:
        connections.close()
    posted.seconds, posted.generator_cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return posted


async def _post(connections: _Connections, request: bytes, due: float, posted: Posted) -> None:
    posted.late_ms.append((time.perf_counter() - due) * 1000)
    connection, answer = None, None
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            connection = await connections.take()
            answer = await connection.ask(request)
            connections.give_back(connection)
    except (RequestFailed, ConnectionError, TimeoutError):  # counted below; running out of files here is not one
        if connection is not None:
            connection.close()
    posted.note(due, answer)


async def closed_loop(port: int, numbers: Iterator[int], callers: int, seconds: float) -> Posted:
    """``callers`` post for so long, each its next comparison when the last is answered.

    Raises:
        RequestFailed: A connection ended instead of an answer.
    """
    connections, posted = [await Connection.open(port) for _ in range(callers)], Posted()
    cpu, began = time.process_time(), time.perf_counter()

    async def call(connection: Connection) -> None:
        while (due := time.perf_counter()) < began + seconds:
            posted.note(due, await connection.ask(comparison_request(next(numbers))))

    try:
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(call(connection))
    finally:
        for connection in connections:
            connection.close()
    posted.seconds, posted.generator_cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return posted


async def slowest_health_ms(port: int, times: int) -> float:
    """Longest of some answers to GET /health in turn, each on a new connection.

    Raises:
        RequestFailed: One was not 200.
    """
    return max([await _health_ms(port) for _ in range(times)])


async def health_beside(port: int, seconds: float) -> list[float]:
    """How long each GET /health took in ms: one every ``_HEALTH_EVERY_SECONDS``, each on a new connection.

    Raises:
        RequestFailed: One was not 200.
    """
    asked = []
    async with asyncio.TaskGroup() as group:
        for _ in range(round(seconds / _HEALTH_EVERY_SECONDS)):
            asked.append(group.create_task(_health_ms(port)))
            await asyncio.sleep(_HEALTH_EVERY_SECONDS)
    return [one.result() for one in asked]


async def _health_ms(port: int) -> float:
    asked = time.perf_counter()
    connection = await Connection.open(port)
    try:
        answer = await connection.ask(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    finally:
        connection.close()
    answer.check()
    return (answer.ended - asked) * 1000
