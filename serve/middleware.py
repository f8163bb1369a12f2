"""Plain ASGI middleware: request ids, the body limit, and counting. Nothing here buffers an answer."""

import logging
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.records import new_id
from serve.error_response import error_response, server_failed
from serve.metrics import Metrics

log = logging.getLogger("serve.access")

_MAX_REQUEST_ID_CHARS = 128


class RequestObserver:
    """Echoes or makes ``x-request-id``, and counts and logs each answer; never its content.

    The log is ``serve.access``, one line a request at level INFO: its path is the route's template, without ids.

    What the scope holds as ``instructloop.headers`` is added to the answer, whoever makes it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        began = time.perf_counter()
        status = 0

        async def with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                added = scope.get("instructloop.headers", ())
                message["headers"] = [*kept, *added, (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, with_request_id)
        except ClientDisconnect:
            pass  # it left before all of its body was here: there is nobody to answer
        except Exception:
            if not status:  # the framework's own answer would come without the headers, and uncounted
                await server_failed()(scope, receive, with_request_id)
            raise
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unmatched")
            version = scope.get("instructloop.policy_version", "")
            # A client that left before the answer began shows as 499, nginx's word for it.
            self._metrics.requests.labels(route, status or 499, version).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            if log.isEnabledFor(logging.INFO):
                told = {
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": status or 499,
                    "policy_version": version,
                    "seconds": round(seconds, 4),
                }
                log.info("request", extra=told)


class FeedbackQueue:
    """Answers 429 at once to feedback beyond what may be under way, before its body is read.

    A store that cannot keep up answers late; without a bound, requests would pile up until nobody gets an answer.
    """

    def __init__(self, app: ASGIApp, max_pending: int) -> None:
        self._app = app
        self._max_pending = max_pending
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/feedback/"):
            await self._app(scope, receive, send)
            return
        if self._pending >= self._max_pending:
            busy = error_response(429, "too much feedback is under way; nothing was kept", None, "queue_full")
            await busy(scope, receive, send)
            return
        whole = False

        async def receive_aside() -> Message:
            """Whoever is still sending a body holds no place, however slowly it comes."""
            nonlocal whole
            if whole:
                return await receive()
            self._pending -= 1
            try:
                message = await receive()
            finally:
                self._pending += 1
            whole = not message.get("more_body", False)
            return message

        self._pending += 1
        try:
            await self._app(scope, receive_aside, send)
        finally:
            self._pending -= 1


class BodyLimit:
    """Refuses a body over the limit while it is being read, whatever its content-length says."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; the route's read of the body raises HTTPException."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._max_body_bytes:
                    # The one exception that FastAPI lets through while it reads a body.
                    raise HTTPException(413, f"the request body may have at most {self._max_body_bytes} bytes")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if 0 < len(text) <= _MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable():
                return text
    return new_id("req_")
