"""Request ids and the body limit, on a bare ASGI app."""

from collections.abc import AsyncIterator

import pytest
from httpx2 import ASGITransport, AsyncClient
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve.metrics import Metrics
from serve.middleware import BodyLimit, RequestObserver


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
