"""Hands a request to an engine and its answer to the client, event by event; all in this process."""

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pydantic import JsonValue
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feedback.records import Prompt
from serve.answer_shape import openai_event
from serve.engine import CHAT, Engine
from serve.error_response import stream_error
from serve.errors import EngineRefused, NotServing
from serve.fleet import Asker
from serve.recording import Asked
from serve.services import Services

_ERROR = 'data: {"error"'
_DONE = "data: [DONE]"


class EngineAnswer(Response):
    """The engine's own answer. A client that leaves ends the sampling; errors come before the first byte if they can.

    Args:
        services: whose fleet picks the engine, once this is called: a change of versions may come in between.
        asker: who asks, and which model.
        route: ``serve.engine.CHAT`` or ``TEXT``.
        body: the client's request, within the limits, without the server's own fields.
        prompts: what it asks, as it is recorded.
        metadata: recorded with it.
        store: as OpenAI's; False records nothing.
    """

    def __init__(
        self,
        services: Services,
        asker: Asker,
        route: str,
        body: dict[str, Any],
        prompts: tuple[Prompt, ...],
        *,
        metadata: dict[str, str],
        store: bool | None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._services = services
        self._recorder = services.recorder
        self._asker = asker
        self._route = route
        self._body = body
        self._prompts = prompts
        self._metadata = metadata
        self._store = store
        self._bare_id = secrets.token_hex(16)
        self._id = completion_id(route, self._bare_id)
        self._with_tools = route == CHAT and bool(body.get("tools"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop sampling as soon as the client has gone."""
        try:
            async with (
                until_gone(receive),
                self._services.fleet.engine_for(self._asker, self._bare_id) as engine,
            ):
                scope["instructloop.policy_version"] = engine.version
                version = (b"x-policy-version", str(engine.version).encode())
                scope.setdefault("instructloop.headers", []).append(version)
                self._expect(engine)
                await self._answer(engine, send)
        finally:
            tokens = self._recorder.forget(self._id)
            if self._services.rates.counts_tokens(self._asker.principal):
                await self._services.rates.spend(self._asker.principal, tokens)

    def _expect(self, engine: Engine) -> None:
        self._recorder.expect(
            Asked(
                completion_id=self._id,
                object="chat.completion" if self._route == CHAT else "text_completion",
                principal=self._asker.principal,
                user=self._asker.user,
                model=engine.model_id,
                policy_version=engine.version,
                tokenizer=engine.tokenizer,
                prompts=self._prompts,
                metadata=self._metadata,
                store=self._store,
                answered={} if self._with_tools else None,
            )
        )

    async def _answer(self, engine: Engine, send: Send) -> None:
        recorded = self._store is not False
        answer = await engine.complete(
            self._route, self._body, self._bare_id, cache_salt(self._asker.principal), recorded=recorded
        )
        if isinstance(answer, bytes):
            if self._with_tools:
                self._recorder.served(self._id, _choices(answer))
            await _start(send, b"application/json", len(answer))
            await send({"type": "http.response.body", "body": answer})
            return
        async with contextlib.aclosing(answer):
            await self._stream(engine, answer, send)

    async def _stream(self, engine: Engine, events: AsyncGenerator[str, None], send: Send) -> None:
        tools = _StreamedChoices() if self._with_tools else None
        first = True
        async for event in events:
            if event.startswith(_ERROR):
                error = json.loads(event.removeprefix("data: "))["error"]
                if first and engine.dead:
                    raise NotServing(f"the engine of version {engine.version} ended during the request; try again")
                if first:
                    raise EngineRefused(int(error["code"]), str(error["message"]), error.get("param"))
                await send({"type": "http.response.body", "body": stream_error(error), "more_body": False})
                return
            if first:
                await _start(send, b"text/event-stream; charset=utf-8", None)
                first = False
            if tools is not None and event.startswith(_DONE):
                self._recorder.served(self._id, tools.choices)
            elif tools is not None:
                tools.add(event)
            await send({"type": "http.response.body", "body": openai_event(event).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _start(send: Send, media_type: bytes, length: int | None) -> None:
    headers = [(b"content-type", media_type)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


@contextlib.asynccontextmanager
async def until_gone(receive: Receive) -> AsyncIterator[None]:
    """Do what is inside, or stop and leave it quietly as soon as the client has gone. The body must have been read."""
    answering = asyncio.current_task()
    assert answering is not None
    leaving = asyncio.create_task(_cancel_when_gone(receive, answering))
    try:
        yield
    except asyncio.CancelledError:
        if not leaving.done():
            raise
        answering.uncancel()
    finally:
        leaving.cancel()


async def _cancel_when_gone(receive: Receive, answering: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()


def completion_id(route: str, bare_id: str) -> str:
    """The id vLLM gives the completion of a request whose id is ``bare_id``."""
    return f"{'chatcmpl' if route.endswith('/chat/completions') else 'cmpl'}-{bare_id}"


def cache_salt(principal: str) -> str:
    """Keeps a principal's cached prefixes from others: whether there are any shows in the time to the first token."""
    return hashlib.sha256(principal.encode()).hexdigest()


def _choices(answer: bytes) -> dict[int, dict[str, JsonValue]]:
    return {choice["index"]: choice for choice in json.loads(answer)["choices"]}


class _StreamedChoices:
    """Puts the choices of a streamed chat together again, tool calls and all."""

    def __init__(self) -> None:
        self.choices: dict[int, dict[str, Any]] = {}

    def add(self, event: str) -> None:
        """Take in one event."""
        for part in json.loads(event.removeprefix("data: "))["choices"]:
            choice = self.choices.setdefault(part["index"], {"message": {"role": "assistant", "content": None}})
            message, delta = choice["message"], part["delta"]
            if delta.get("content"):
                message["content"] = (message["content"] or "") + delta["content"]
            for call in delta.get("tool_calls") or ():
                _add_call(message.setdefault("tool_calls", []), call)
            if part.get("finish_reason"):
                choice["finish_reason"] = part["finish_reason"]


def _add_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    while len(calls) <= part["index"]:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[part["index"]]
    call["id"] = part.get("id") or call["id"]
    for name, text in (part.get("function") or {}).items():
        call["function"][name] += text or ""
