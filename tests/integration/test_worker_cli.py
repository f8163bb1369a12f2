"""``python -m train``: the stages by hand, and a worker process that is stopped, killed and started again."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from tiny_loop import SETTINGS, TOLERANT, Loop, tiny_loop
from typer.testing import CliRunner, Result

from deploy.registry import Registry
from deploy.versions import VersionKind
from train.__main__ import app
from train.rounds.runs import RunDirectory


@pytest.fixture
async def loop(state_dir: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Loop]:
    (tmp_path / "sft").mkdir()
    async with tiny_loop(state_dir, redis_url, tmp_path / "sft") as made:
        await made.compare(60)
        yield made


def toml(table: str, fields: dict[str, object]) -> list[str]:
    """The lines of a table, and of the tables in it."""
    nested = {name: value for name, value in fields.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items() if name not in nested]
    return [f"[{table}]", *lines, *(line for name, inner in nested.items() for line in toml(f"{table}.{name}", inner))]


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """The tiny loop's settings as a person would write them; PPO lasts long enough to be interrupted."""
    tables = {
        "deploy.gate": TOLERANT.model_dump(),
        "train.reward_model": SETTINGS.reward_model.model_dump(exclude_none=True),
        "train.ppo": SETTINGS.ppo.model_dump(exclude_none=True) | {"iterations": 60},
        "train.evaluate": SETTINGS.evaluate.model_dump(exclude_none=True),
        "train.worker": SETTINGS.worker.model_dump() | {"lease_seconds": 1.5},
    }
    lines = [line for table, fields in tables.items() for line in toml(table, fields)]
    path = tmp_path / "loop.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def train(loop: Loop, settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("INSTRUCTLOOP_SETTINGS", str(settings_file))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--state", str(loop.state), "--redis-url", loop.url, *arguments])

    return run


def test_the_stages_by_hand(train: Callable[..., Result], loop: Loop, tmp_path: Path) -> None:
    fitted = train("reward-model", str(tmp_path / "rm"))
    assert fitted.exit_code == 0, fitted.output
    assert json.loads(fitted.stdout)["held_out_accuracy"] > 0.7
    registry = Registry(loop.state)
    assert registry.numbers(VersionKind.REWARD_MODEL) == [], "by hand publishes nothing"

    refused = train("ppo", str(tmp_path / "ppo"), "--reward-model", "1")
    assert refused.exit_code == 1
    assert "no reward_model version 1" in refused.stderr

    measured = train("evaluate", "1")
    assert measured.exit_code == 0, measured.output
    figures = json.loads(measured.stdout)
    assert abs(figures["kl_to_reference"]) < 1e-4, "the reference measured against itself"
    assert figures["nonfinite_weights"] == 0
    assert measured.stderr == "", "no bars where nobody looks"
    beside = train("evaluate", "1", "--against", "1", "--seed", "3", "--seed", "4")
    assert beside.exit_code == 0, beside.output
    assert json.loads(beside.stdout).keys() >= figures.keys()
    assert train("evaluate", "7").exit_code == 1
    assert train("evaluate", "seven").exit_code == 2

    weights = registry.get(VersionKind.POLICY, 1).path / "model.safetensors"
    body = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    for arguments in (("evaluate", "1"), ("reward-model", "rm"), ("ppo", "out", "--reward-model", "1")):
        refused = train(*arguments)
        assert refused.exit_code == 1, arguments
        assert "model.safetensors: sha256" in refused.stderr, "it would load as if it were whole"


@pytest.fixture
def start_worker(loop: Loop, settings_file: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    log = (loop.state / "worker.log").open("ab")

    def start(metrics_port: int = 0) -> subprocess.Popen[bytes]:
        environment = os.environ | {"INSTRUCTLOOP_SETTINGS": str(settings_file), "OMP_NUM_THREADS": "1"}
        environment["INSTRUCTLOOP_TRAIN__WORKER__METRICS_PORT"] = str(metrics_port)
        command = [sys.executable, "-m", "train", "--state", str(loop.state), "--redis-url", loop.url, "worker"]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
        worker.wait()
    log.close()


def wait_for(state: Path, what: Callable[[RunDirectory], bool]) -> RunDirectory:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for run in RunDirectory.all(state):
            if what(run):
                return run
        time.sleep(0.02)
    pytest.fail((state / "worker.log").read_text()[-3000:])


def written(run: RunDirectory) -> int:
    """When the newest resume point was written, in ns; 0 where there is none."""
    times = []
    for point in run.path.glob("work-*/ppo.pt"):
        with contextlib.suppress(FileNotFoundError):  # the next holder renames the directory
            times.append(point.stat().st_mtime_ns)
    return max(times, default=0)


def ended(run: RunDirectory) -> bool:
    return run.outcome is not None


def test_a_worker_that_is_stopped_killed_and_paused_finishes_the_round_once(
    loop: Loop, start_worker: Callable[..., subprocess.Popen[bytes]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stopped = start_worker(port)
    run = wait_for(loop.state, lambda run: written(run) > 0)
    page = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    assert "instructloop_worker_lease_held 1.0" in page
    assert 'instructloop_worker_stage_number{name="score",stage="ppo"}' in page
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 0, "stopping is not a failure"
    assert not ended(run)
    resume_point = written(run)

    killed = start_worker()
    wait_for(loop.state, lambda run: written(run) > resume_point)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resume_point = written(run)

    paused = start_worker()
    wait_for(loop.state, lambda run: written(run) > resume_point)
    paused.send_signal(signal.SIGSTOP)
    successor = start_worker()
    wait_for(loop.state, ended)
    paused.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    assert paused.poll() is None and successor.poll() is None, "both go on waiting for comparisons"

    registry = Registry(loop.state)
    assert registry.numbers(VersionKind.POLICY) == [1, 2]
    assert registry.numbers(VersionKind.REWARD_MODEL) == [1]
    registry.verify(registry.get(VersionKind.POLICY, 2))
    history = [json.loads(line) for line in (run.path / "ppo-history.jsonl").read_text().splitlines()]
    assert [numbers["iteration"] for numbers in history] == list(range(60)), "no iteration is lost or done twice"
