"""One engine in memory: versions are exchanged in place, and what cannot be exchanged is never served."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from running_server import RunningServer, build_policy, publish_policy, start_server
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.registry import Registry
from deploy.versions import Draft, VersionKind
from feedback.embedded import start_or_join

pytestmark = pytest.mark.engine

PROMPTS = [word * 12 for word in ("hello", "what", "a", "frog", "xyz", "12 34", "....", "Q: why? ")]
SPOILED, WIDER, SWAPPED = 3, 4, 5
"""Versions that must not be served: infinite weights; another shape; another policy's weights under 1's canaries."""


@pytest.fixture(scope="module", params=["wait", "keep"])
def server(
    request: pytest.FixtureRequest, byte_policy: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with room for one engine, serving version 1; 2 is as good, 3 to 5 are not."""
    state = Path(tempfile.mkdtemp(prefix="il-"))  # short enough for a unix socket
    registry = Registry(state)
    for seed in (1, 2):
        publish_policy(registry, byte_policy(seed))
    canaries = registry.get(VersionKind.POLICY, 1).manifest.canary_prompts
    spoiled = build_policy(tmp_path_factory.mktemp("spoiled"), 2)
    weights = load_file(spoiled / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    wider = build_policy(tmp_path_factory.mktemp("wider"), 2)
    weights["model.norm.weight"] = torch.ones(65)
    save_file(weights, wider / "model.safetensors", metadata={"format": "pt"})
    for directory in (spoiled, wider, byte_policy(9)):
        registry.publish(Draft(kind=VersionKind.POLICY, canary_prompts=canaries), directory)
    with start_or_join(state) as redis:
        settings = {"INSTRUCTLOOP_SERVE__MAX_ENGINES": "1", "INSTRUCTLOOP_SERVE__SWAP": str(request.param)}
        running = start_server(state, redis.url, "--policy", "1", **settings)
        try:
            running.wait_ready()
            yield running
        finally:
            running.process.terminate()
            running.process.wait(60)
    shutil.rmtree(state)


def greedy(server: RunningServer, prompts: list[str]) -> tuple[str, list[list[int]]]:
    """The version that answers, and the tokens of its most likely completions."""
    body = {"model": "policy", "prompt": prompts, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == f"policy-v{answer.headers['x-policy-version']}"
    return answer.headers["x-policy-version"], [choice["token_ids"] for choice in answer.json()["choices"]]


def by_transformers(directory: Path) -> list[list[int]]:
    """The same by another implementation."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    completions = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        sampled = model.generate(ids, max_new_tokens=8, do_sample=False)
        completions.append(sampled[0, ids.shape[1] :].tolist())
    return completions


def release(server: RunningServer, version: int) -> None:
    """Make a version stable without asking anyone."""
    canary = server.operate("canary", str(version), "--fraction", "0.5", "--override", "a test")
    assert canary.returncode == 0, canary.stderr
    assert server.operate("promote", "--override", "a test").returncode == 0


def until_served(server: RunningServer, version: str) -> None:
    deadline = time.monotonic() + 20
    while greedy(server, ["x"])[0] != version:
        assert time.monotonic() < deadline, httpx2.get(f"{server.url}/ready", timeout=20).text
        time.sleep(0.02)


def test_an_exchanged_policy_answers_as_transformers_does(
    server: RunningServer, byte_policy: Callable[[int], Path]
) -> None:
    # The output layer is tied to the embeddings and packed apart (stale: 0 of 8 right), and the prompts are long
    # enough to be cached as prefixes (stale: computed by the old weights).
    assert greedy(server, PROMPTS) == ("1", by_transformers(byte_policy(1)))
    release(server, 2)
    until_served(server, "2")
    assert greedy(server, PROMPTS) == ("2", by_transformers(byte_policy(2)))
    assert server.operate("rollback").returncode == 0
    until_served(server, "1")
    assert greedy(server, PROMPTS) == ("1", by_transformers(byte_policy(1)))


def test_a_canary_takes_no_traffic_and_the_operator_is_told(server: RunningServer) -> None:
    assert server.operate("canary", "2", "--fraction", "0.5", "--override", "a test").returncode == 0
    server.wait_ready()
    assert {greedy(server, ["x"])[0] for _ in range(20)} == {"1"}
    assert "max_engines is 1" in server.operate("status").stdout
    assert server.operate("rollback").returncode == 0


@pytest.mark.parametrize(
    ("version", "why"), [(SPOILED, "not finite"), (WIDER, "names or shapes"), (SWAPPED, "canary prompt")]
)
def test_what_does_not_fit_is_never_served(server: RunningServer, version: int, why: str) -> None:
    before = greedy(server, PROMPTS)
    release(server, version)
    deadline = time.monotonic() + 20
    while why not in (told := httpx2.get(f"{server.url}/ready", timeout=20)).text:
        assert time.monotonic() < deadline, told.text
        time.sleep(0.1)
    assert told.status_code == 503
    assert greedy(server, PROMPTS) == before
    assert server.operate("rollback").returncode == 0
    server.wait_ready(20)
    assert greedy(server, PROMPTS) == before


def test_no_completion_fails_while_versions_change(server: RunningServer) -> None:
    failures: list[str] = []
    streams = 0
    over = threading.Event()

    def ask() -> None:
        nonlocal streams
        body = {"model": "policy", "prompt": "hello", "max_tokens": 32, "stream": True, "ignore_eos": True}
        with httpx2.Client(timeout=60) as client:
            while not over.is_set():
                answer = client.post(f"{server.url}/v1/completions", json=body)
                events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
                models = {event.partition('"model":"')[2].partition('"')[0] for event in events}
                whole = answer.text.rstrip().endswith("[DONE]")
                if not whole or models != {f"policy-v{answer.headers['x-policy-version']}"}:
                    failures.append(answer.text[:300])
                streams += 1

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for version in (2, 1, 2, 1):
        if version == 2:
            release(server, 2)
        else:
            assert server.operate("rollback").returncode == 0
        until_served(server, str(version))
    over.set()
    for thread in threads:
        thread.join()
    assert failures == [] and streams > 8
