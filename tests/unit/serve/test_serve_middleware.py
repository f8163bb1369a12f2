"""Request ids and the body limit, on a bare ASGI app."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from serve.metrics import Metrics
from serve.middleware import BodyLimit, FeedbackQueue, RequestObserver


async def echo_length(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


def client(limit: int = 10) -> tuple[AsyncClient, Metrics]:
    metrics = Metrics()
    app = RequestObserver(BodyLimit(echo_length, limit), metrics)
    return AsyncClient(transport=ASGITransport(app=app), base_url="http://test"), metrics


@pytest.mark.parametrize("given", ["abc", "a" * 128])
async def test_a_clients_request_id_is_echoed(given: str) -> None:
    http, _ = client()
    assert (await http.get("/", headers={"x-request-id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a\tb", "é"])
async def test_an_unfit_request_id_is_replaced(given: str) -> None:
    http, _ = client()
    made = (await http.get("/", headers=[(b"x-request-id", given.encode("latin-1"))])).headers["x-request-id"]
    assert made.startswith("req_") and len(made) == 36


async def test_two_requests_have_two_ids() -> None:
    http, _ = client()
    assert (await http.get("/")).headers["x-request-id"] != (await http.get("/")).headers["x-request-id"]


async def test_the_body_limit_holds_at_its_boundary() -> None:
    http, _ = client(limit=10)
    assert (await http.post("/", content=b"x" * 10)).text == "10"
    with pytest.raises(HTTPException):
        await http.post("/", content=b"x" * 11)


async def test_a_body_in_small_chunks_is_counted_too() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x"

    http, _ = client(limit=10)
    with pytest.raises(HTTPException):
        await http.post("/", content=chunks())


async def test_answers_are_counted() -> None:
    http, metrics = client()
    await http.get("/")
    assert b'instructloop_requests_total{policy_version="",route="unmatched",status="200"} 1.0' in metrics.page()


async def test_a_failure_nobody_expected_has_the_one_shape_an_id_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    app = FastAPI(middleware=[Middleware(RequestObserver, metrics=metrics)])

    @app.get("/")
    async def fail() -> None:
        raise RuntimeError("a secret of ours")

    transport = ASGITransport(app=app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.get("/", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert b'route="/",status="500"} 1.0' in metrics.page()


async def test_a_client_who_leaves_while_it_sends_is_no_failure_of_ours() -> None:
    metrics, sent = Metrics(), list[Message]()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await RequestObserver(echo_length, metrics)(scope, receive, send)
    assert sent == []
    assert b'route="unmatched",status="499"} 1.0' in metrics.page()


async def test_feedback_beyond_what_may_be_under_way_is_refused_before_it_is_read() -> None:
    go_on = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await echo_length(scope, receive, send)

    app = FeedbackQueue(slow, max_pending=2)
    async with AsyncClient(transport=ASGITransport(app=app), base_url="http://test") as http:
        waiting = [asyncio.create_task(http.post("/v1/feedback/comparisons", content=b"abc")) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await http.post("/v1/feedback/ratings", content=b"abc")
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        others = [asyncio.create_task(http.post("/v1/completions", content=b"abcd"))]
        others += [asyncio.create_task(http.get("/v1/feedback/summary"))]
        go_on.set()
        assert [(await answer).text for answer in [*waiting, *others]] == ["3", "3", "4", "0"]
        assert (await http.post("/v1/feedback/comparisons", content=b"ab")).text == "2"


async def test_bodies_that_come_slowly_keep_nobody_out() -> None:
    sent = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"a"
        await sent.wait()
        yield b"bc"

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        """As a server does: a part of a body is handed over when it has come."""
        parts = slowly() if scope["path"].endswith("slow") else None

        async def arriving() -> Message:
            if parts is None:
                return await receive()
            part = await anext(parts, None)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        await app(scope, arriving, send)

    app = FeedbackQueue(echo_length, max_pending=2)
    async with AsyncClient(transport=ASGITransport(app=streaming), base_url="http://test") as http:
        slow = [asyncio.create_task(http.post("/v1/feedback/slow")) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert (await http.post("/v1/feedback/ratings", content=b"abc")).text == "3"
        sent.set()
        assert [(await answer).text for answer in slow] == ["3", "3"]
