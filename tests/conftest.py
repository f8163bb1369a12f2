"""Fixtures every package's tests share: a short state directory and a real, durable redis-server."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from running_server import RunningServer, build_policy, publish_policy, start_server

from deploy.registry import Registry
from feedback.embedded import EmbeddedRedis, start_or_join
from feedback.records import Candidate, Comparison, Prompt, new_id


def _short_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """An empty state directory whose path leaves room for a unix socket."""
    yield from _short_directory()


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[EmbeddedRedis]:
    """One embedded redis-server for the whole session; tests take ``redis_url``."""
    for state in _short_directory():
        with start_or_join(state) as server:
            yield server


@pytest.fixture
def redis_url(shared_redis: EmbeddedRedis) -> str:
    """URL of an empty, durable redis-server. Tests that stop or misconfigure one start their own in ``state_dir``."""
    with Redis.from_url(shared_redis.url) as client:
        client.flushall()
    return shared_redis.url


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
