"""Every route, asked wrongly, answers in the one error shape."""

from typing import Any

import httpx2
import pytest
from running_server import RunningServer

pytestmark = pytest.mark.engine

JSON = {"content-type": "application/json"}
WRONG: dict[str, dict[str, Any]] = {
    "an empty object": {"content": b"{}", "headers": JSON},
    "a list": {"content": b"[]", "headers": JSON},
    "not JSON": {"content": b"{", "headers": JSON},
    "nothing": {},
    "plain text": {"content": b"hello", "headers": {"content-type": "text/plain"}},
    "deep nesting": {"content": b"[" * 100_000, "headers": JSON},
    "half a surrogate pair": {"content": b'{"prompt": "\\ud800", "messages": ["\\ud800"]}', "headers": JSON},
    "half a surrogate pair in a message": {
        "content": b'{"messages": [{"role": "user", "content": "\\ud800"}], "completion": "\\ud800"}',
        "headers": JSON,
    },
    "not a number": {"content": b'{"temperature": NaN, "prompt": "x"}', "headers": JSON},
    "not unicode": {"content": b'{"prompt": "\xff"}', "headers": JSON},
}


def assert_shape(answer: httpx2.Response) -> None:
    assert answer.headers["x-request-id"]
    if answer.status_code >= 400:
        assert answer.status_code < 500, answer.text
        assert set(answer.json()) == {"error"}
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["code"] is None or isinstance(error["code"], str)


@pytest.mark.parametrize("how", WRONG)
def test_every_posting_route(server: RunningServer, how: str) -> None:
    routes = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    posting = [path for path, methods in routes.items() if "post" in methods]
    assert len(posting) >= 5
    for path in posting:
        assert_shape(httpx2.post(f"{server.url}{path}", timeout=60, **WRONG[how]))


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "OPTIONS", "PUT"])
def test_wrong_methods_and_paths(server: RunningServer, method: str) -> None:
    for path in ("/v1/chat/completions", "/v1/feedback/comparisons", "/ready"):
        answer = httpx2.request(method, f"{server.url}{path}")
        assert answer.status_code == 405
        assert_shape(answer)
    answer = httpx2.request(method, f"{server.url}/v1/no/such/route")
    assert answer.status_code == 404
    assert_shape(answer)
