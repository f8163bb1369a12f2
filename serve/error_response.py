"""The one error shape: ``{"error": {"message", "type", "param", "code"}}``, as OpenAI's clients expect it.

Every error leaves the server through this file: our own exceptions, the framework's, vLLM's answers and
its mid-stream errors. Messages never echo the offending value.
"""

import json
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from deploy.errors import DeployError
from feedback.errors import IdempotencyKeyReuse, StoreUnavailable
from feedback.principals import RateExceeded
from serve.errors import (
    EngineFailed,
    EngineRefused,
    InvalidKey,
    InvalidRequest,
    KeysUnavailable,
    ModelNotFound,
    NotAllowed,
    NotFound,
    NotServing,
)

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5
"""What a client is told to wait after 429 and 503; at most 60 by contract."""

_REPEATED = re.compile(
    r" \(parameter=.*\)$|[.,]? (?:but )?[Gg]ot .*$| \[[^]]*\](?= in )|: \{.*\}$|(?<=Token id) \d+", re.DOTALL
)
"""Where vLLM's messages repeat what was sent."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object for an HTTP status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    retry_after_seconds: int = RETRY_AFTER_SECONDS,
) -> JSONResponse:
    """The error object as an answer; 429 and 503 say when to try again, 401 what to come with."""
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after_seconds)
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, param, code), status, headers)


def stream_error(error: dict[str, Any]) -> bytes:
    """VLLM's error in the middle of a stream (its ``code`` is a number) as an event in our shape."""
    status = error.get("code")
    message = _REPEATED.sub("", str(error.get("message") or "")) or "the engine failed"
    body = error_body(status if isinstance(status, int) else 500, message)
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def invalid_request(request: Request, error: Exception) -> JSONResponse:
    """400 with the first field at fault; the value itself stays out of the message."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(400, "the body is not valid JSON")
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(path) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return error_response(400, f"{param}: {message}" if param else message, param)


def add_error_handlers(app: FastAPI) -> None:
    """Translate every exception that a route raises on purpose; for others see ``RequestObserver``."""

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, str(error.detail))

    def answer(status: int, code: str | None = None) -> Any:
        async def handle(request: Request, error: Exception) -> JSONResponse:
            param = getattr(error, "param", None)
            return error_response(status, str(error), param, getattr(error, "code", None) or code)

        return handle

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid_request)
    app.add_exception_handler(InvalidRequest, answer(400))
    app.add_exception_handler(ModelNotFound, answer(404, "model_not_found"))
    app.add_exception_handler(NotFound, answer(404))
    app.add_exception_handler(IdempotencyKeyReuse, answer(422, "idempotency_key_reuse"))
    app.add_exception_handler(NotServing, answer(503))
    app.add_exception_handler(EngineFailed, answer(503))
    app.add_exception_handler(EngineRefused, _engine_refused)
    app.add_exception_handler(InvalidKey, answer(401, "invalid_api_key"))
    app.add_exception_handler(NotAllowed, answer(403))
    app.add_exception_handler(KeysUnavailable, answer(503, "keys_unavailable"))
    app.add_exception_handler(RateExceeded, _rate_exceeded)
    app.add_exception_handler(StoreUnavailable, _store_unavailable)
    app.add_exception_handler(DeployError, answer(503))


async def _engine_refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineRefused)
    if error.queue_full:
        return error_response(429, str(error), None, "queue_full")
    status = 500 if error.status >= 500 else 400  # of vLLM's other statuses a client learns nothing more
    return error_response(status, _REPEATED.sub("", str(error)) or "the engine failed", error.param)


async def _rate_exceeded(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RateExceeded)
    return error_response(429, str(error), None, "rate_limit_exceeded", error.retry_after_seconds)


async def _store_unavailable(request: Request, error: Exception) -> JSONResponse:
    # The reason names hosts and paths of ours: it goes to the log.
    log.warning("feedback refused", extra={"why": str(error)})
    return error_response(
        503,
        "the store of completions and feedback does not answer; nothing was kept or changed",
        None,
        "feedback_unavailable",
    )


def server_failed() -> JSONResponse:
    """What a client gets for an exception that nobody expected: nothing of our insides, whose traceback is logged."""
    return error_response(500, "the server failed on this request; its log has the reason")
