"""Where a part is measured: a state directory of its own with its durable Redis, and what may be done to them."""

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from redis import Redis
from running_server import free_port
from servers import BenchFailed, Server, redis_pid

from feedback import keeper
from feedback.embedded import LOAD_SECONDS, start_or_join
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

Store = TypeVar("Store", bound=FeedbackStore)
_PATIENCE_SECONDS = 30.0
"""That this process waits for Redis: what it checks is not to fail because the machine is busy."""
_STOP_SECONDS = 40.0
_FSYNCS, _FSYNC_BYTES = 200, 4096


@dataclass(frozen=True)
class Place:
    """A state directory and the URL of its embedded Redis."""

    state: Path
    url: str


@dataclass(frozen=True)
class Size:
    """What Redis holds, in bytes: in memory, and in its append-only file."""

    memory: int
    disk: int


@contextmanager
def place() -> Iterator[Place]:
    """A new one, gone on leaving."""
    state = Path(tempfile.mkdtemp(prefix="il-"))
    try:
        with start_or_join(state) as redis:
            yield Place(state, redis.url)
    finally:
        shutil.rmtree(state)


@asynccontextmanager
async def connected(kind: type[Store], url: str, connections: int = 1) -> AsyncIterator[Store]:
    """A store of that kind on Redis, closed on leaving."""
    settings = FeedbackSettings(socket_timeout_seconds=_PATIENCE_SECONDS, max_connections=connections)
    store = kind.connect(url, settings)
    try:
        yield store
    finally:
        await store.close()


@contextmanager
def naive_server(at: Place, connections: int) -> Iterator[Server]:
    """Our server without group commit, see ``feedback_naive_server``; ended on leaving."""
    port, log = free_port(), at.state / "naive.log"
    environment = os.environ | {
        "INSTRUCTLOOP_STATE": str(at.state),
        "INSTRUCTLOOP_REDIS_URL": at.url,
        "INSTRUCTLOOP_SERVE__ACCESS_LOG": "false",
        "INSTRUCTLOOP_FEEDBACK__MAX_CONNECTIONS": str(connections),
    }
    command = [sys.executable, str(Path(__file__).with_name("feedback_naive_server.py")), "--port", str(port)]
    with log.open("ab") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            yield Server(port, process, log, "/health")
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


async def require_durable(store: FeedbackStore) -> None:
    """Raise BenchFailed where an acknowledged record might be lost: then nothing here is worth measuring."""
    if problems := await store.durability_problems():
        raise BenchFailed("; ".join(problems))


async def size(url: str) -> Size:
    """What Redis holds, once it does not rewrite its file. Raises BenchFailed where it never ends to."""
    with Redis.from_url(url, socket_timeout=_PATIENCE_SECONDS) as client:
        deadline = time.monotonic() + LOAD_SECONDS
        while (persistence := client.info("persistence"))["aof_rewrite_in_progress"]:
            if time.monotonic() > deadline:
                raise BenchFailed(f"Redis has been rewriting its file for {LOAD_SECONDS:.0f} s")
            await asyncio.sleep(0.1)
        return Size(int(client.info("memory")["used_memory"]), int(persistence["aof_current_size"]))


async def kill_redis(url: str) -> float:
    """Kill redis-server with SIGKILL; returns the seconds until its keeper's next one answers, with all it has read."""
    pid, path = redis_pid(url), unquote(urlsplit(url).path)
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        await asyncio.sleep(0.002)
    while keeper.ping(path) != b"+PONG":
        if time.perf_counter() > began + LOAD_SECONDS:
            raise BenchFailed(f"Redis did not come back within {LOAD_SECONDS:.0f} s of SIGKILL")
        await asyncio.sleep(0.01)
    return time.perf_counter() - began


async def count_lost(url: str, acknowledged: Iterable[str]) -> tuple[int, int]:
    """How many of the acknowledged records the log lacks, and how many it has that were not acknowledged."""
    found = set[str]()
    async with connected(FeedbackStore, url) as store:
        async for batch in store.raw_batches():
            found.update(entry.id for entry in batch if entry.sound)
    told = set(acknowledged)
    return len(told - found), len(found - told)


def fsync_ms() -> float:
    """Median milliseconds of one small write and its fsync, where the state directories are made."""
    taken = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(_FSYNCS):
            began = time.perf_counter()
            file.write(bytes(_FSYNC_BYTES))
            os.fsync(file.fileno())
            taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def free_memory() -> int:
    """Bytes of memory that could be had without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise BenchFailed("/proc/meminfo does not tell MemAvailable")
