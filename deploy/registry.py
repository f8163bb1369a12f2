"""The registry: versions on disk, the release and the training lease in Redis.

``Registry`` publishes and finds versions. A version exists from the moment its directory has its number:
files and manifest are written and fsynced under a temporary name first. ``ReleaseStore`` changes the
release by compare-and-set and logs every attempt. ``Lease`` lets one worker train at a time and numbers
its holders, so that one that was paused past its time is recognised.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.typing import EncodableT, FieldT

from deploy import errors, files
from deploy.release import Attempt, Release, ReplicaReport
from deploy.signatures import UNSIGNED, Signatures
from deploy.versions import Draft, FileDigest, Manifest, Version, VersionKind, code_version, package_versions

_STATE, _LOG = "rel:state", "rel:log"
_REPLICA, _REPLICAS = "rel:replica:", "rel:replicas"
_LEASE, _TOKEN = "train:lease", "train:token"
_CHANNEL = "rel:changed"
_LOGGER = logging.getLogger(__name__)


class Registry:
    """Immutable version directories under the state directory; ``signatures`` says which of them count."""

    def __init__(self, state: Path, signatures: Signatures = UNSIGNED) -> None:
        self._state = state
        self._signatures = signatures

    def _home(self, kind: VersionKind) -> Path:
        return self._state / kind.directory

    def publish(self, draft: Draft, source: Path, *, check_fence: Callable[[], None] | None = None) -> Version:
        """Make the files of ``source`` the next version.

        Args:
            draft: What the manifest will say. Where a version of ``draft.run`` exists, that one is returned:
                a run that is resumed after a crash publishes nothing twice.
            source: A directory that holds exactly the version's files; it is copied.
            check_fence: Called right before the version comes into being; what it raises (LeaseLost) stops it.

        Raises:
            PublishRefused: A file may not be in a version, it cannot be signed, or the disk refused it.
        """
        offered = files.files_to_publish(source)
        home = self._home(draft.kind)
        temporary = home / f".tmp-{secrets.token_hex(8)}"
        try:
            home.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as building:
                with files.locked(home):
                    temporary.mkdir()
                    building.enter_context(files.locked(temporary))  # tells sweep that its publisher lives
                digests = {path.name: files.copy_durably(path, temporary / path.name) for path in offered}
                with files.locked(home):
                    return self._of_run(draft) or self._put(draft, temporary, digests, check_fence)
        except OSError as error:
            raise errors.PublishRefused(f"cannot publish {source}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _put(
        self, draft: Draft, temporary: Path, digests: dict[str, FileDigest], check_fence: Callable[[], None] | None
    ) -> Version:
        home = self._home(draft.kind)
        manifest = Manifest(
            **dict(draft),
            version=max(files.numbers_in(home), default=0) + 1,
            created=datetime.now(UTC),
            code_version=code_version(),
            packages=package_versions(),
            files=digests,
        )
        files.write_manifest(temporary, manifest, self._signatures)
        if check_fence is not None:
            check_fence()
        path = home / str(manifest.version)
        temporary.rename(path)
        files.sync_directory(home)
        return Version(manifest, path)

    def _of_run(self, draft: Draft) -> Version | None:
        if draft.run is None:
            return None
        return next((version for version in self.list(draft.kind) if version.manifest.run == draft.run), None)

    def get(self, kind: VersionKind, number: int) -> Version:
        """The version of that number; its manifest is verified, its files are not (see ``verify``).

        Raises:
            VersionNotFound: It does not exist; the message names those that do.
            VersionCorrupt: Its manifest is not what was published.
        """
        path = self._home(kind) / str(number)
        if number < 1 or not (path / files.MANIFEST).is_file():
            existing = ", ".join(str(n) for n in self.numbers(kind)) or "none"
            raise errors.VersionNotFound(f"there is no {kind} version {number} in {path.parent}; existing: {existing}")
        return Version(files.read_manifest(path, kind, number, self._signatures), path)

    def numbers(self, kind: VersionKind) -> list[int]:
        """The numbers of the versions that exist, ascending."""
        home = self._home(kind)
        return [number for number in files.numbers_in(home) if (home / str(number) / files.MANIFEST).is_file()]

    def verify(self, version: Version) -> None:
        """Compare every file with its digest. Raises VersionCorrupt naming the file and what differs."""
        files.check_files(version, self._signatures)

    def sweep(self, *, dry_run: bool = False) -> list[Path]:
        """Remove what publishers that died left behind, and return it."""
        swept = []
        for kind in VersionKind:
            home = self._home(kind)
            if not home.is_dir():
                continue
            with files.locked(home):
                for orphan in sorted(path for path in home.glob(".tmp-*") if not files.is_locked(path)):
                    if not dry_run:
                        shutil.rmtree(orphan)
                    swept.append(orphan)
        return swept

    def list(self, kind: VersionKind) -> list[Version]:
        """Every version of a kind, oldest first. Raises VersionCorrupt."""
        return [self.get(kind, number) for number in self.numbers(kind)]


class ReleaseStore:
    """The release in Redis: read, changed by compare-and-set, announced, logged. Fails fast, retries nothing."""

    def __init__(self, client: redis.asyncio.Redis, state: Path) -> None:
        self._redis = client
        self._copy = state / "release.json"
        self._change = client.register_script((Path(__file__).parent / "release.lua").read_text())
        self._announcements: Any = None

    @classmethod
    def connect(cls, url: str, state: Path) -> Self:
        """A store over the Redis at ``url``; no connection is made before the first call."""
        return cls(_client(url), state)

    async def read(self) -> Release:
        """The release in force. A Redis that lost it is given the last known one back, on the record.

        Raises:
            ReleaseUnavailable: Redis does not answer, or holds something else; see ``last_known``.
        """
        release = await self._read()
        if release.generation == 0 and (known := self.last_known()).generation > 0:
            reason = f"Redis was empty; {self._copy} knew generation {known.generation}"
            await self._compare_and_set(0, known, {"verb": "restore", "by": _whoami(), "reason": reason})
            release = await self._read()
        await asyncio.to_thread(self._remember, release)  # shared storage that hangs must not stop completions
        return release

    async def _read(self) -> Release:
        async with _translated():
            fields = await self._redis.hgetall(_STATE)
        try:
            return Release.model_validate({name: value for name, value in fields.items() if value != ""})
        except ValidationError as error:
            raise errors.ReleaseUnavailable(f"{_STATE} holds no release: {error.errors()[0]['msg']}") from error

    def last_known(self) -> Release:
        """The release as this state directory last saw it; the empty release where it never saw one.

        Raises:
            ReleaseUnavailable: The copy exists and cannot be read.
        """
        try:
            return Release.model_validate_json(self._copy.read_bytes())
        except FileNotFoundError:
            return Release()
        except (OSError, ValidationError) as error:
            raise errors.ReleaseUnavailable(f"{self._copy} cannot be read: {error}") from error

    def _remember(self, release: Release) -> None:
        """Keep the copy. A full disk must not take the release itself away, so it only warns."""
        try:
            self._copy.parent.mkdir(parents=True, exist_ok=True)
            body = release.model_dump_json(indent=2).encode() + b"\n"
            if not self._copy.exists() or self._copy.read_bytes() != body:
                files.replace_atomically(self._copy, body)
        except OSError as error:
            _LOGGER.warning("the release could not be copied to %s: %s", self._copy, error)

    async def change(
        self, transition: Callable[[Release], Release], *, verb: str, by: str, reason: str, expect: int | None = None
    ) -> Release:
        """Make one transition, by compare-and-set from the release it was decided on; logged in any case.

        Args:
            transition: Pure; may raise errors.TransitionRefused.
            verb: What is attempted, for the log.
            by: Who attempts it.
            reason: Why.
            expect: The generation the caller decided on; None takes the one in force at this call.

        Raises:
            TransitionRefused: The transition does not fit the release.
            StaleGeneration: The release changed meanwhile. It is not retried: what was right to do then
                (a rollback, say) may be wrong now.
            ReleaseUnavailable: Redis does not answer; the change may or may not have been made.
        """
        release = await self.read()
        attempt = {"verb": verb, "by": by, "reason": reason}
        if expect is not None and expect != release.generation:
            await self._log(attempt | {"outcome": f"refused: generation is {release.generation}, not {expect}"})
            raise errors.StaleGeneration(f"the release is at generation {release.generation}, not {expect}")
        try:
            changed = await asyncio.to_thread(transition, release)  # it may read every byte of a version
        except errors.TransitionRefused as error:
            await self._log(attempt | {"outcome": f"refused: {error}"})
            raise
        async with _translated():
            seconds, microseconds = await self._redis.time()  # the clock that orders the feedback log, too
        stamp = {"generation": release.generation + 1, "changed_at": seconds + microseconds / 1e6}
        changed = changed.model_copy(update=stamp | {"by": by, "reason": reason})
        if not await self._compare_and_set(release.generation, changed, attempt):
            raise errors.StaleGeneration(f"the release left generation {release.generation} meanwhile; look again")
        await asyncio.to_thread(self._remember, changed)
        return changed

    async def _compare_and_set(self, generation: int, release: Release, attempt: dict[str, str]) -> bool:
        fields = {name: "" if value is None else str(value) for name, value in dict(release).items()}
        serving = {name: fields[name] for name in ("generation", "stable", "canary", "canary_fraction", "previous")}
        arguments: list[str | int] = [generation, _flat(fields), _flat(attempt | serving), _CHANNEL]
        async with _translated():
            return bool(await self._change(keys=[_STATE, _LOG], args=arguments))

    async def record_publish(self, version: Version, token: int | None) -> None:
        """Log that a version was published; ``token`` is the lease's, None where an operator published."""
        fields = {"verb": "publish", "by": _whoami(), "reason": version.manifest.run or "", "outcome": "accepted"}
        await self._log(fields | {"kind": version.kind, "version": str(version.number), "token": str(token or "")})

    async def _log(self, attempt: dict[str, str]) -> None:
        fields: dict[FieldT, EncodableT] = dict(attempt.items())
        async with _translated():
            await self._redis.xadd(_LOG, fields)

    async def history(self, count: int = 50) -> list[Attempt]:
        """The newest attempts, newest first."""
        async with _translated():
            entries = await self._redis.xrevrange(_LOG, count=count)
        return [Attempt.of(stream_id, fields) for stream_id, fields in entries or ()]

    async def report(self, replica: ReplicaReport, ttl_seconds: float = 15.0) -> None:
        """Say what a server has live; forgotten after ``ttl_seconds`` without another report."""
        async with _translated(), self._redis.pipeline(transaction=True) as pipe:
            pipe.set(_REPLICA + replica.replica, replica.model_dump_json(), px=int(ttl_seconds * 1000))
            pipe.sadd(_REPLICAS, replica.replica)  # an index: searching all keys takes seconds in a long log
            await pipe.execute()

    async def replicas(self) -> list[ReplicaReport]:
        """What the living servers report, by name."""
        async with _translated():
            names = sorted(map(str, await self._redis.smembers(_REPLICAS)))
            bodies = await self._redis.mget([_REPLICA + name for name in names]) if names else []
            if gone := [name for name, body in zip(names, bodies, strict=True) if body is None]:
                await self._redis.srem(_REPLICAS, *gone)  # one that reports again is back with its next report
        return [ReplicaReport.model_validate_json(body) for body in bodies if body is not None]

    async def changed(self, timeout_seconds: float) -> None:
        """Return when a change is announced or the time is up, whichever is first.

        An announcement is a hint: it is lost where the connection drops, so callers read at every return.
        A Redis that does not answer costs the time, not an error; the read that follows reports it.
        """
        ends = time.monotonic() + timeout_seconds
        try:
            if self._announcements is None:
                self._announcements = self._redis.pubsub(ignore_subscribe_messages=True)
                await self._announcements.subscribe(_CHANNEL)
            while (left := ends - time.monotonic()) > 0:
                if await self._announcements.get_message(timeout=left):
                    return
        except (RedisError, OSError):
            await self._stop_listening()
            await asyncio.sleep(max(0.0, ends - time.monotonic()))

    async def _stop_listening(self) -> None:
        if self._announcements is not None:
            with contextlib.suppress(RedisError, OSError):
                await self._announcements.aclose()
            self._announcements = None

    async def close(self) -> None:
        """Close the connections."""
        await self._stop_listening()
        await self._redis.aclose()


class Lease:
    """The right to train, held by one worker at a time. Each holder has a higher token than the last."""

    def __init__(self, client: redis.asyncio.Redis, seconds: float) -> None:
        self._redis = client
        self._seconds = seconds
        self._prolong = client.register_script((Path(__file__).parent / "lease.lua").read_text())
        self._value = ""
        self._ends = 0.0
        self.token: int | None = None

    @classmethod
    def connect(cls, url: str, seconds: float) -> Self:
        """A lease over the Redis at ``url``, not held yet."""
        return cls(_client(url), seconds)

    async def acquire(self) -> bool:
        """Take the lease if nobody holds it. True sets ``token``."""
        asked = time.monotonic()
        async with _translated():
            token = int(await self._redis.incr(_TOKEN))
            value = f"{token} {_whoami()}"
            taken = await self._redis.set(_LEASE, value, nx=True, px=int(self._seconds * 1000))
        if taken:
            self.token, self._value, self._ends = token, value, asked + self._seconds
        return bool(taken)

    async def renew(self) -> None:
        """Hold it for another term. Raises LeaseLost, ReleaseUnavailable."""
        asked = time.monotonic()
        await self._live_for(self._seconds)
        self._ends = asked + self._seconds

    async def check(self) -> None:
        """Ask Redis whether it is still held. Raises LeaseLost, ReleaseUnavailable."""
        async with _translated():
            holder = await self._redis.get(_LEASE)
        if not self._value or holder != self._value:
            raise errors.LeaseLost(f"the training lease is held by {holder!r}, not by token {self.token}")

    def check_time(self) -> None:
        """Without asking Redis: raise errors.LeaseLost where the term last granted is over (a process was paused)."""
        if time.monotonic() >= self._ends:
            raise errors.LeaseLost(f"the term of token {self.token} is over")

    async def release(self) -> None:
        """Give it back; whoever waits can have it at once. Raises LeaseLost where it was lost before."""
        self._ends = 0.0
        await self._live_for(0.0)

    async def _live_for(self, seconds: float) -> None:
        async with _translated():
            held = await self._prolong(keys=[_LEASE], args=[self._value, int(seconds * 1000)])
        if not held:
            raise errors.LeaseLost(f"token {self.token} does not hold the training lease any more")

    async def close(self) -> None:
        """Close the connection; the lease, if held, runs out by itself."""
        await self._redis.aclose()


def _client(url: str) -> redis.asyncio.Redis:
    """A client that answers or fails within a second, and never repeats a write."""
    return redis.asyncio.Redis.from_url(
        url, decode_responses=True, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)
    )


@contextlib.asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise errors.ReleaseUnavailable(f"Redis does not answer as it should: {error}") from error


def _flat(fields: dict[str, str]) -> str:
    return json.dumps([part for pair in fields.items() for part in pair])


def _whoami() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
