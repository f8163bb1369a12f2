"""What is recorded of a completion is what was sampled, whether its client asked for log-probs or not."""

import asyncio
import time
from typing import Any

import httpx2
import pytest
from running_server import RunningServer

from feedback.records import StoredCompletion
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

pytestmark = pytest.mark.engine

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two of each": {"n": 2},
    "greedy": {"temperature": 0},
    "cool": {"temperature": 0.5},
    "top_p": {"top_p": 0.6},
    "ended by a stop string": {"stop": list("abcdefghijklm")},
    "ended by a token": {"stop_token_ids": list(range(2, 80))},
    "streamed": {"stream": True},
    "two streams": {"stream": True, "n": 2},
    "penalised": {"frequency_penalty": 1.5},
    "with the prompt's": {"prompt_logprobs": 1},
}


def recorded(server: RunningServer, completion_id: str) -> StoredCompletion:
    async def look() -> StoredCompletion | None:
        store = FeedbackStore.connect(server.redis_url, FeedbackSettings())
        try:
            return await store.completion(completion_id)
        finally:
            await store.close()

    deadline = time.monotonic() + 5
    while (completion := asyncio.run(look())) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return completion


def complete(server: RunningServer, body: dict[str, Any]) -> str:
    """A completion's id."""
    asked = {"model": "policy", "prompt": ["hello", "frog"], "max_tokens": 12, "seed": 5} | body
    answer = httpx2.post(f"{server.url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    completion_id: str = answer.text.partition('"id":"')[2].partition('"')[0]
    return completion_id


@pytest.mark.parametrize("way", WAYS)
def test_log_probs_nobody_asked_for_are_those_that_somebody_gets(server: RunningServer, way: str) -> None:
    silent = recorded(server, complete(server, WAYS[way]))
    asked = recorded(server, complete(server, WAYS[way] | {"logprobs": 3}))
    assert len(silent.choices) == 2 * WAYS[way].get("n", 1)
    for one, other in zip(silent.choices, asked.choices, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert len(one.logprobs) == len(one.token_ids) > 0
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_was_not_to_be_stored_is_not(server: RunningServer) -> None:
    completion_id = complete(server, {"store": False})
    time.sleep(0.5)
    with pytest.raises(AssertionError):
        recorded(server, completion_id)
