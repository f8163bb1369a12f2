"""The load generator: closed-loop callers over keep-alive HTTP/1.1, cheap enough not to be what is measured.

A client library costs more CPU a request than what is measured here; so this speaks HTTP itself, and only as
much of it as the two servers answer with: a content length or chunks.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

CHAT = "/v1/chat/completions"
MODEL = "policy"

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_VERSION = re.compile(rb"\r\nx-policy-version: *(\d+)", re.IGNORECASE)
_MODEL = re.compile(rb'"model": ?"([^"]*)"')
_CONTENT = re.compile(rb'"content": ?"((?:[^"\\]|\\.)*)"')


class RequestFailed(Exception):
    """A request was not answered with a whole completion; says how it ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer. Times are ``time.perf_counter`` seconds.

    Attributes:
        events: When each server-sent event came; empty without a stream.
    """

    sent: float
    first_byte: float
    ended: float
    events: tuple[float, ...]
    head: bytes
    body: bytes

    @property
    def version(self) -> int | None:
        """The policy version of the header; None from a server that has no versions."""
        found = _VERSION.search(self.head)
        return int(found[1]) if found else None

    def models(self) -> set[str]:
        """Each model id the answer names: one, unless versions are mixed."""
        return {name.decode() for name in _MODEL.findall(self.body)}

    def content(self) -> bytes:
        """The completion's text as JSON writes it, put together from every event."""
        return b"".join(_CONTENT.findall(self.body))

    def check(self) -> None:
        """Raise RequestFailed unless this is a whole, successful completion."""
        status = self.head.split(b" ", 2)[1]
        whole = b"data: [DONE]" in self.body if self.events else status == b"200"
        if status != b"200" or not whole or b'"error":' in self.body:
            raise RequestFailed(f"HTTP {status.decode()}: {self.body[:300].decode(errors='replace')}")


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._received = bytearray()
        self._body_at = 0
        self._body_bytes: int | None = None
        self._sent = self._first_byte = 0.0
        self._events: list[float] = []

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connect to a server of this machine."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    async def ask(self, request: bytes) -> Answer:
        """Send one request and take the whole answer. Raises RequestFailed where the connection ends before it."""
        if self._transport is None or self._transport.is_closing():
            raise RequestFailed("the server closed the connection between two requests")
        self._waiting = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._body_at = 0
        self._events = []
        self._sent = time.perf_counter()
        self._transport.write(request)
        return await self._waiting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(RequestFailed(f"the connection ended before the answer did: {exc}"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._received:
            self._first_byte = now
        self._received += data
        if not self._body_at and not self._read_head():
            return
        if self._body_bytes is None:
            self._events += [now] * data.count(b"data: ")
            whole = self._received.endswith(b"\r\n0\r\n\r\n")
        else:
            whole = len(self._received) - self._body_at >= self._body_bytes
        if whole and self._waiting is not None and not self._waiting.done():
            received = bytes(self._received)
            head, body = received[: self._body_at], received[self._body_at :]
            self._waiting.set_result(Answer(self._sent, self._first_byte, now, tuple(self._events), head, body))

    def _read_head(self) -> bool:
        ends = self._received.find(b"\r\n\r\n")
        if ends < 0:
            return False
        self._body_at = ends + 4
        length = _LENGTH.search(self._received, 0, self._body_at)
        self._body_bytes = int(length[1]) if length else None
        return True


def chat_request(prompt: str, max_tokens: int, **fields: Any) -> bytes:
    """The bytes of a chat request that samples exactly ``max_tokens``."""
    message = {"role": "user", "content": prompt}
    body = {"model": MODEL, "messages": [message], "max_tokens": max_tokens, "ignore_eos": True} | fields
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
    return f"{head}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


@dataclass(frozen=True)
class Measured:
    """What one slice of load saw.

    Attributes:
        seconds: From the first request sent to the last answer.
        generator_cpu_seconds: What this process itself used meanwhile.
    """

    seconds: float
    generator_cpu_seconds: float
    answers: list[Answer]


async def closed_loop(port: int, requests: Sequence[bytes], count: int, callers: int) -> Measured:
    """``callers`` at once ask ``count`` times in all, each its next request when the last is answered.

    Raises:
        RequestFailed: At the first request that is not answered with a whole completion.
    """
    connections = [await Connection.open(port) for _ in range(callers)]
    turns = iter(range(count))
    answers: list[Answer] = []

    async def call(connection: Connection) -> None:
        for turn in turns:
            answer = await connection.ask(requests[turn % len(requests)])
            answer.check()
            answers.append(answer)

    cpu, began = time.process_time(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(call(connection))
        return Measured(time.perf_counter() - began, time.process_time() - cpu, answers)
    finally:
        for connection in connections:
            connection.close()
