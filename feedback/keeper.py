"""Keeps one redis-server running for as long as some process uses its state directory.

Run by ``feedback.embedded`` as a detached process: ``keeper.py DIRECTORY SOCKET redis-server ARGUMENT…``. Two
``flock`` locks in DIRECTORY carry all the coordination, because the kernel frees them whatever way a process ends:

- ``users.lock``: every process that uses the server holds it shared. Whoever gets it exclusively knows
  that nobody uses the server, and may stop it. So the server outlives whichever process happened to start it,
  and never outlives the last one that uses it, even where that one was killed.
- ``server.lock``: held by the keeper and, as an inherited descriptor, by redis-server itself. While it is
  held no second server can open the same files.

A parent-death signal could not do this: it ends the server with its starter while others still use it, and it
fires when the starting *thread* ends. A redis-server that dies unasked (killed, disk full) is started again;
one that was told to SHUTDOWN is not. This file imports the standard library only, to start in a few milliseconds.
"""

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

READY = b"ready"
"""Written to standard output once the server answers."""
BUSY = b"busy"
"""Written to standard output where another keeper or its server already holds the directory."""
POLL_SECONDS = 0.5
"""How often the keeper looks whether anybody still uses the server; also the pause before a restart."""
STOP_SECONDS = 10.0
"""How long redis-server may take to stop before it is killed; with appendfsync always that loses nothing."""


def lock(file: BinaryIO, operation: int) -> bool:
    """Try ``flock(file, operation)`` without waiting; False where others hold it."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ping(path: str, timeout_seconds: float = 1.0) -> bytes | None:
    """The first line a server on unix socket ``path`` answers to PING, or None where none answers in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(path)
            connection.sendall(b"PING\r\n")
            return connection.recv(512).partition(b"\r\n")[0] or None
        except OSError:
            return None


def keep(directory: Path, path: str, command: list[str]) -> int:
    """Run ``command`` until it is told to stop or nobody holds ``users.lock``; 1 where it never came up."""
    with (directory / "users.lock").open("ab") as users, (directory / "server.lock").open("ab") as server:
        if not lock(server, fcntl.LOCK_EX):
            return _tell_starter(BUSY)
        was_ready = False
        while True:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[server.fileno()])
            while process.poll() is None:
                if not was_ready and ping(path) == b"+PONG":
                    was_ready = True
                    _tell_starter(READY)
                if lock(users, fcntl.LOCK_EX):
                    return _stop(process)
                _wait(process, POLL_SECONDS if was_ready else 0.01)
            if process.returncode == 0:
                return 0
            if not was_ready:
                return 1
            time.sleep(POLL_SECONDS)


def _tell_starter(what: bytes) -> int:
    os.write(1, what)
    os.dup2(2, 1)  # closes the pipe: the starter reads to its end
    return 0


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()  # redis-server takes SIGTERM as SHUTDOWN
    _wait(process, STOP_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()
    return 0


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # the starter waits for this parent; the keeper itself belongs to nobody
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
