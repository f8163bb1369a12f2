"""The one error shape: ``{"error": {"message", "type", "param", "code"}}``, as OpenAI's clients expect it.

Every error leaves the server through this file: our own exceptions, the framework's, vLLM's answers and
its mid-stream errors. Messages never echo the offending value.
"""

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from deploy.errors import DeployError
from feedback.errors import IdempotencyKeyReuse, StoreUnavailable
from serve.errors import BodyTooLarge, EngineFailed, InvalidRequest, ModelNotFound, NotFound, NotServing

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5
"""What a client is told to wait after 429 and 503; at most 60 by contract."""

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


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """The error object as an answer; 429 and 503 say when to try again."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
    return JSONResponse(error_body(status, message, param, code), status, headers)


def translate_engine_error(status: int, body: bytes) -> JSONResponse:
    """VLLM's error answer (an integer ``code``, sometimes a bare string) in our shape."""
    try:
        error = json.loads(body).get("error", {})
    except (ValueError, AttributeError):
        error = {}
    if not isinstance(error, dict):
        error = {}
    # vLLM answers 503 when its queue is full; to a client that is a rate, not an outage.
    status = 429 if status == 503 else status
    code = error.get("code")
    return error_response(
        status,
        str(error.get("message") or "the engine refused the request"),
        error.get("param"),
        code if isinstance(code, str) else None,
    )


def translate_stream_error(chunk: bytes) -> bytes:
    """A server-sent event; where it carries vLLM's error object, the same event in our shape."""
    if not chunk.startswith(b'data: {"error"'):
        return chunk
    status = 500
    try:
        error = json.loads(chunk.removeprefix(b"data: "))["error"]
        message = str(error["message"])
        if isinstance(error.get("code"), int):
            status = error["code"]
    except (ValueError, KeyError, TypeError):
        message = "the engine failed"
    return b"data: " + json.dumps(error_body(status, message)).encode() + b"\n\n"


async def invalid_request(request: Request, error: Exception) -> JSONResponse:
    """400 with the first field at fault; the value itself stays out of the message."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(path) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return error_response(400, f"{param}: {message}" if param else message, param)


def add_error_handlers(app: FastAPI) -> None:
    """Translate every exception a route can raise, once, here."""

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
    app.add_exception_handler(BodyTooLarge, answer(413))
    app.add_exception_handler(ModelNotFound, answer(404, "model_not_found"))
    app.add_exception_handler(NotFound, answer(404))
    app.add_exception_handler(IdempotencyKeyReuse, answer(422, "idempotency_key_reuse"))
    app.add_exception_handler(NotServing, answer(503))
    app.add_exception_handler(EngineFailed, answer(503))
    app.add_exception_handler(StoreUnavailable, _store_unavailable)
    app.add_exception_handler(DeployError, answer(503))
    app.add_exception_handler(Exception, _unexpected)


async def _store_unavailable(request: Request, error: Exception) -> JSONResponse:
    # The reason names hosts and paths of ours: it goes to the log.
    log.warning("feedback refused", extra={"why": str(error)})
    return error_response(503, "feedback cannot be kept right now; nothing was kept", None, "feedback_unavailable")


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette logs the traceback; the client learns nothing of our insides.
    return error_response(500, "the server failed on this request; its log has the reason")
