import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from feedback import keeper
from feedback.embedded import MAX_SOCKET_PATH_BYTES, connect_url, start_or_join
from feedback.errors import EmbeddedRedisError
from feedback.settings import LoopSettings

JOIN_AND_WAIT = """
import sys
from pathlib import Path
from feedback.embedded import start_or_join
server = start_or_join(Path(sys.argv[1]))
print("joined", flush=True)
sys.stdin.read()
server.close()
"""


@contextmanager
def other_processes(state: Path, count: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that use the server of ``state`` until their standard input is closed."""
    command = [sys.executable, "-c", JOIN_AND_WAIT, str(state)]
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        yield processes


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


def process_id(url: str) -> int:
    with Redis.from_url(url) as client:
        found: int = client.info("server")["process_id"]
        return found


def is_stopped(state: Path) -> bool:
    with (state / "redis" / "server.lock").open("ab") as file:
        return keeper.lock(file, fcntl.LOCK_EX)


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def answers(url: str) -> bool:
    with Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except RedisConnectionError:
            return False


def test_it_runs_with_the_durable_settings_on_a_private_socket_only(state_dir: Path) -> None:
    with start_or_join(state_dir) as server, Redis.from_url(server.url, decode_responses=True) as client:
        live = {
            name: client.config_get(name)[name]
            for name in ("appendonly", "appendfsync", "maxmemory-policy", "save", "port", "aof-load-truncated")
        }
        path = Path(unquote(urlsplit(server.url).path))
        assert path == state_dir / "redis" / "redis.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert live == {
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "save": "",
        "port": "0",
        "aof-load-truncated": "yes",
    }


def test_close_ends_it_without_loss_and_twice_is_once(state_dir: Path) -> None:
    server = start_or_join(state_dir)
    with Redis.from_url(server.url) as client:
        client.set("a", "1")
    server.close()
    assert is_stopped(state_dir)
    server.close()
    with start_or_join(state_dir) as again, Redis.from_url(again.url) as client:
        assert client.get("a") == b"1"


def test_processes_share_one_server_that_ends_with_the_last_of_them(state_dir: Path) -> None:
    with other_processes(state_dir) as [starter]:
        joiner = start_or_join(state_dir)
        second = start_or_join(state_dir)
        pid = process_id(joiner.url)
        assert second.url == joiner.url
        finish(starter)
    assert process_id(joiner.url) == pid
    joiner.close()
    assert process_id(second.url) == pid
    second.close()
    assert is_stopped(state_dir)


def test_processes_that_start_at_the_same_moment_share_one_server(state_dir: Path) -> None:
    with other_processes(state_dir, count=4) as processes:
        log = (state_dir / "redis" / "redis.log").read_text()
        assert log.count("ready to accept connections") == 1
        for process in processes:
            finish(process)
    assert is_stopped(state_dir)


def test_it_does_not_outlive_users_that_were_killed(state_dir: Path) -> None:
    with other_processes(state_dir) as [process]:
        assert not is_stopped(state_dir)
        process.kill()
    eventually(lambda: is_stopped(state_dir))


def test_it_is_started_again_when_it_was_killed(state_dir: Path) -> None:
    with start_or_join(state_dir) as server:
        with Redis.from_url(server.url) as client:
            client.set("a", "1")
        killed = process_id(server.url)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: not answers(server.url))
        eventually(lambda: answers(server.url))
        assert process_id(server.url) != killed
        with Redis.from_url(server.url) as client:
            assert client.get("a") == b"1"


def test_a_long_state_path_gets_a_private_socket_elsewhere(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = state_dir / ("long " * 20) / ("longer" * 10)
    with start_or_join(deep) as server:
        path = Path(unquote(urlsplit(server.url).path))
        assert path.parent.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        monkeypatch.setattr(tempfile, "tempdir", str(state_dir))
        with start_or_join(deep) as joined:
            assert joined.url == server.url
        assert answers(server.url)
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("bytes_long", "in_state"), [(MAX_SOCKET_PATH_BYTES, True), (MAX_SOCKET_PATH_BYTES + 1, False)]
)
def test_a_socket_stays_in_the_state_directory_while_it_fits(state_dir: Path, bytes_long: int, in_state: bool) -> None:
    deep = state_dir / ("x" * (bytes_long - len(f"{state_dir}//redis/redis.sock")))
    with start_or_join(deep) as server:
        assert answers(server.url)
        assert (deep / "redis" / "redis.sock").exists() == in_state


def test_a_state_directory_deleted_under_it_does_not_break_closing(state_dir: Path) -> None:
    server = start_or_join(state_dir / "gone")
    shutil.rmtree(state_dir / "gone")
    server.close()


def test_a_socket_directory_that_others_can_enter_is_refused(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = state_dir / ("long " * 20)
    with start_or_join(deep) as server:
        planted = Path(unquote(urlsplit(server.url).path)).parent
    planted.mkdir(mode=0o777)
    planted.chmod(0o777)
    try:
        with pytest.raises(EmbeddedRedisError, match="only this account"):
            start_or_join(deep)
    finally:
        planted.rmdir()


def test_files_it_cannot_read_back_are_an_error_with_the_end_of_its_log(state_dir: Path) -> None:
    with start_or_join(state_dir):
        pass
    (state_dir / "redis" / "appendonly.aof").write_bytes(b"not a log\r\n" * 10)
    with pytest.raises(EmbeddedRedisError, match=r"(?s)did not start.*redis\.log.*Bad file format"):
        start_or_join(state_dir)
    assert is_stopped(state_dir)


def test_a_state_directory_that_cannot_be_one_is_named(state_dir: Path) -> None:
    (state_dir / "file").write_text("")
    with pytest.raises(EmbeddedRedisError, match=r"cannot use .*file/redis"):
        start_or_join(state_dir / "file")


def test_a_redis_of_ones_own_is_left_alone(state_dir: Path) -> None:
    with connect_url(LoopSettings(state=state_dir / "own", redis_url="redis://elsewhere")) as url:
        assert url == "redis://elsewhere"
    assert not (state_dir / "own").exists()
    with connect_url(LoopSettings(state=state_dir)) as url:
        assert answers(url)
    assert is_stopped(state_dir)
