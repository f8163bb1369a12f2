"""What operators see and do of all the feedback: the list, the summary, erasure; no engine."""

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from feedback_routes import COMPARISONS, DEMONSTRATIONS, RATINGS, ROOT, SUMMARY, UNDEPRECATED, rate
from redis.asyncio import Redis
from stored_completions_app import kept

from feedback import keys
from feedback.archive import archive
from feedback.log_files import read_log
from feedback.records import Comparison, Erasure, name_digest
from feedback.store import FeedbackStore
from serve.openapi import describe
from serve.settings import ServeSettings

pytest_plugins = ["feedback_fixtures"]
pytestmark = UNDEPRECATED

MakeComparison = Callable[..., Comparison]


async def listed(http: httpx2.AsyncClient, **query: Any) -> dict[str, Any]:
    answer = await http.get(COMPARISONS, params=query, headers=ROOT)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def fill(store: FeedbackStore, make_comparison: MakeComparison, count: int = 25) -> list[str]:
    ids = []
    for number in range(count):
        first, second = make_comparison().candidates
        candidates = (first.model_copy(update={"policy_version": number % 3}), second)
        record = make_comparison(labeler=f"L-{number % 2}", candidates=candidates, comment=f"{number}")
        ids.append((await store.append(record)).record.id)
    return ids


async def test_the_list_goes_on_behind_its_last_id(
    store: FeedbackStore, http: httpx2.AsyncClient, make_comparison: MakeComparison
) -> None:
    ids = await fill(store, make_comparison)
    await store.append(Erasure(id="era_1", created=1, principal="root", erased=name_digest("nobody")))
    page = await listed(http)
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", True, ids[0], ids[19])
    rest = await listed(http, after=page["last_id"])
    assert [one["id"] for one in page["data"] + rest["data"]] == ids
    assert not rest["has_more"]
    assert rest["data"][0] == (await http.get(f"{COMPARISONS}/{ids[20]}", headers={})).json()
    assert (await listed(http, limit=25))["has_more"] is False
    assert await listed(http, after=ids[-1]) == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


async def test_the_list_is_filtered_by_labeler_and_version(
    store: FeedbackStore, http: httpx2.AsyncClient, make_comparison: MakeComparison
) -> None:
    ids = await fill(store, make_comparison)
    # What only reads like a match is none.
    await store.append(make_comparison(metadata={"labeler": "L-1", "kind": "comparison"}, labeler="L-9"))
    assert [one["id"] for one in (await listed(http, labeler="L-1", limit=100))["data"]] == ids[1::2]
    assert [one["id"] for one in (await listed(http, policy_version=2, limit=100))["data"]] == ids[2::3]
    both = await listed(http, labeler="L-1", policy_version=2, limit=2)
    assert [one["id"] for one in both["data"]] == [ids[5], ids[11]]
    assert both["has_more"]
    assert (await listed(http, labeler="nobody"))["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"after": "cmp_none"}, "after"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"policy_version": "x"}, "policy_version"),
        ({"labeler": "x" * 129}, "labeler"),
    ],
)
async def test_a_wrong_list_query_is_refused(http: httpx2.AsyncClient, query: dict[str, Any], param: str) -> None:
    answer = await http.get(COMPARISONS, params=query, headers=ROOT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_the_summary_follows_the_log_and_is_kept_for_a_moment(
    app: FastAPI,
    store: FeedbackStore,
    http: httpx2.AsyncClient,
    make_comparison: MakeComparison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve import summary

    ids = await fill(store, make_comparison)
    told = (await http.get(SUMMARY, headers=ROOT)).json()
    assert (told["object"], told["comparisons"], told["labelers_total"]) == ("feedback.summary", 25, 2)
    assert sum(day["comparisons"] for day in told["days"]) == 25
    await store.append(make_comparison(labeler="L-new"))
    assert (await http.get(SUMMARY, headers=ROOT)).json() == told
    app.state.feedback_summary._told_until = 0.0
    assert (await http.get(SUMMARY, headers=ROOT)).json()["comparisons"] == 26

    # What is erased is counted no more; while an erasure is unfinished nothing counted is relied on.
    monkeypatch.setattr(summary, "CACHE_SECONDS", 0.0)
    monkeypatch.setattr(summary, "REST", 0.0)
    app.state.feedback_summary._told_until = 0.0
    await store.begin_erasure(name_digest("alice"))
    await store.append(Erasure(id="era_1", created=1, principal="root", erased=name_digest("alice")))
    told = (await http.get(SUMMARY, headers=ROOT)).json()
    assert (told["comparisons"], told["erasures"]) == (26, 1)
    [batch] = [batch async for batch in store.raw_batches()]
    await store.remove([(entry, None) for entry in batch if entry.id in ids])
    assert (await http.get(SUMMARY, headers=ROOT)).json()["comparisons"] == 1
    await store.end_erasure(name_digest("alice"))
    assert (await http.get(SUMMARY, headers=ROOT)).json()["comparisons"] == 1


async def test_a_log_that_begins_again_is_counted_again(
    app: FastAPI, store: FeedbackStore, redis: Redis, http: httpx2.AsyncClient, make_comparison: MakeComparison
) -> None:
    await fill(store, make_comparison)
    await http.get(SUMMARY, headers=ROOT)
    await redis.flushall()
    app.state.feedback_summary._told_until = 0.0
    assert (await http.get(SUMMARY, headers=ROOT)).json()["comparisons"] == 0


async def test_the_event_loop_goes_on_while_a_summary_is_made(
    app: FastAPI, store: FeedbackStore, http: httpx2.AsyncClient, make_comparison: MakeComparison
) -> None:
    for start in range(0, 2000, 200):
        await asyncio.gather(
            *(
                store.append(make_comparison(labeler=f"L-{n}", comment="x" * 1000, source="task", task_id=f"t{n}"))
                for n in range(start, start + 200)
            )
        )

    async def longest_pause() -> float:
        longest, ended = 0.0, asyncio.Event()

        async def watch() -> None:
            nonlocal longest
            while not ended.is_set():
                began = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - began)

        watching = asyncio.create_task(watch())
        assert (await http.get(SUMMARY, headers=ROOT)).json()["comparisons"] == 2000
        ended.set()
        await watching
        del app.state.feedback_summary  # the next counts from the beginning
        return longest

    gc.collect()
    gc.freeze()  # as the server does: a full pass over what vLLM's imports made takes half a second
    pauses = [await longest_pause() for _ in range(3)]
    gc.unfreeze()
    assert min(pauses) < 0.3  # the others may be the machine's


async def test_erasing_over_http(
    app: FastAPI, store: FeedbackStore, redis: Redis, http: httpx2.AsyncClient, make_comparison: MakeComparison
) -> None:
    await store.keep([kept("chatcmpl-1"), kept("chatcmpl-2", principal="bob")])
    assert (await rate(http, overall=2, comment="canary")).status_code == 201
    await store.append(make_comparison(principal="bob"))
    await archive(store, app.state.archive)
    answer = await http.delete("/v1/feedback/principals/alice", headers=ROOT)
    told = answer.json()
    assert answer.status_code == 200, answer.text
    assert told.pop("id").startswith("era_")
    assert told == {
        "object": "feedback.erasure",
        "principal": "alice",
        "records": 1,
        "completions": 1,
        "tasks": 0,
        "archived": 1,
        "unreadable": 0,
    }
    assert (await rate(http, overall=2)).status_code == 404
    assert [entry.record.principal async for entry in store.scan()] == ["bob", "root"]
    assert [entry.id for entry in read_log(app.state.archive)] != []
    assert all(b"canary" not in entry.body for entry in read_log(app.state.archive))
    again = await http.delete("/v1/feedback/principals/alice", headers=ROOT)
    assert (again.status_code, again.json()["id"], again.json()["records"]) == (200, None, 0)


async def test_two_erasures_at_once_and_one_without_redis(http: httpx2.AsyncClient, redis: Redis) -> None:
    await redis.set(keys.ERASURE_LEASE, "another", ex=20)
    answer = await http.delete("/v1/feedback/principals/alice", headers=ROOT)
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    await redis.delete(keys.ERASURE_LEASE)
    await redis.client_pause(1500)
    answer = await http.delete("/v1/feedback/principals/alice", headers=ROOT)
    assert answer.status_code == 503
    assert "not finished" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    await asyncio.sleep(1.0)


async def test_the_document_tells_of_these_routes(app: FastAPI) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.add_api_route(path, lambda: None, methods=["POST"])  # the document completes these two
    paths = describe(app, ServeSettings())["paths"]
    for path in (COMPARISONS, RATINGS, DEMONSTRATIONS):
        told = paths[path]["post"]["responses"]
        assert {"200", "201", "400", "401", "403", "404", "409", "413", "422", "429", "500", "503"} <= told.keys()
        assert told["409"]["headers"].keys() >= {"Retry-After", "x-request-id"}
    assert "409" in paths["/v1/feedback/principals/{principal_name}"]["delete"]["responses"]
    for path, method in (
        (COMPARISONS, "get"),
        (SUMMARY, "get"),
        ("/v1/feedback/principals/{principal_name}", "delete"),
    ):
        assert paths[path][method]["security"] == [{"api_key": ["operator"]}]
