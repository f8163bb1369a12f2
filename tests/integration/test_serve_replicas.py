"""Two servers on one Redis follow every change of the release; either may go, with or without warning."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
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

STREAMS = 32


@pytest.fixture(scope="module")
def replicas(byte_policy: Callable[[int], Path]) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Two servers over one state directory, serving version 1; version 2 is published."""
    state = Path(tempfile.mkdtemp(prefix="il-"))
    registry = Registry(state)
    for seed in (1, 2):
        publish_policy(registry, byte_policy(seed))
    with start_or_join(state) as redis:
        first = start_server(state, redis.url, "--policy", "1", INSTRUCTLOOP_SERVE__MAX_PENDING_COMPLETIONS="128")
        try:
            first.wait_ready()
            second = start_server(state, redis.url)
            try:
                second.wait_ready()
                yield first, second
            finally:
                end(second)
        finally:
            end(first)
    shutil.rmtree(state)


def end(server: RunningServer) -> None:
    server.process.terminate()
    server.process.wait(60)


def version_served(server: RunningServer) -> str:
    body = {"model": "policy", "prompt": "x", "max_tokens": 1}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-policy-version"]


def stream(server: RunningServer) -> str:
    """One long stream, whole."""
    body = {"model": "policy", "prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    return httpx2.post(f"{server.url}/v1/completions", json=body, timeout=120).text


def converged(server: RunningServer) -> dict[str, int]:
    """The generation each server reports, by its address."""
    told = json.loads(server.operate("status", "--json").stdout)
    return {replica["replica"]: replica["generation"] for replica in told["replicas"]}


def test_both_follow_a_canary_a_promotion_and_a_rollback(replicas: tuple[RunningServer, RunningServer]) -> None:
    first, second = replicas
    assert first.operate("canary", "2", "--fraction", "0.5", "--override", "a test").returncode == 0
    for server in replicas:
        server.wait_ready()
    # The same user is on the same arm wherever the balancer sends the request.
    for user in range(8):
        body = {"model": "policy", "prompt": "x", "max_tokens": 1, "user": f"user-{user}"}
        answers = [httpx2.post(f"{server.url}/v1/completions", json=body, timeout=30) for server in replicas]
        assert len({answer.headers["x-policy-version"] for answer in answers}) == 1
    for verb, version in (("promote", "2"), ("rollback", "1")):
        began = time.monotonic()
        assert first.operate(verb, *(["--override", "a test"] if verb == "promote" else [])).returncode == 0
        while {version_served(server) for server in replicas} != {version}:
            assert time.monotonic() - began < 10
    generations = converged(second)
    assert len(generations) == 2 and len(set(generations.values())) == 1


def test_feedback_on_a_completion_may_go_to_the_other_server(replicas: tuple[RunningServer, RunningServer]) -> None:
    first, second = replicas
    body = {"model": "policy", "prompt": "hello", "n": 2, "max_tokens": 4}
    made = httpx2.post(f"{first.url}/v1/completions", json=body, timeout=30).json()
    comparison = {"completion_id": made["id"], "preferred": 0}
    deadline = time.monotonic() + 5
    while (kept := httpx2.post(f"{second.url}/v1/feedback/comparisons", json=comparison)).status_code == 404:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert kept.status_code == 201


def test_one_ends_with_all_its_streams_whole_and_the_other_goes_on(
    replicas: tuple[RunningServer, RunningServer],
) -> None:
    first, second = replicas
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, second) for _ in range(STREAMS)]
        until(lambda: metric(second, "vllm:num_requests_running") >= STREAMS, 20)
        second.process.send_signal(signal.SIGTERM)
        texts = [ended.result() for ended in streams]
    assert all(text.rstrip().endswith("[DONE]") and text.count('"finish_reason":"length"') == 1 for text in texts)
    assert second.process.wait(60) == 0
    with contextlib.suppress(httpx2.TransportError):
        httpx2.get(f"{second.url}/health", timeout=5)
        pytest.fail("a server that has ended still answers")
    assert version_served(first) == "1"


def test_one_is_killed_and_a_change_still_completes(replicas: tuple[RunningServer, RunningServer]) -> None:
    first, _ = replicas
    again = start_server(first.state, first.redis_url)
    again.wait_ready()
    again.process.kill()
    again.process.wait()
    assert first.operate("canary", "2", "--fraction", "0.5", "--override", "a test").returncode == 0
    first.wait_ready()
    assert first.operate("rollback").returncode == 0
    first.wait_ready()
    assert version_served(first) == "1"
    deadline = time.monotonic() + 30  # what is gone is no longer waited for
    while len(converged(first)) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_full_queue_answers_429_at_once_and_what_was_admitted_completes(
    replicas: tuple[RunningServer, RunningServer],
) -> None:
    first, _ = replicas

    def ask(_: int) -> httpx2.Response:
        body = {"model": "policy", "prompt": "hello", "max_tokens": 200, "n": 4, "ignore_eos": True}
        return httpx2.post(f"{first.url}/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(64) as threads:  # 256 completions, of which the queue takes 128
        answers = list(threads.map(ask, range(64)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= 31, "32, or one less where the server's own probe has a place"
    for answer in refused:
        assert answer.json()["error"]["type"] == "rate_limit_error" and int(answer.headers["Retry-After"]) <= 60
    assert max(answer.elapsed for answer in refused) < min(a.elapsed for a in answers if a.status_code == 200)
    assert ask(0).status_code == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_sampling(replicas: tuple[RunningServer, RunningServer], streamed: bool) -> None:
    first, _ = replicas
    body = {"model": "policy", "prompt": ["hello"] * 8, "max_tokens": 240, "n": 16, "ignore_eos": True}
    before = metric(first, "vllm:generation_tokens_total")
    with contextlib.suppress(httpx2.ReadTimeout):
        asked = body | {"stream": streamed}
        with httpx2.stream("POST", f"{first.url}/v1/completions", json=asked, timeout=0.5) as answer:
            next(answer.iter_lines())
    time.sleep(1.0)
    left = metric(first, "vllm:generation_tokens_total")
    time.sleep(0.5)
    later = metric(first, "vllm:generation_tokens_total")
    assert later - left < 20  # only the supervisor's own
    assert left - before < 8 * 16 * 240  # it had not simply finished


def test_principals_share_no_prefix_cache_and_keep_their_token_rate(
    replicas: tuple[RunningServer, RunningServer],
) -> None:
    first, _ = replicas
    made = {name: make_key(first, name) for name in ("ann@x.org", "bob")}  # last in this file: keys close the server
    until(lambda: complete(first, None).status_code == 401, 10)
    while 60 - time.time() % 60 < 20:  # all in one minute
        time.sleep(1)
    cached: dict[str, list[int]] = {}
    for name in ("ann@x.org", "ann@x.org", "bob"):
        answer = complete(first, made[name])
        assert answer.status_code == 200, answer.text
        cached.setdefault(name, []).append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached["ann@x.org"][0] == 0 and cached["ann@x.org"][1] > 0
    assert cached["bob"] == [0]
    refused = complete(first, made["ann@x.org"])  # 2 x 210 of 400 tokens are spent
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert complete(first, made["bob"]).status_code == 200


def make_key(server: RunningServer, principal: str) -> str:
    """A key of 400 tokens a minute."""
    arguments = ["--principal", principal, "--scopes", "completions", "--tokens-per-minute", "400", "--json"]
    made = subprocess.run(
        [sys.executable, "-m", "feedback", "keys", "create", *arguments],
        env=server.environment,
        capture_output=True,
        check=True,
        timeout=60,
    )
    key: str = json.loads(made.stdout)["key"]
    return key


def complete(server: RunningServer, key: str | None) -> httpx2.Response:
    """A completion of a prompt of 200 tokens."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": "policy", "prompt": "x" * 200, "max_tokens": 10, "ignore_eos": True}
    return httpx2.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30)


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.02)


def metric(server: RunningServer, name: str) -> float:
    """Sum of a metric over its labels."""
    page = httpx2.get(f"{server.url}/metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name + "{"))
