"""The guard of a running server: what labelers say over HTTP moves the release, with nobody at the command line."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from redis import Redis
from running_server import RunningServer, start_server

from deploy.gate import GateCheck, GateReport
from deploy.guard import Guard
from deploy.registry import Registry, ReleaseStore
from deploy.settings import DeploySettings
from deploy.versions import Draft, VersionKind
from feedback import keys
from feedback.embedded import start_or_join
from feedback.records import BlindTask, unpack
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.guard import guard_canary
from serve.metrics import Metrics

PASSED = GateReport.of([GateCheck(name="eos_share", passed=True, value=1.0, limit=0.95, sentence="eos_share is 1")])
MOST = 120
"""Comparisons after which a canary preferred nine times in ten must have been decided about."""


@pytest.fixture
def guarded(byte_policy: Callable[[int], Path], state_dir: Path) -> Iterator[RunningServer]:
    """A server of version 1 that promotes by itself; version 2 has passed its gate, too."""
    registry = Registry(state_dir)
    for seed in (1, 2):
        registry.publish(Draft(kind=VersionKind.POLICY, gate=PASSED), byte_policy(seed))
    with start_or_join(state_dir) as redis:
        settings = {
            "INSTRUCTLOOP_DEPLOY__AUTO_PROMOTE": "better",
            "INSTRUCTLOOP_DEPLOY__GUARD_SECONDS": "0.5",
            "INSTRUCTLOOP_SERVE__TASK_MAX_COMPLETION_TOKENS": "4",
        }
        server = start_server(state_dir, redis.url, "--policy", "1", **settings)
        try:
            server.wait_ready()
            yield server
        finally:
            server.process.terminate()
            server.process.wait(60)


def label(server: RunningServer, redis: Redis, prefers: int, draw: random.Random) -> None:
    """A labeler judges one blind task: nine times in ten for that version's completion."""
    asked = {"k": 2, "prompt": f"tell me about {draw.random()}"}
    task = httpx2.post(f"{server.url}/v1/feedback/tasks", json=asked, timeout=60).json()
    packed = redis.get(keys.task(task["id"]))  # labelers see whose completion it is by reading it; these cannot read
    assert isinstance(packed, bytes)
    versions = [candidate.policy_version for candidate in unpack(BlindTask, packed).candidates]
    chosen = versions.index(prefers) if draw.random() < 0.9 else 1 - versions.index(prefers)
    body = {"task_id": task["id"], "preferred": chosen}
    assert httpx2.post(f"{server.url}/v1/feedback/comparisons", json=body, timeout=60).status_code == 201


def judged_until_decided(server: RunningServer, prefers: int) -> tuple[int, dict[str, object]]:
    """Labelers judge until the canary is gone: how many comparisons they gave, and the release then."""
    draw = random.Random(prefers)
    with Redis.from_url(server.redis_url) as redis:
        for judged in range(1, MOST + 1):
            label(server, redis, prefers, draw)
            release = httpx2.get(f"{server.url}/v1/release", timeout=20).json()
            if release["canary"] is None:
                return judged, release
    pytest.fail(f"nothing was decided after {MOST} comparisons")


@pytest.mark.engine
def test_people_promote_a_good_canary_and_drop_a_bad_one_while_the_server_runs(guarded: RunningServer) -> None:
    server = guarded
    assert server.operate("canary", "2", "--fraction", "0.3").returncode == 0
    server.wait_ready()
    judged, release = judged_until_decided(server, prefers=2)
    assert (release["stable"], release["previous"], release["by"]) == (2, 1, "guard")
    assert judged < 60, "the median at nine in ten is 12, and the guard looks every half second"
    server.wait_ready()
    body = {"model": "policy", "prompt": "hello", "max_tokens": 2}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.headers["x-policy-version"] == "2"

    assert server.operate("canary", "1", "--fraction", "0.3").returncode == 0
    server.wait_ready()
    judged, release = judged_until_decided(server, prefers=2)
    assert (release["stable"], release["by"]) == (2, "guard")
    assert judged < 60
    told = server.operate("history", "--count", "1", "--json").stdout
    assert "the canary is worse" in told and "20 decides" in told
    page = httpx2.get(f"{server.url}/metrics", timeout=20).text
    assert 'instructloop_guard_actions_total{verb="promote"} 1.0' in page
    assert 'instructloop_guard_actions_total{verb="rollback"} 1.0' in page


async def test_without_redis_nothing_is_decided_and_it_is_said_once(
    state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    redis = start_or_join(state_dir)
    releases = ReleaseStore.connect(redis.url, state_dir)
    feedback = FeedbackStore.connect(redis.url, FeedbackSettings())
    caplog.set_level(logging.INFO, "serve.guard")
    guarding = asyncio.create_task(
        guard_canary(Guard("a", releases, feedback, DeploySettings()), 0.02, metrics=Metrics())
    )

    async def said(message: str) -> int:
        await asyncio.sleep(0.5)
        return sum(message in record.getMessage() for record in caplog.records)

    try:
        assert await said("guarded") == 0
        await asyncio.to_thread(redis.close)
        assert await said("is not guarded until Redis answers") == 1
        redis = await asyncio.to_thread(start_or_join, state_dir)
        deadline = time.monotonic() + 20
        while not await said("is guarded again"):
            assert time.monotonic() < deadline
        assert not guarding.done()
    finally:
        while not guarding.done():  # redis-py, just timing out, may swallow a cancellation
            guarding.cancel()
            await asyncio.wait([guarding], timeout=1.0)
        await releases.close()
        await feedback.close()
        redis.close()
