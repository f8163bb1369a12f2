"""Fixtures every package's tests share: a short state directory and a real, durable redis-server."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from running_server import RunningServer, build_policy, publish_policy, start_server

from deploy.registry import Registry
from feedback.embedded import start_or_join
from feedback.records import Candidate, Comparison, Prompt, new_id
from feedback.store import DURABLE


def _short_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """An empty state directory whose path leaves room for a unix socket."""
    yield from _short_directory()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of feedback and releases run on the embedded Redis and, where one is installed, on the machine's own."""
    if "shared_redis" in metafunc.fixturenames and metafunc.module.__name__.startswith(
        ("test_feedback", "test_deploy")
    ):
        servers = ["embedded", "installed"] if shutil.which("redis-server") else ["embedded"]
        metafunc.parametrize("shared_redis", servers, indirect=True, scope="session")


@pytest.fixture(scope="session")
def shared_redis(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of one redis-server for the whole session; tests take ``redis_url``."""
    for state in _short_directory():
        if getattr(request, "param", "embedded") == "embedded":
            with start_or_join(state) as server:
                yield server.url
        else:
            yield from _installed_redis(state)


def _installed_redis(directory: Path) -> Iterator[str]:
    """The machine's own redis-server, configured as ours is."""
    socket = directory / "redis.sock"
    settings = [part for name, value in DURABLE.items() for part in (f"--{name}", value)]
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(directory), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with Redis.from_url(f"unix://{socket}", retry=Retry(ConstantBackoff(0.1), 50)) as client:
            client.ping()
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def redis_url(shared_redis: str) -> str:
    """URL of an empty, durable redis-server. Tests that stop or misconfigure one start their own in ``state_dir``."""
    with Redis.from_url(shared_redis) as client:
        client.flushall()
    return shared_redis


@pytest.fixture
def make_comparison() -> Callable[..., Comparison]:
    """Makes a comparison of two completions that names alice's labeler L-1, changed by keyword."""

    def make(**changes: object) -> Comparison:
        record = Comparison(
            id=new_id("cmp_"),
            created=1.5,
            principal="alice",
            labeler="L-1",
            prompt=Prompt(text="tell me about a frog"),
            source="outside",
            candidates=(Candidate(text="a green frog"), Candidate(text="a frog")),
            ranking=((0,), (1,)),
        )
        return record.model_copy(update=changes)

    return make


@pytest.fixture(scope="session")
def byte_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Directory of the random policy of a seed, made once."""
    made: dict[int, Path] = {}

    def get(seed: int) -> Path:
        if seed not in made:
            made[seed] = build_policy(tmp_path_factory.mktemp(f"policy-{seed}"), seed)
        return made[seed]

    return get


@pytest.fixture(scope="session")
def server(byte_policy: Callable[[int], Path]) -> Iterator[RunningServer]:
    """Version 1 stable and versions 2 and 3 published; tests leave the release as they found it."""
    state = Path(tempfile.mkdtemp(prefix="il-"))
    registry = Registry(state)
    for seed in (1, 2, 3):
        publish_policy(registry, byte_policy(seed))
    with start_or_join(state) as redis:
        running = start_server(state, redis.url, "--policy", "1")
        try:
            running.wait_ready()
            yield running
        finally:
            running.process.terminate()
            running.process.wait(60)
    shutil.rmtree(state)
