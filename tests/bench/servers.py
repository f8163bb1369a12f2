"""The servers that are compared: ours, vLLM's own, and a proxy; each a process tree whose CPU time is read."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from redis import Redis
from running_server import free_port, start_server

_HERE = Path(__file__).parent
_TICKS = os.sysconf("SC_CLK_TCK")
_READY_SECONDS = 300.0
_STOP_SECONDS = 40.0


class BenchFailed(Exception):
    """The benchmark cannot go on; says what was wrong."""


@dataclass(frozen=True)
class Server:
    """A server process that listens on a port of this machine.

    Attributes:
        ready_path: Answers 200 once the server does.
    """

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    ready_path: str

    @property
    def pid(self) -> int:
        """Root of its process tree."""
        return self.process.pid

    def wait_ready(self) -> None:
        """Wait until it answers. Raises BenchFailed with the end of its log where it does not."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx2.TransportError):
                if httpx2.get(f"http://127.0.0.1:{self.port}{self.ready_path}", timeout=10).status_code == 200:
                    return
            time.sleep(0.25)
        raise BenchFailed(f"a server did not become ready; the end of its log:\n{self.log.read_text()[-3000:]}")


@contextmanager
def ours(state: Path, redis_url: str, **environment: str) -> Iterator[Server]:
    """``python -m serve`` over a state directory whose release is made already; ended on leaving."""
    running = start_server(state, redis_url, **environment)
    port = int(running.url.rpartition(":")[2])
    with _ended_after(running.process):
        yield Server(port, running.process, running.log, "/ready")


@contextmanager
def vllms_own(model: Path, log: Path) -> Iterator[Server]:
    """vLLM's own server over a model directory; ended on leaving."""
    with _script("vllm_server.py", log, "/health", str(model)) as server:
        yield server


@contextmanager
def proxy(upstream: Server, log: Path) -> Iterator[Server]:
    """The minimal proxy before another server; ended on leaving."""
    with _script("proxy.py", log, upstream.ready_path, f"http://127.0.0.1:{upstream.port}") as server:
        yield server


@contextmanager
def _script(name: str, log: Path, ready_path: str, argument: str) -> Iterator[Server]:
    port = free_port()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, str(_HERE / name), argument, str(port)], stdout=out, stderr=subprocess.STDOUT
        )
    with _ended_after(process):
        yield Server(port, process, log, ready_path)


@contextmanager
def _ended_after(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the process on leaving, and whatever of its tree outlives it."""
    try:
        yield
    finally:
        tree = _tree(process.pid)
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid, before in tree.items():
            if (now := _read_stat(pid)) is not None and now.started == before.started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def redis_pid(url: str) -> int:
    """Process id of the redis-server at a URL."""
    with Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


def cpu_seconds(*roots: int) -> float:
    """User plus system seconds used so far by some processes and all that descend from them."""
    return sum(stat.ticks for root in roots for stat in _tree(root).values()) / _TICKS


@dataclass(frozen=True)
class _Stat:
    parent: int
    ticks: int
    started: int


def _tree(root: int) -> dict[int, _Stat]:
    stats = {int(entry): stat for entry in os.listdir("/proc") if entry.isdigit() and (stat := _read_stat(int(entry)))}
    tree = {root: stats[root]} if root in stats else {}
    grown = True
    while grown:
        below = {pid: stat for pid, stat in stats.items() if stat.parent in tree and pid not in tree}
        tree |= below
        grown = bool(below)
    return tree


def _read_stat(pid: int) -> _Stat | None:
    """None where the process has ended. Fields are counted from behind the name, which may hold anything (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Stat(parent=int(fields[1]), ticks=int(fields[11]) + int(fields[12]), started=int(fields[19]))
