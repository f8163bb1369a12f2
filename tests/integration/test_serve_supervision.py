"""An engine that dies, hangs or gives garbage is replaced while the server goes on."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from running_server import RunningServer, publish_policy, start_server

from deploy.registry import Registry
from feedback.embedded import start_or_join

pytestmark = pytest.mark.engine

ASKED = {"model": "policy", "prompt": "hello", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(byte_policy: Callable[[int], Path]) -> Iterator[RunningServer]:
    """Version 1; notices a hang in 4 s and garbage in 2 s. Its engine's weights go bad when state/spoil appears."""
    state = Path(tempfile.mkdtemp(prefix="il-"))
    publish_policy(Registry(state), byte_policy(1))
    settings = {
        "SPOIL_FILE": str(state / "spoil"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        "INSTRUCTLOOP_SERVE__ENGINE_ARGUMENTS": '["--worker-extension-cls", "spoilable_worker.SpoilableWorker"]',
        "INSTRUCTLOOP_SERVE__ENGINE_HANG_SECONDS": "4",
        "INSTRUCTLOOP_SERVE__PROBE_SECONDS": "1",
        "INSTRUCTLOOP_SERVE__CANARY_CHECK_SECONDS": "2",
    }
    with start_or_join(state) as redis:
        running = start_server(state, redis.url, "--policy", "1", **settings)
        try:
            running.wait_ready()
            yield running
        finally:
            running.process.terminate()
            running.process.wait(60)
    shutil.rmtree(state)


def engine_process(server: RunningServer) -> int:
    """The server's child that runs vLLM's engine core."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == server.process.pid and b"EngineCore" in (process / "cmdline").read_bytes():
                return int(process.name)
    raise AssertionError("the server has no engine process")


def answer(server: RunningServer, **changes: object) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json=ASKED | changes, timeout=120)


def until_not_ready(server: RunningServer, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while httpx2.get(f"{server.url}/ready", timeout=20).status_code == 200:
        assert time.monotonic() < deadline, "the server still says that it is ready"
        time.sleep(0.05)


def restarts(server: RunningServer, reason: str) -> float:
    for line in httpx2.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f'instructloop_engine_restarts_total{{reason="{reason}"}}'):
            return float(line.split()[-1])
    return 0.0


def assert_overloaded(refused: httpx2.Response) -> None:
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["type"] == "overloaded_error" and int(refused.headers["Retry-After"]) <= 60


@pytest.mark.parametrize(("sent", "reason"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "hung")])
def test_an_engine_that_is_gone_or_stopped_is_started_again(
    server: RunningServer, sent: signal.Signals, reason: str
) -> None:
    before = answer(server).json()["choices"]
    long = {"max_tokens": 200, "ignore_eos": True, "n": 16, "temperature": 1}
    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(answer, server, **long)
        streamed = threads.submit(answer, server, **long, stream=True)
        time.sleep(0.3)
        os.kill(engine_process(server), sent)
        until_not_ready(server, 6.5)
        assert_overloaded(whole.result())  # what was running is told to come again, not left waiting
        assert '"error"' in streamed.result().text and "[DONE]" not in streamed.result().text
    if reason == "died":
        assert_overloaded(answer(server))
    server.wait_ready()
    assert answer(server).json()["choices"] == before
    assert restarts(server, reason) == 1
    assert server.process.poll() is None


def test_an_engine_whose_weights_went_bad_is_replaced(server: RunningServer) -> None:
    before = answer(server).json()["choices"]
    (server.state / "spoil").touch()
    deadline = time.monotonic() + 20
    while restarts(server, "garbage") == 0:
        assert time.monotonic() < deadline, "garbage was not noticed"
        time.sleep(0.1)
    assert httpx2.get(f"{server.url}/ready", timeout=20).status_code == 503
    server.wait_ready()
    assert answer(server).json()["choices"] == before


def test_an_engine_does_not_outlive_a_server_that_is_killed(server: RunningServer) -> None:
    engine = Path(f"/proc/{engine_process(server)}")
    server.process.kill()
    server.process.wait(10)
    deadline = time.monotonic() + 10
    while engine.exists():
        assert time.monotonic() < deadline, "the engine goes on without a server, with all its memory"
        time.sleep(0.05)
