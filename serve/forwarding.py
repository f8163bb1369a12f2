"""Hands a request to an engine's ASGI app and its answer to the client: one call in-process, no network hop."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serve.engine import Engine
from serve.error_response import translate_engine_error, translate_stream_error
from serve.recording import Recorder


class EngineAnswer(Response):
    """The engine's own answer, streamed through, with the policy version in a header and errors in our shape.

    vLLM takes the completion id from ``x-request-id``, so it is handed ours, never the client's: two clients
    that send the same header must not share an id.
    """

    def __init__(
        self, engine: Engine, request: Request, body: dict[str, Any], bare_id: str, recorder: Recorder
    ) -> None:
        self.status_code = 200
        self.background = None
        self._content = json.dumps(body).encode()
        self.engine = engine
        self._path = request.url.path
        self._bare_id = bare_id
        self._completion_id = completion_id(request.url.path, bare_id)
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the engine's app on a scope of its own."""
        scope["instructloop.policy_version"] = self.engine.version
        self.engine.running += 1
        try:
            await self.engine.app(
                self._scope(scope), _Body(self._content, receive), _Translator(self.engine.version, send)
            )
        finally:
            self.engine.running -= 1
            self._recorder.forget(self._completion_id)

    def _scope(self, outer: Scope) -> Scope:
        return {
            "type": "http",
            "asgi": outer["asgi"],
            "http_version": outer["http_version"],
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(self._content)).encode()),
                (b"x-request-id", self._bare_id.encode()),
            ],
            "client": None,
            "server": None,
            "state": {},
        }


def completion_id(path: str, bare_id: str) -> str:
    """The id vLLM gives a completion whose ``x-request-id`` is ``bare_id``."""
    return f"{'chatcmpl' if path.endswith('/chat/completions') else 'cmpl'}-{bare_id}"


class _Body:
    """The buffered body once, then the client's own messages: a disconnect reaches the engine."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


class _Translator:
    """Passes an answer on: errors whole in our shape, streams event by event."""

    def __init__(self, version: int, send: Send) -> None:
        self._version_header = (b"x-policy-version", str(version).encode())
        self._send = send
        self._start: Message = {}
        self._error = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if message["status"] < 400:
                message["headers"] = [*message["headers"], self._version_header]
                await self._send(message)
        elif self._start["status"] < 400:
            await self._send({**message, "body": translate_stream_error(message.get("body", b""))})
        else:
            self._error += message.get("body", b"")
            if not message.get("more_body", False):
                answer = translate_engine_error(self._start["status"], self._error)
                headers = [*answer.raw_headers, self._version_header]
                await self._send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
                await self._send({"type": "http.response.body", "body": answer.body})
