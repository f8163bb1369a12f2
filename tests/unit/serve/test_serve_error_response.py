"""vLLM's errors come out in our shape, whatever they look like."""

import json
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from serve.error_response import add_error_handlers, error_response, stream_error
from serve.errors import EngineRefused


async def answered(error: Exception) -> httpx2.Response:
    """What a client sees when a route raises ``error``."""
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/")
    def fail() -> None:
        raise error

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        return await client.get("/")


async def test_what_the_engine_refuses_comes_in_the_one_shape() -> None:
    answer = await answered(EngineRefused(400, "too long", "prompt"))
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": None,
    }


async def test_a_full_queue_is_a_rate_to_the_client() -> None:
    answer = await answered(EngineRefused(503, "queue full"))
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 60
    assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("error", [{"message": "gone", "type": "X", "code": 500}, {"message": "gone"}])
def test_an_error_in_mid_stream_comes_in_the_one_shape(error: dict[str, Any]) -> None:
    event = stream_error(error)
    assert event.endswith(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "error": {"message": "gone", "type": "server_error", "param": None, "code": None}
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "overloaded_error"),
    ],
)
def test_the_type_follows_the_status(status: int, kind: str) -> None:
    answer = error_response(status, "why")
    assert json.loads(bytes(answer.body))["error"]["type"] == kind
    assert ("Retry-After" in answer.headers) == (status in (429, 503))
