"""Feedback over HTTP: from a completion to a record in the log, and everything that may be wrong with it."""

import asyncio
from typing import Any

import httpx2
import pytest
from running_server import RunningServer

from feedback.records import Comparison, Demonstration, LogRecord, StoredCompletion
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

pytestmark = pytest.mark.engine


def complete(server: RunningServer, text: str = "hello", **more: Any) -> dict[str, Any]:
    body = {"model": "policy", "messages": [{"role": "user", "content": text}], "n": 4, "max_tokens": 6} | more
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    completion: dict[str, Any] = answer.json()
    return completion


def compare(server: RunningServer, headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/feedback/comparisons", json=body, headers=headers)


async def record_of(server: RunningServer, record_id: str) -> LogRecord:
    store = FeedbackStore.connect(server.redis_url, FeedbackSettings())
    try:
        record = await store.record(record_id)
    finally:
        await store.close()
    assert record is not None
    return record


async def stored(server: RunningServer, completion_id: str) -> StoredCompletion | None:
    store = FeedbackStore.connect(server.redis_url, FeedbackSettings())
    try:
        return await store.completion(completion_id)
    finally:
        await store.close()


async def test_a_ranking_of_one_completions_choices(server: RunningServer) -> None:
    completion = complete(server)
    answer = compare(server, completion_id=completion["id"], ranking=[[1], [0, 2], [3]], labeler="L-1")
    assert answer.status_code == 201
    shown = answer.json()
    assert (shown["object"], shown["pairs"], shown["labeler"]) == ("feedback.comparison", 5, "L-1")
    assert [candidate["policy_version"] for candidate in shown["candidates"]] == [1, 1, 1, 1]
    assert httpx2.get(f"{server.url}/v1/feedback/comparisons/{shown['id']}").json() == shown
    record = await record_of(server, shown["id"])
    assert isinstance(record, Comparison)
    assert [c.text for c in record.candidates] == [c["message"]["content"] for c in completion["choices"]]
    assert record.prompt.token_ids is not None and record.prompt.tokenizer is not None
    assert set(record.pairs()) == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}


async def test_what_is_recorded_is_what_was_sampled(server: RunningServer) -> None:
    completion = complete(server, logprobs=True, metadata={"task": "greeting"}, user="ann")
    async with asyncio.timeout(5):
        while (kept := await stored(server, completion["id"])) is None:  # it is recorded with others, a moment later
            await asyncio.sleep(0.01)
    assert (kept.policy_version, kept.user, kept.metadata) == (1, "ann", {"task": "greeting"})
    for choice, told in zip(kept.choices, completion["choices"], strict=True):
        assert choice.text == told["message"]["content"]
        assert choice.finish_reason == told["finish_reason"]
        told_logprobs = [token["logprob"] for token in told["logprobs"]["content"]]
        assert choice.logprobs == pytest.approx(told_logprobs, abs=1e-6)


async def test_store_false_keeps_nothing(server: RunningServer) -> None:
    completion = complete(server, store=False)
    assert compare(server, completion_id=completion["id"], ranking=[[0], [1], [2], [3]]).status_code == 404
    assert await stored(server, completion["id"]) is None


def test_candidates_of_several_completions_of_one_prompt(server: RunningServer) -> None:
    first, second, other = complete(server), complete(server), complete(server, "goodbye")
    candidates = [{"completion_id": first["id"], "index": 2}, {"completion_id": second["id"], "index": 0}]
    assert compare(server, candidates=candidates, preferred=1).json()["ranking"] == [[1], [0]]
    strange = [candidates[0], {"completion_id": other["id"], "index": 0}]
    answer = compare(server, candidates=strange, preferred=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "candidates")


def test_both_bad_is_a_tie(server: RunningServer) -> None:
    answer = compare(server, prompt="say hi", completions=["go away", "no"], preferred="both_bad")
    assert (answer.status_code, answer.json()["pairs"], answer.json()["ranking"]) == (201, 0, [[0, 1]])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"ranking": [[0], [1], [2]]}, "ranking"),
        ({"ranking": [[0], [1], [2], [3, 3]]}, "ranking"),
        ({"ranking": [[0], [1], [2], [4]]}, "ranking"),
        ({"ranking": [[0], [1], [2], [-1]]}, "ranking"),
        ({"ranking": [[], [0, 1, 2, 3]]}, "ranking"),
        ({"ranking": "0123"}, "ranking"),
        ({"preferred": 0}, "preferred"),
        ({}, None),
        ({"ranking": [[0, 1, 2, 3]], "preferred": 0}, None),
        ({"ranking": [[0, 1, 2, 3]], "winner": 0}, "winner"),
    ],
)
def test_malformed_rankings_are_refused(server: RunningServer, body: dict[str, Any], param: str | None) -> None:
    completion = complete(server, max_tokens=1)
    answer = compare(server, completion_id=completion["id"], **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param


def test_an_unknown_completion_is_not_found(server: RunningServer) -> None:
    answer = compare(server, completion_id="chatcmpl-none", ranking=[[0], [1]])
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_the_same_request_again_answers_with_the_first(server: RunningServer) -> None:
    body = {"completion_id": complete(server)["id"], "ranking": [[0], [1], [2], [3]]}
    first, again = compare(server, **body), compare(server, **body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json() == first.json()


def test_an_idempotency_key_is_for_one_body(server: RunningServer) -> None:
    completion_id, key = complete(server)["id"], {"Idempotency-Key": f"key-{complete(server)['id']}"}
    first = compare(server, key, completion_id=completion_id, ranking=[[0], [1], [2], [3]])
    again = compare(server, key, completion_id=completion_id, ranking=[[0], [1], [2], [3]])
    other = compare(server, key, completion_id=completion_id, ranking=[[3], [1], [2], [0]])
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 422)
    assert other.json()["error"]["code"] == "idempotency_key_reuse"


def test_an_idempotency_key_has_at_most_255_characters(server: RunningServer) -> None:
    body = {"prompt": "hi", "completions": ["a", "b"], "preferred": 0}
    assert compare(server, {"Idempotency-Key": "k" * 255}, **body).status_code == 201
    refused = compare(server, {"Idempotency-Key": "k" * 256}, **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_demonstrations_and_corrections(server: RunningServer) -> None:
    url = f"{server.url}/v1/feedback/demonstrations"
    free = httpx2.post(url, json={"prompt": "say hi", "completion": "hi", "labeler": "L-2"})
    assert (free.status_code, free.json()["labeler"]) == (201, "L-2")
    completion = complete(server)
    corrected = httpx2.post(url, json={"completion_id": completion["id"], "index": 2, "completion": "hi"})
    record = await record_of(server, corrected.json()["id"])
    assert isinstance(record, Demonstration) and record.corrects is not None
    assert record.corrects.text == completion["choices"][2]["message"]["content"]
    assert httpx2.post(url, json={"completion": "hi"}).status_code == 400
    missing = httpx2.post(url, json={"completion_id": completion["id"], "index": 9, "completion": "hi"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "index")


def test_a_blind_task_shows_no_version_until_it_is_judged(server: RunningServer) -> None:
    asked = {"k": 3, "messages": [{"role": "user", "content": "hello"}], "labeler": "L-3"}
    task = httpx2.post(f"{server.url}/v1/feedback/tasks", json=asked, timeout=60).json()
    assert [set(candidate) for candidate in task["candidates"]] == [{"index", "text"}] * 3
    assert "policy" not in str(task)
    foreign = compare(server, task_id=task["id"], ranking=[[0], [1], [2]], labeler="L-4")
    assert foreign.status_code == 400
    judged = compare(server, task_id=task["id"], ranking=[[2], [0], [1]], labeler="L-3")
    assert judged.status_code == 201
    assert [candidate["policy_version"] for candidate in judged.json()["candidates"]] == [1, 1, 1]


def test_a_task_without_a_prompt_takes_one_from_the_pool(server: RunningServer) -> None:
    compare(server, completion_id=complete(server)["id"], ranking=[[0, 1, 2, 3]])
    task = httpx2.post(f"{server.url}/v1/feedback/tasks", json={"k": 2}, timeout=60)
    assert task.status_code == 201
    assert ("prompt" in task.json()) != ("messages" in task.json())
