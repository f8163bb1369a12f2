"""An app of the feedback routes over a real store, with two arms whose engines answer at once and know nothing."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from any_key import AnyKey
from fastapi import FastAPI, Request
from httpx2 import ASGITransport, AsyncClient, Response

from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import FeedbackPrincipal
from serve.error_response import add_error_handlers
from serve.errors import EngineRefused
from serve.metrics import Metrics
from serve.recording import Recorder, Sampled, SampledChoice
from serve.settings import ServeSettings


@dataclass
class StubEngine:
    """Answers with its version's number and something random; refuses prompts that have ``too long`` in them."""

    version: int
    recorder: Recorder
    tokenizer: str = "digest"
    asked: list[tuple[str, int]] = field(default_factory=list)
    """Prompt and n of every request."""
    cache_salts: list[str] = field(default_factory=list)
    failing: Exception | None = None
    tardy: bool = False
    """Whether what it sampled is written before it answers."""
    hanging: bool = False
    aborted: int = 0

    async def complete(self, route: str, body: dict[str, Any], bare_id: str, cache_salt: str) -> bytes:
        from serve.forwarding import completion_id

        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        self.asked.append((prompt, body["n"]))
        self.cache_salts.append(cache_salt)
        if self.hanging:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.aborted += 1
                raise
        if self.failing is not None:
            raise self.failing
        if "too long" in prompt:
            raise EngineRefused(400, "the prompt is too long")
        texts = [f"{self.version} {secrets.token_hex(4)}" for _ in range(body["n"])]
        choices = {i: SampledChoice(i, text, [3, 4], [-0.1, -0.2], "stop") for i, text in enumerate(texts)}
        ended = Sampled(completion_id(route, bare_id), {}, recorded=True, finished=True, prompt_token_ids=[1, 2])
        ended.choices, ended.completion_tokens = choices, 2 * len(choices)
        self.recorder.sampled(ended)
        if self.tardy:
            await self.recorder.flush()
        return b"{}"


@dataclass
class StubFleet:
    """Both arms live."""

    live: dict[int, StubEngine]

    @asynccontextmanager
    async def arms(self) -> AsyncIterator[list[StubEngine]]:
        yield list(self.live.values())

    def model_id(self, version: int) -> str:
        return f"policy-v{version}"


class Labeling:
    """A labeler's client, and what stands behind it. The API key is the principal's name."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        # These import vLLM, which must happen inside a test: see tests/integration/test_serve_stored_completions.py.
        from serve import comparisons, tasks
        from serve.services import Services

        self.settings = FeedbackSettings(**settings)
        self.store = FeedbackStore.connect(redis_url, self.settings)
        serve_settings, metrics = ServeSettings(), Metrics()
        self.recorder = Recorder(self.store, serve_settings, metrics)
        self.engines = {version: StubEngine(version, self.recorder) for version in (1, 2)}
        parts: dict[str, Any] = dict.fromkeys(one.name for one in fields(Services))
        parts |= {
            "settings": serve_settings,
            "feedback_settings": self.settings,
            "store": self.store,
            "fleet": StubFleet(self.engines),
            "recorder": self.recorder,
            "metrics": metrics,
            "access": AnyKey(),
            "rates": _Unrated(),
        }
        app = FastAPI()
        app.state.services = Services(**parts)
        add_error_handlers(app)
        app.include_router(tasks.router)
        app.include_router(comparisons.router)

        def named_by_key(request: Request) -> str:
            return request.headers["authorization"].removeprefix("Bearer ")

        app.dependency_overrides[get_args(FeedbackPrincipal)[1].dependency] = named_by_key
        self.app = app
        self.http = AsyncClient(transport=ASGITransport(app), base_url="http://server")

    async def close(self) -> None:
        await self.http.aclose()
        await self.store.close()

    async def task(self, principal: str = "alice", **body: Any) -> Response:
        headers = {"authorization": f"Bearer {principal}"}
        answer = await self.http.post("/v1/feedback/tasks", json=body, headers=headers)
        await self.recorder.flush()
        return answer

    async def rank(self, principal: str = "alice", **body: Any) -> Response:
        headers = {"authorization": f"Bearer {principal}"}
        return await self.http.post("/v1/feedback/comparisons", json=body, headers=headers)


class _Unrated:
    def counts_tokens(self, principal: str) -> bool:
        return False
