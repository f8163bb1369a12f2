"""``FeedbackStore``: the only issuer of feedback commands to Redis.

The log ``fb:log`` is the source of truth. A record counts as stored once ``append`` returns: under
``appendfsync always`` its reply comes after the fsync. Nothing is retried behind the caller's back; a caller that
got StoreUnavailable appends the same again, and idempotency makes one record of both.
"""

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from feedback import keys
from feedback.batcher import Batcher
from feedback.errors import CorruptRecord, FeedbackError, IdempotencyKeyReuse, StoreUnavailable
from feedback.records import Comparison, LogRecord, Rating, content_digest, decode, encode
from feedback.removal import RawEntry, RemovalStore, judged_key, raw_entry, task_of
from feedback.settings import FeedbackSettings

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""The live configuration without which an acknowledged record may be lost."""
QUEUE_SHARE = 0.4
"""Part of the socket timeout that an append may wait for its batch: both together stay within 1.5 s by default."""

_APPEND = Path(__file__).with_name("append.lua").read_text()
_APPEND_SHA1 = hashlib.sha1(_APPEND.encode()).hexdigest()
_RESTORE = Path(__file__).with_name("restore.lua").read_text()
_Reply = Any  # redis-py types replies as bytes | str, whichever decode_responses chose; here they are bytes
_log = logging.getLogger(__name__)


class AppendInFlight(FeedbackError):
    """The same append is under way in this process; the same again will be answered with its outcome."""


class RecordIdTaken(FeedbackError):
    """A record cannot be restored: the log has one of that id at another place."""


@dataclass(frozen=True)
class Appended:
    """A record that is on disk; ``replayed`` where an earlier append had put it there."""

    record: LogRecord
    stream_id: str
    replayed: bool


@dataclass(frozen=True)
class LogEntry:
    """One record of the log and its place."""

    stream_id: str
    record: LogRecord


@dataclass(frozen=True)
class _Append:
    script_keys: tuple[str, ...]
    script_arguments: tuple[str | bytes | int, ...]


class FeedbackStore(RemovalStore):
    """Feedback in Redis: the log, and the completions it judges.

    Make one per process with ``connect``; every method may raise StoreUnavailable.
    """

    def __init__(self, client: Redis, settings: FeedbackSettings, where: str) -> None:
        super().__init__(client, settings, where)
        self._quarantined: set[str] = set()
        self._in_flight: set[str] = set()
        self._restore = client.register_script(_RESTORE)
        self._appends: Batcher[_Append, tuple[str, str]] = Batcher(
            self._send_appends,
            max_wait_seconds=QUEUE_SHARE * settings.socket_timeout_seconds,
            too_late=lambda: StoreUnavailable("more feedback arrives than Redis can take; this record was not stored"),
        )

    @property
    def quarantined(self) -> int:
        """How many damaged records this store has met; they stay in the log and are never handed out."""
        return len(self._quarantined)

    async def append(
        self,
        record: LogRecord,
        *,
        idempotency_key: str | None = None,
        body_digest: str | None = None,
        refuse_in_flight: bool = False,
    ) -> Appended:
        """Add a record to the log, durably and once.

        Args:
            record: what to add.
            idempotency_key: the caller's name for this act, within ``record.principal``; without one
                the body digest serves.
            body_digest: digest of what the caller sent; without one, of what the record says.
            refuse_in_flight: raise AppendInFlight, rather than wait, while this process appends the same.

        Returns:
            The record, or on a replay the first one, with its stream id.

        Raises:
            AppendInFlight: see ``refuse_in_flight``.
            IdempotencyKeyReuse: the key was used with another body.
            StoreUnavailable: nothing was acknowledged; append again with the same key or body.
        """
        said = body_digest or content_digest(record)
        body, sha256 = encode(record)
        act = keys.idempotency(record.principal, idempotency_key, said)
        script_keys = [keys.LOG, act, keys.stream_id(record.id), *judged_key(record)]
        ttl = self._settings.idempotency_ttl_seconds
        arguments: list[str | bytes | int] = [record.kind, record.id, body, sha256, said, ttl, task_of(record)]
        if isinstance(record, Comparison):
            script_keys.append(keys.given_prompts(record.labeler))
            arguments += [record.prompt.key(), self._settings.labeler_memory_seconds]
        with self._alone(act) if refuse_in_flight else nullcontext():
            outcome, stream_id = await self._appends.submit(_Append(tuple(script_keys), tuple(arguments)))
        if outcome == "reuse":
            raise IdempotencyKeyReuse("the idempotency key was used before with another body; use a new key")
        if outcome == "replayed":
            return Appended(await self._read(stream_id), stream_id, replayed=True)
        return Appended(record, stream_id, replayed=False)

    async def record(self, record_id: str) -> LogRecord | None:
        """The record of that id, or None. Raises CorruptRecord where it is damaged."""
        (place,) = await self.places([record_id])
        return None if place is None else await self._read(place)

    async def places(self, record_ids: Sequence[str]) -> list[str | None]:
        """For each record id where it stands in the log, a stream id, or None."""
        if not record_ids:
            return []
        async with self._answering():
            found: _Reply = await self._redis.mget([keys.stream_id(record_id) for record_id in record_ids])
        return [None if place is None else place.decode() for place in found]

    async def in_force(self, judged: Sequence[Comparison | Rating]) -> list[bool]:
        """For each comparison or rating whether it is its labeler's latest on those candidates or that choice.

        A repetition in another task (``feedback.controls``) is not: what it repeats stays in force.
        """
        if not judged:
            return []
        async with self._answering():
            latest: _Reply = await self._redis.mget([key for record in judged for key in judged_key(record)])
        return [
            found is not None and found.partition(b" ")[0] == record.id.encode()
            for found, record in zip(latest, judged, strict=True)
        ]

    async def restore(self, entries: Sequence[tuple[RawEntry, LogRecord]]) -> None:
        """Put records back at their own places, behind all that the log has; those before a failure stay.

        Raises:
            RecordIdTaken: the log has a record of that id.
            StoreUnavailable: a place is not behind all others, or Redis cannot serve.
        """
        async with self._answering(), self._redis.pipeline(transaction=False) as pipe:
            for entry, record in entries:
                script_keys = [keys.LOG, keys.stream_id(entry.id), *judged_key(record)]
                arguments: list[str | bytes] = [entry.stream_id, entry.kind, entry.id, entry.body, entry.sha256]
                await self._restore(keys=script_keys, args=[*arguments, task_of(record)], client=pipe)
            replies = await pipe.execute()
        for (entry, _), restored in zip(entries, replies, strict=True):
            if not restored:
                raise RecordIdTaken(f"the log has a record {entry.id} already, at another place than {entry.stream_id}")

    async def scan(self, after: str = "0-0", batch: int = 500) -> AsyncIterator[LogEntry]:
        """The log's records behind stream id ``after``, in order; damaged ones are skipped and quarantined."""
        async for entries in self.batches(after, batch):
            for entry in entries:
                yield entry

    async def batches(self, after: str = "0-0", size: int = 500) -> AsyncIterator[list[LogEntry]]:
        """The same records as ``scan`` gives, as many at a time as one command reads: at most ``size``."""
        async for entries in self.raw_batches(after, size):
            yield [decoded for entry in entries if (decoded := self.decoded(entry)) is not None]

    def decoded(self, entry: RawEntry) -> LogEntry | None:
        """An entry's record; None for a damaged one, which is quarantined."""
        with suppress(CorruptRecord):  # counted and logged where it is found
            return LogEntry(entry.stream_id, self._decode(entry))
        return None

    async def head(self) -> str:
        """Stream id of the newest record, ``0-0`` where there is none."""
        async with self._answering():
            newest: _Reply = await self._redis.xrevrange(keys.LOG, count=1)
        return newest[0][0].decode() if newest else "0-0"

    async def durability_problems(self) -> list[str]:
        """Why a record acknowledged now might be lost, a sentence each; empty where it would not be."""
        problems = []
        try:
            async with self._answering():
                for name, wanted in DURABLE.items():
                    live = (await self._redis.config_get(name)).get(name)
                    if live != wanted:
                        problems.append(f"Redis runs with {name} {live}; it must be {wanted}")
                await self._redis.set(keys.PROBE, int(time.time()), ex=keys.PROBE_TTL_SECONDS)
        except StoreUnavailable as error:
            problems.append(str(error))
        return problems

    async def close(self) -> None:
        """Wait for the appends under way and let the connections go."""
        await self._appends.close()
        await super().close()

    async def _send_appends(self, batch: Sequence[_Append]) -> list[tuple[str, str] | Exception]:
        async with self._answering():
            replies = await self._run_script(batch, load=False)
            if unknown := [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]:
                # Redis was restarted and has forgotten the script: none of these ran.
                again = await self._run_script([batch[i] for i in unknown], load=True)
                for i, reply in zip(unknown, again, strict=True):
                    replies[i] = reply
        return [
            self._unavailable(reply) if isinstance(reply, Exception) else (reply[0].decode(), reply[1].decode())
            for reply in replies
        ]

    async def _run_script(self, batch: Sequence[_Append], *, load: bool) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for append in batch:
                values = [*append.script_keys, *append.script_arguments]
                if load:
                    pipe.eval(_APPEND, len(append.script_keys), *values)
                else:
                    pipe.evalsha(_APPEND_SHA1, len(append.script_keys), *values)
            return await pipe.execute(raise_on_error=False)

    @contextmanager
    def _alone(self, act: str) -> Iterator[None]:
        if act in self._in_flight:
            raise AppendInFlight("the same request is being served right now; try again for its answer")
        self._in_flight.add(act)
        try:
            yield
        finally:
            self._in_flight.remove(act)

    async def _read(self, stream_id: str) -> LogRecord:
        async with self._answering():
            entries: _Reply = await self._redis.xrange(keys.LOG, min=stream_id, max=stream_id)
        if not entries:
            raise CorruptRecord(f"the log has no entry {stream_id}, which an index names")
        return self._decode(raw_entry(*entries[0]))

    def _decode(self, entry: RawEntry) -> LogRecord:
        try:
            return decode(entry.body, entry.sha256)
        except CorruptRecord as error:
            if entry.stream_id not in self._quarantined:
                self._quarantined.add(entry.stream_id)
                _log.error("record %s is quarantined: %s", entry.stream_id, error)
            raise
