"""Ratings, idempotency, and the operators' routes over a real store; no engine."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from any_key import AnyKey
from fastapi import FastAPI, Request
from redis.asyncio import Redis
from starlette.middleware import Middleware
from stored_completions_app import kept, kept_text

from feedback import keys
from feedback.archive import archive
from feedback.log_files import read_log
from feedback.principals import ApiKey, Scope
from feedback.records import Comparison, Erasure, Rating, RatingFlag, name_digest
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import CompletionsPrincipal, FeedbackPrincipal, OperatorPrincipal
from serve.error_response import add_error_handlers
from serve.metrics import Metrics
from serve.middleware import RequestObserver
from serve.openapi import describe
from serve.recording import Recorder
from serve.settings import ServeSettings

# serve.services names the fleet, and so imports vLLM, which imports what torch deprecates: inside a test, where this
# one warning can be let through.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

MakeComparison = Callable[..., Comparison]
COMPARISONS, RATINGS = "/v1/feedback/comparisons", "/v1/feedback/ratings"
DEMONSTRATIONS, SUMMARY = "/v1/feedback/demonstrations", "/v1/feedback/summary"
OUTSIDE: dict[str, Any] = {"prompt": "hi", "completions": ["a", "b"], "preferred": 0}


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings())
    yield store
    await store.close()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def app(store: FeedbackStore, tmp_path: Path) -> FastAPI:
    """An app of these routes, where the API key is the principal's name, and root is the operator."""
    from serve import comparison_list, comparisons, erasure, ratings, summary
    from serve.services import Services

    settings, metrics = ServeSettings(), Metrics()
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Services))
    parts |= {"settings": settings, "store": store, "recorder": Recorder(store, settings, metrics), "metrics": metrics}
    parts["access"] = AnyKey()
    app = FastAPI(middleware=[Middleware(RequestObserver, metrics=metrics)])
    app.state.services = Services(**parts)
    app.state.archive = tmp_path / "archive"
    add_error_handlers(app)
    for routes in (comparisons, ratings, comparison_list, summary, erasure):
        app.include_router(routes.router)

    def named_by_key(request: Request) -> str:
        name = request.headers["authorization"].removeprefix("Bearer ")
        scopes = frozenset(Scope) if name == "root" else frozenset({Scope.COMPLETIONS, Scope.FEEDBACK})
        request.scope["instructloop.key"] = ApiKey(sha256="0" * 64, principal=name, scopes=scopes, created=1)
        return name

    for principal in (CompletionsPrincipal, FeedbackPrincipal, OperatorPrincipal):
        app.dependency_overrides[get_args(principal)[1].dependency] = named_by_key
    return app


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://il", timeout=30) as client:
        client.headers["authorization"] = "Bearer alice"
        yield client


ROOT = {"authorization": "Bearer root"}


async def rate(http: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await http.post(RATINGS, json={"completion_id": "chatcmpl-1", "index": 0} | body)


async def test_a_rating_is_kept_with_what_was_rated(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1")])
    flags = {"hallucination": True, "violent_content": False, "harmful_advice": None}
    answer = await rate(http, overall=5, flags=flags, comment="made up", labeler="L-3")
    assert answer.status_code == 201
    told = answer.json()
    assert (told.pop("id")[:4], told.pop("created") > 0) == ("rat_", True)
    assert told == {
        "object": "feedback.rating",
        "completion_id": "chatcmpl-1",
        "index": 0,
        "policy_version": 1,
        "overall": 5,
        "thumb": None,
        "flags": {"hallucination": True, "violent_content": False},
        "labeler": "L-3",
    }
    record = await store.record(answer.json()["id"])
    assert isinstance(record, Rating)
    assert (record.candidate.text, record.comment, record.principal) == ("text of chatcmpl-1", "made up", "alice")
    assert record.prompt == kept("chatcmpl-1").prompts[0]


async def test_a_thumb_of_one_choice_of_a_text_completion(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept_text("cmpl-1")])
    answer = await rate(http, completion_id="cmpl-1", index=2, thumb="down")
    assert (answer.status_code, answer.json()["thumb"], answer.json()["overall"]) == (201, "down", None)
    record = await store.record(answer.json()["id"])
    assert isinstance(record, Rating)
    assert (record.prompt.text, record.candidate.index, record.labeler) == ("two", 2, "alice")


async def test_a_later_rating_of_a_choice_counts_and_the_first_stays_in_the_log(
    store: FeedbackStore, http: httpx2.AsyncClient
) -> None:
    await store.keep([kept("chatcmpl-1")])
    for overall in (2, 6):
        assert (await rate(http, overall=overall)).status_code == 201
    assert (await rate(http, overall=1, labeler="L-2")).status_code == 201
    records = [entry.record async for entry in store.scan()]
    ratings = [record for record in records if isinstance(record, Rating)]
    assert [rating.overall for rating in ratings] == [2, 6, 1]
    assert await store.in_force(ratings) == [False, True, True]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"overall": 0}, "overall"),
        ({"overall": 8}, "overall"),
        ({"overall": "5"}, "overall"),
        ({"overall": True}, "overall"),
        ({"overall": 2.5}, "overall"),
        ({"overall": 3, "thumb": "up"}, None),
        ({"thumb": "sideways"}, "thumb"),
        ({"thumb": "up", "flags": {"hallucination": True}}, None),
        ({"overall": 3, "flags": {"boring": True}}, "flags.boring"),
        ({"overall": 3, "flags": {"hallucination": "yes"}}, "flags.hallucination"),
        ({"overall": 3, "stars": 5}, "stars"),
        ({"overall": 3, "index": -1}, "index"),
        ({"overall": 3, "index": 1}, "index"),
        ({"overall": 3, "labeler": ""}, "labeler"),
        ({"overall": 3, "comment": "x" * 4001}, "comment"),
    ],
)
async def test_a_malformed_rating_is_refused_with_its_field(
    store: FeedbackStore, http: httpx2.AsyncClient, body: dict[str, Any], param: str | None
) -> None:
    await store.keep([kept("chatcmpl-1")])
    answer = await rate(http, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert await store.head() == "0-0"


async def test_every_flag_of_the_paper_can_be_given(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1")])
    flags = dict.fromkeys(get_args(RatingFlag), True)
    assert len(flags) == 11
    assert (await rate(http, overall=1, flags=flags)).json()["flags"] == flags


async def test_others_completions_and_none_are_rated_alike(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1", principal="bob")])
    others, none = await rate(http, overall=1), await rate(http, overall=1, completion_id="chatcmpl-none")
    assert (others.status_code, others.json()) == (none.status_code, none.json())
    assert others.status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "other"),
    [
        (RATINGS, {"completion_id": "chatcmpl-1", "overall": 3}, {"completion_id": "chatcmpl-1", "overall": 4}),
        (DEMONSTRATIONS, {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "d"}),
        (COMPARISONS, OUTSIDE, OUTSIDE | {"preferred": 1}),
    ],
)
async def test_idempotency(
    store: FeedbackStore, http: httpx2.AsyncClient, path: str, body: dict[str, Any], other: dict[str, Any]
) -> None:
    await store.keep([kept("chatcmpl-1"), kept("chatcmpl-1", principal="root")])
    keyed = {"idempotency-key": "k" * 255} | ROOT
    first = await http.post(path, json=body, headers=keyed)
    again = await http.post(path, json=body, headers=keyed)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    reused = await http.post(path, json=other, headers=keyed)
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    unkeyed = [await http.post(path, json=other, headers=ROOT) for _ in range(2)]
    assert [answer.status_code for answer in unkeyed] == [201, 200]
    for wrong in ("", "k" * 256):
        refused = await http.post(path, json=body, headers=ROOT | {"idempotency-key": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert len([entry async for entry in store.scan()]) == 2


async def test_one_key_never_serves_two_kinds_of_record(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    keyed = {"idempotency-key": "k"} | ROOT
    assert (await http.post(COMPARISONS, json=OUTSIDE, headers=keyed)).status_code == 201
    demonstration = {"prompt": "hi", "completion": "c"}
    assert (await http.post(DEMONSTRATIONS, json=demonstration, headers=keyed)).status_code == 422


@pytest.mark.parametrize("keyed", [{"idempotency-key": "k"}, {}])
async def test_while_the_first_is_in_flight_the_same_is_told_to_come_back(
    http: httpx2.AsyncClient, redis: Redis, keyed: dict[str, str]
) -> None:
    await redis.client_pause(400, all=False)
    headers = keyed | ROOT
    first = asyncio.create_task(http.post(COMPARISONS, json=OUTSIDE, headers=headers))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    second = await http.post(COMPARISONS, json=OUTSIDE, headers=headers)
    assert time.monotonic() - began < 0.2
    assert (second.status_code, second.headers["retry-after"]) == (409, "1")
    assert second.json()["error"]["type"] == "invalid_request_error"
    unlike = asyncio.create_task(http.post(COMPARISONS, json=OUTSIDE | {"preferred": 1}, headers=ROOT))
    other = asyncio.create_task(http.post(COMPARISONS, json=OUTSIDE, headers=keyed | {"authorization": "Bearer al"}))
    assert (await first).status_code == 201
    assert (await unlike).status_code == 201
    assert (await other).status_code == 403
    third = await http.post(COMPARISONS, json=OUTSIDE, headers=headers)
    assert (third.status_code, third.json()) == (200, (await first).json())


async def test_20_keys_15_times_over_at_once_are_20_records(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    ids: dict[int, set[str]] = {number: set() for number in range(20)}

    async def insist(number: int) -> None:
        body, headers = OUTSIDE | {"labeler": f"L-{number}"}, ROOT | {"idempotency-key": f"key {number}"}
        while (answer := await http.post(COMPARISONS, json=body, headers=headers)).status_code in (409, 503):
            await asyncio.sleep(0.05)
        assert answer.status_code in (200, 201), answer.text
        ids[number].add(answer.json()["id"])

    async with asyncio.TaskGroup() as group:
        for number in [*ids] * 15:
            group.create_task(insist(number))
    assert all(len(found) == 1 for found in ids.values())
    assert len([entry async for entry in store.scan()]) == 20


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
    store: FeedbackStore, http: httpx2.AsyncClient, make_comparison: MakeComparison
) -> None:
    for start in range(0, 2000, 200):
        await asyncio.gather(
            *(
                store.append(make_comparison(labeler=f"L-{n}", comment="x" * 1000, source="task", task_id=f"t{n}"))
                for n in range(start, start + 200)
            )
        )
    longest, ended = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not ended.is_set():
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)

    gc.collect()
    gc.freeze()  # as the server does: a full pass over what vLLM's imports made takes half a second
    watching = asyncio.create_task(watch())
    assert (await http.get(SUMMARY, headers=ROOT)).json()["comparisons"] == 2000
    ended.set()
    await watching
    gc.unfreeze()
    assert longest < 0.3


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
