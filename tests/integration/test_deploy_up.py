"""``make up``: everything comes up, and one Ctrl-C ends all of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from running_server import free_port

pytestmark = pytest.mark.engine


def processes_of(state: Path) -> list[str]:
    """Command lines of the live processes that name this state directory in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            about = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(state).encode() in about and process.name != str(os.getpid()):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_stops_cleanly(byte_policy: Callable[[int], Path], state_dir: Path, number: int) -> None:
    port = free_port()
    deploy = [sys.executable, "-m", "deploy", "--state", str(state_dir)]
    subprocess.run([*deploy, "import", str(byte_policy(1))], check=True, capture_output=True)
    with subprocess.Popen([*deploy, "up", "--port", str(port)], stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        said = ""
        while "metrics" not in said:
            line = up.stdout.readline()
            assert line, said
            said += line
        assert f"http://127.0.0.1:{port}/v1" in said
        assert httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=20).status_code == 200
        up.send_signal(number)
        assert up.wait(60) == 0
    deadline = time.monotonic() + 20  # the keeper of the embedded Redis goes last
    while processes_of(state_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(state_dir) == []


def test_a_child_that_dies_ends_up_with_its_name(byte_policy: Callable[[int], Path], state_dir: Path) -> None:
    deploy = [sys.executable, "-m", "deploy", "--state", str(state_dir)]
    for _ in range(2):
        subprocess.run([*deploy, "import", str(byte_policy(1))], check=True, capture_output=True)
    candidate = state_dir / "policies" / "2" / "manifest.json"
    candidate.unlink()
    candidate.write_text("{}")  # a version that nobody is served by keeps nothing from starting
    broken = os.environ | {"INSTRUCTLOOP_SERVE__MODEL_NAME": "Not A Name"}
    ended = subprocess.run(
        [*deploy, "up", "--port", str(free_port())], env=broken, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert "serve" in ended.stderr and "log" in ended.stderr
