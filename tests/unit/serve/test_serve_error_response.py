"""vLLM's errors come out in our shape, whatever they look like."""

import json

import pytest

from serve.error_response import error_response, translate_engine_error, translate_stream_error

SHAPE = {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}}',
        b'{"error": {"message": "too long", "param": "prompt"}}',
        b'{"error": "too long"}',
        b'["too long"]',
        b"too long",
        b"",
    ],
)
def test_an_engines_answer_becomes_the_one_shape(body: bytes) -> None:
    answer = translate_engine_error(400, body)
    error = json.loads(bytes(answer.body))["error"]
    assert set(error) == SHAPE
    assert error["type"] == "invalid_request_error" and error["code"] is None and error["message"]


def test_a_full_queue_is_a_rate_to_the_client() -> None:
    answer = translate_engine_error(503, b'{"error": {"message": "queue full", "code": 503}}')
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 60
    assert json.loads(bytes(answer.body))["error"]["type"] == "rate_limit_error"


def test_an_error_in_mid_stream_becomes_the_one_shape() -> None:
    event = translate_stream_error(b'data: {"error": {"message": "gone", "type": "X", "code": 500}}\n\n')
    assert event.endswith(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "error": {"message": "gone", "type": "server_error", "param": None, "code": None}
    }


@pytest.mark.parametrize("event", [b"data: [DONE]\n\n", b'data: {"id": "x", "error": null}\n\n', b""])
def test_other_events_pass_unchanged(event: bytes) -> None:
    assert translate_stream_error(event) == event


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
