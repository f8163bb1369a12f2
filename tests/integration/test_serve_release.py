"""Changing versions under load: no failed request, no completion of two versions, and nothing corrupt is served."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from running_server import RunningServer, build_policy, publish_policy, start_server

from deploy.registry import Registry
from deploy.versions import Draft, VersionKind
from feedback.embedded import start_or_join

pytestmark = pytest.mark.engine


def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.1)


class Load:
    """Users who keep asking; what each was told is kept."""

    def __init__(self, url: str, users: int) -> None:
        self.failures: list[str] = []
        self.served: Counter[tuple[str, str]] = Counter()
        self.mixed: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(f"user-{number}",)) for number in range(users)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, user: str) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self._over.is_set():
                body = {"model": "policy", "prompt": "hello", "max_tokens": 8, "user": user}
                answer = client.post(f"{self._url}/v1/completions", json=body)
                if answer.status_code != 200:
                    self.failures.append(answer.text)
                    continue
                version = answer.headers["x-policy-version"]
                self.served[user, version] += 1
                if answer.json()["model"] != f"policy-v{version}":
                    self.mixed.append(answer.text)


@pytest.fixture
def stable_1(server: RunningServer) -> Iterator[RunningServer]:
    """The shared server; its release is brought back to version 1 afterwards."""
    yield server
    for _ in range(3):
        if server.operate("rollback").returncode:
            break
    server.wait_ready()


def test_canary_promote_and_rollback_under_load(stable_1: RunningServer) -> None:
    server = stable_1

    def version_served() -> str:
        answer = httpx2.post(f"{server.url}/v1/completions", json={"model": "policy", "prompt": "x", "max_tokens": 1})
        return answer.headers["x-policy-version"]

    with Load(server.url, users=8) as load:
        assert server.operate("canary", "2", "--fraction", "0.5").returncode == 1  # it was never measured
        began = server.operate("canary", "2", "--fraction", "0.5", "--override", "a test")
        assert began.returncode == 0, began.stderr
        until(lambda: any(version == "2" for _, version in list(load.served)))
        server.wait_ready()
        load.served.clear()
        until(lambda: len({user for user, _ in list(load.served)}) == 8)  # what was asked before the canary is answered
        load.served.clear()
        until(lambda: sum(load.served.values()) > 100)
        during = Counter(load.served)
        refused = server.operate("promote")
        assert refused.returncode == 1 and "undecided" in refused.stdout + refused.stderr
        assert server.operate("promote", "--override", "a test").returncode == 0
        until(lambda: version_served() == "2")
        assert server.operate("rollback").returncode == 0
        until(lambda: version_served() == "1")
    assert load.failures == []
    assert load.mixed == []
    arms = {user: {version for (who, version) in during if who == user} for user, _ in during}
    assert all(len(versions) == 1 for versions in arms.values()), "a user moved between arms during one canary"
    assert {version for versions in arms.values() for version in versions} == {"1", "2"}


def test_a_blind_task_has_one_candidate_from_each_arm(stable_1: RunningServer) -> None:
    server = stable_1
    assert server.operate("canary", "3", "--fraction", "0.1", "--override", "a test").returncode == 0
    server.wait_ready()
    task = httpx2.post(f"{server.url}/v1/feedback/tasks", json={"k": 2, "prompt": "hello"}, timeout=60).json()
    judged = httpx2.post(f"{server.url}/v1/feedback/comparisons", json={"task_id": task["id"], "preferred": 0}).json()
    assert sorted(candidate["policy_version"] for candidate in judged["candidates"]) == [1, 3]


def test_corrupt_and_swapped_versions_are_never_served(
    byte_policy: Callable[[int], Path], state_dir: Path, tmp_path: Path
) -> None:
    registry = Registry(state_dir)
    publish_policy(registry, byte_policy(1))
    flipped = registry.get(VersionKind.POLICY, publish_policy(registry, byte_policy(2)))
    # Weights of another policy under version 1's canary prompts: every digest is right, and it must still be caught.
    wrong = build_policy(tmp_path / "wrong", 9)
    canaries = registry.get(VersionKind.POLICY, 1).manifest.canary_prompts

    registry.publish(Draft(kind=VersionKind.POLICY, canary_prompts=canaries), wrong)
    with start_or_join(state_dir) as redis:
        server = start_server(state_dir, redis.url, "--policy", "1")
        try:
            server.wait_ready()
            assert server.operate("canary", "3", "--fraction", "0.5", "--override", "a test").returncode == 0
            until(lambda: "no server can load it" in server.operate("history", "--count", "1", "--json").stdout)
            dropped = json.loads(server.operate("history", "--count", "1", "--json").stdout)[0]
            assert (dropped["verb"], dropped["by"]) == ("rollback", "guard") and "canary prompt" in dropped["reason"]
            weights = flipped.path / "model.safetensors"
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.chmod(0o600)
            weights.write_bytes(content)
            refused = server.operate("canary", "2", "--fraction", "0.5", "--override", "a test")
            assert refused.returncode == 1 and "model.safetensors" in refused.stdout + refused.stderr
            answer = httpx2.post(
                f"{server.url}/v1/completions", json={"model": "policy", "prompt": "x", "max_tokens": 1}, timeout=60
            )
            assert (answer.status_code, answer.headers["x-policy-version"]) == (200, "1")
        finally:
            server.process.terminate()
            server.process.wait(60)


def test_redis_gone_completions_go_on_and_feedback_says_so(byte_policy: Callable[[int], Path], state_dir: Path) -> None:
    registry = Registry(state_dir)
    publish_policy(registry, byte_policy(1))
    redis = start_or_join(state_dir)
    server = start_server(state_dir, redis.url, "--policy", "1")
    try:
        server.wait_ready()
        body = {"model": "policy", "prompt": "hello", "n": 2, "max_tokens": 4}
        before = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        comparison = {"completion_id": before["id"], "preferred": 0}
        assert httpx2.post(f"{server.url}/v1/feedback/comparisons", json=comparison).status_code == 201
        redis.close()
        during = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert during.status_code == 200
        began = time.monotonic()
        refused = httpx2.post(f"{server.url}/v1/feedback/comparisons", json=comparison | {"preferred": 1})
        assert refused.status_code == 503 and time.monotonic() - began < 1.5
        assert refused.json()["error"]["type"] == "overloaded_error" and int(refused.headers["Retry-After"]) <= 60
        assert httpx2.get(f"{server.url}/ready", timeout=20).status_code == 503
        assert httpx2.get(f"{server.url}/ready?only=completions", timeout=20).status_code == 200
        metrics = httpx2.get(f"{server.url}/metrics", timeout=20).text.splitlines()
        assert {"instructloop_ready 0.0", "instructloop_redis_durable 0.0"} <= set(metrics)
        redis = start_or_join(state_dir)
        server.wait_ready()
        replayed = httpx2.post(f"{server.url}/v1/feedback/comparisons", json=comparison)
        assert replayed.status_code == 200, "what was acknowledged before must be there after"
        late = {"completion_id": during.json()["id"], "preferred": 1}
        until(lambda: httpx2.post(f"{server.url}/v1/feedback/comparisons", json=late).status_code in (200, 201), 20)
    finally:
        server.process.terminate()
        server.process.wait(60)
        redis.close()


def test_a_server_started_without_redis_serves_the_last_release_known(
    byte_policy: Callable[[int], Path], state_dir: Path
) -> None:
    publish_policy(Registry(state_dir), byte_policy(1))
    with start_or_join(state_dir) as redis:
        before = start_server(state_dir, redis.url, "--policy", "1")
        until(lambda: (state_dir / "api-keys.json").exists())  # it knows that it needs no keys
        before.process.terminate()
        before.process.wait(60)
    server = start_server(state_dir, f"unix://{state_dir}/gone.sock")
    try:
        body = {"model": "policy", "prompt": "hello", "max_tokens": 4}

        def served() -> bool:
            with contextlib.suppress(httpx2.TransportError):
                answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=20)
                return answer.status_code == 200 and answer.headers["x-policy-version"] == "1"
            return False

        until(served)
        ready = httpx2.get(f"{server.url}/ready", timeout=20)
        assert ready.status_code == 503 and ready.json()["error"]["type"] == "overloaded_error"
    finally:
        server.process.terminate()
        server.process.wait(60)
