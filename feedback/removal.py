"""The part of ``FeedbackStore`` that takes out what was kept; ``feedback.erasure`` says in which order, and why.

Every method here does one step, and doing it again does no harm. The lease keeps two erasures apart: the step in
which two at once could lose records, copying the log, checks it where it writes.
"""

import asyncio
import hashlib
import secrets
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from feedback import keys
from feedback.completion_store import MAX_BATCH, CompletionStore
from feedback.controls import is_check
from feedback.errors import CorruptRecord, FeedbackError, StoreUnavailable
from feedback.records import BlindTask, Comparison, LogRecord, Rating, StoredCompletion, unpack
from feedback.settings import FeedbackSettings

COPY_BATCH = 500
"""Records copied in one step: a few milliseconds in which Redis does nothing else."""
REWRITE_SECONDS = 600.0
"""Longest wait for Redis to write its append-only file anew."""

_POLL_SECONDS = 0.1
_SCAN_COUNT = 1000
_Packed = TypeVar("_Packed", StoredCompletion, BlindTask)
_Reply = Any  # redis-py types replies as bytes | str, whichever decode_responses chose; here they are bytes


def _script(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


class ErasureUnderWay(FeedbackError):
    """Another erasure runs, or was killed less than ``ERASURE_LEASE_SECONDS`` ago."""


@dataclass(frozen=True)
class RawEntry:
    """One record of the log as its bytes, and its place; the bytes match ``sha256`` unless said otherwise."""

    stream_id: str
    kind: str
    id: str
    body: bytes
    sha256: str

    @property
    def sound(self) -> bool:
        """True where the bytes match the digest."""
        return hashlib.sha256(self.body).hexdigest() == self.sha256

    @property
    def position(self) -> tuple[int, int]:
        """The stream id as numbers, which order as the log does."""
        return position(self.stream_id)


def position(stream_id: str) -> tuple[int, int]:
    """A stream id as numbers, which order as the log does."""
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def judged_key(record: LogRecord | None) -> list[str]:
    """The ``fb:pair`` key of a record that a later one can replace; none for others."""
    if isinstance(record, Comparison):
        return [keys.latest(record.candidates_key(), check=is_check(record))]
    return [keys.latest(record.choice_key())] if isinstance(record, Rating) else []


def task_of(record: LogRecord) -> str:
    """The blind task that a record answers; "" for none."""
    return (record.task_id or "") if isinstance(record, Comparison) else ""


class RemovalStore(CompletionStore):
    """Removing; every method may raise StoreUnavailable."""

    def __init__(self, client: Redis, settings: FeedbackSettings, where: str) -> None:
        super().__init__(client, settings, where)
        self._remove = client.register_script(_script("remove.lua"))
        self._forget = client.register_script(_script("forget.lua"))
        self._copy = client.register_script(_script("copy.lua"))

    async def raw_batches(self, after: str = "0-0", size: int = 500) -> AsyncGenerator[list[RawEntry], None]:
        """The log behind stream id ``after`` as bytes, damaged records among it, at most ``size`` at a time."""
        while True:
            async with self._answering():
                entries: _Reply = await self._redis.xrange(keys.LOG, min=f"({after}", count=size)
            if not entries:
                return
            yield [raw_entry(stream_id, fields) for stream_id, fields in entries]
            after = entries[-1][0].decode()

    async def length(self) -> int:
        """How many records the log has."""
        async with self._answering():
            found: int = await self._redis.xlen(keys.LOG)
        return found

    @asynccontextmanager
    async def erasing(self) -> AsyncIterator[str]:
        """Holds the lease while something is erased; yields who holds it. Raises ErasureUnderWay."""
        holder = secrets.token_hex(16)
        async with self._answering():
            held = await self._redis.set(keys.ERASURE_LEASE, holder, nx=True, ex=keys.ERASURE_LEASE_SECONDS)
        if not held:
            raise ErasureUnderWay(
                f"another erasure is under way, or was killed less than {keys.ERASURE_LEASE_SECONDS} s ago; try again"
            )
        renewing = asyncio.create_task(self._renew(holder))
        try:
            yield holder
        finally:
            renewing.cancel()
            with suppress(StoreUnavailable):  # then it expires
                if await self._holds(holder):
                    async with self._answering():
                        await self._redis.delete(keys.ERASURE_LEASE)

    async def _renew(self, holder: str) -> None:
        while True:
            await asyncio.sleep(keys.ERASURE_LEASE_SECONDS / 4)
            with suppress(StoreUnavailable):
                if await self._holds(holder):
                    async with self._answering():
                        await self._redis.expire(keys.ERASURE_LEASE, keys.ERASURE_LEASE_SECONDS)

    async def _holds(self, holder: str) -> bool:
        async with self._answering():
            found: _Reply = await self._redis.get(keys.ERASURE_LEASE)
        return bool(found == holder.encode())

    async def unfinished_erasures(self) -> set[str]:
        """``name_digest`` of the principals whose erasure has begun and not ended."""
        async with self._answering():
            members: _Reply = await self._redis.smembers(keys.ERASURES_UNFINISHED)
        return {member.decode() for member in members}

    async def begin_erasure(self, erased: str) -> None:
        """Remember, until ``end_erasure``, that bytes of that principal may be left."""
        async with self._answering():
            await self._redis.sadd(keys.ERASURES_UNFINISHED, erased)

    async def end_erasure(self, erased: str) -> None:
        """Nothing of that principal is left."""
        async with self._answering():
            await self._redis.srem(keys.ERASURES_UNFINISHED, erased)

    async def remove(self, entries: Sequence[tuple[RawEntry, LogRecord | None]]) -> int:
        """Take records out of the log, each in one step with what names it; None for one that cannot be decoded.

        Their bytes stay in Redis until ``copy_log``. Returns how many there were.
        """
        removed = 0
        for start in range(0, len(entries), MAX_BATCH):
            async with self._answering(), self._redis.pipeline(transaction=False) as pipe:
                for entry, record in entries[start : start + MAX_BATCH]:
                    script_keys = [keys.LOG, keys.stream_id(entry.id), *judged_key(record)]
                    arguments = [entry.stream_id, entry.id]
                    if isinstance(record, Comparison):
                        script_keys.append(keys.given_prompts(record.labeler))
                        arguments.append(record.prompt.key())
                    await self._remove(keys=script_keys, args=arguments, client=pipe)
                removed += sum(await pipe.execute())
        return removed

    async def forget_idempotency(self) -> int:
        """Delete the idempotency keys of records that are no longer in the log; returns how many."""
        forgotten = 0
        async for names in self._scan(keys.IDEMPOTENCY_PATTERN):
            async with self._answering():
                forgotten += await self._forget(keys=[keys.LOG, *names])
        return forgotten

    async def copy_log(self, holder: str) -> None:
        """Replace the log by a copy without the bytes of removed records; readers and appends go on meanwhile.

        Needs as much memory again as the log has.

        Args:
            holder: who holds the lease; another's is ErasureUnderWay.
        """
        async with self._answering():
            await self._redis.unlink(keys.LOG_COPY)
        copied = "0-0"
        while copied:
            try:
                async with self._answering():
                    reply: _Reply = await self._copy(
                        keys=[keys.LOG, keys.LOG_COPY, keys.ERASURE_LEASE], args=[copied, COPY_BATCH, holder]
                    )
            except StoreUnavailable as error:
                if "LEASELOST" in str(error):
                    raise ErasureUnderWay("another erasure has begun; this one must be run again") from error
                raise
            copied = reply.decode()

    async def rewrite_files(self) -> None:
        """Have Redis write its append-only file anew from memory, and wait for it, so that no removed byte is in it."""
        try:
            async with asyncio.timeout(REWRITE_SECONDS):
                while not await self._rewrite_begins():
                    await asyncio.sleep(_POLL_SECONDS)  # one that had begun before the removal does not count
                while (state := await self._persistence())["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]:
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise StoreUnavailable(
                f"Redis at {self._where} has not written its append-only file anew within {REWRITE_SECONDS:g} s"
            ) from error
        if state["aof_last_bgrewrite_status"] != "ok":
            raise StoreUnavailable(f"Redis at {self._where} could not write its append-only file anew; see its log")

    async def _rewrite_begins(self) -> bool:
        state = await self._persistence()
        if state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]:
            return False
        async with self._answering():
            try:
                await self._redis.bgrewriteaof()
            except ResponseError as error:
                if "in progress" not in str(error):
                    raise
                return False
        return True

    async def _persistence(self) -> dict[str, Any]:
        async with self._answering():
            state: dict[str, Any] = await self._redis.info("persistence")
        return state

    async def completions_with(self, marks: Sequence[bytes]) -> AsyncGenerator[list[StoredCompletion], None]:
        """Every kept completion whose JSON has one of ``marks`` in it, in batches, once or more often.

        Damaged ones are left out: nobody can read them, and those that do not expire are in their maker's index.
        """
        async for batch in self._with(marks, StoredCompletion, keys.COMPLETIONS_PATTERN):
            yield batch

    async def tasks_with(self, marks: Sequence[bytes]) -> AsyncGenerator[list[BlindTask], None]:
        """Every blind task, likewise."""
        async for batch in self._with(marks, BlindTask, keys.TASKS_PATTERN):
            yield batch

    async def delete_tasks(self, tasks: Sequence[BlindTask]) -> int:
        """Delete blind tasks; returns how many there were."""
        async with self._answering():
            return int(await self._redis.delete(*(keys.task(task.id) for task in tasks))) if tasks else 0

    async def forget_labeler(self, labeler: str) -> None:
        """Forget what a labeler was given to judge."""
        async with self._answering():
            await self._redis.delete(keys.given_prompts(labeler), keys.given_tasks(labeler))

    async def delete_index(self, principal: str) -> int:
        """Delete the index of a principal's stored completions, and what it still names; returns how many there were.

        For what ``completions_with`` leaves out.
        """
        index, deleted = keys.completions_of(principal), 0
        while True:
            async with self._answering():
                ids: _Reply = await self._redis.zrange(index, 0, MAX_BATCH - 1)
                if not ids:
                    return deleted
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.delete(*(keys.completion(one.decode()) for one in ids))
                    pipe.zrem(keys.POOL, *ids)
                    pipe.zrem(index, *ids)
                    deleted += (await pipe.execute())[0]

    async def _with(
        self, marks: Sequence[bytes], kind: type[_Packed], pattern: str
    ) -> AsyncGenerator[list[_Packed], None]:
        async for names in self._scan(pattern):
            for start in range(0, len(names), MAX_BATCH):
                async with self._answering():
                    values: _Reply = await self._redis.mget(names[start : start + MAX_BATCH])
                # None: expired since, or no string.
                found = [_if_marked(kind, packed, marks) for packed in values if packed is not None]
                yield [one for one in found if one is not None]

    async def _scan(self, pattern: str) -> AsyncGenerator[list[bytes], None]:
        cursor, begun = 0, False
        while cursor or not begun:
            async with self._answering():
                found: _Reply = await self._redis.scan(cursor, match=pattern, count=_SCAN_COUNT)
            begun, (cursor, names) = True, found
            if names:
                yield names


def raw_entry(stream_id: bytes, fields: dict[bytes, bytes]) -> RawEntry:
    """An entry as Redis gives it."""
    kind, record_id, sha256 = (fields.get(name, b"").decode(errors="replace") for name in (b"kind", b"id", b"sha256"))
    return RawEntry(stream_id.decode(), kind, record_id, fields.get(b"json", b""), sha256)


def _if_marked(kind: type[_Packed], packed: bytes, marks: Sequence[bytes]) -> _Packed | None:
    with suppress(zlib.error, CorruptRecord):
        body = zlib.decompress(packed)  # a hundred times cheaper than the whole record
        if any(mark in body for mark in marks):
            return unpack(kind, packed)
    return None
