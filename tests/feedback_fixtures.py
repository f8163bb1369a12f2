"""Fixtures of an app of the feedback routes over a real store; no engine."""

from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from any_key import AnyKey
from fastapi import FastAPI, Request
from redis.asyncio import Redis
from starlette.middleware import Middleware

from feedback.principals import ApiKey, Scope
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import CompletionsPrincipal, FeedbackPrincipal, OperatorPrincipal
from serve.error_response import add_error_handlers
from serve.metrics import Metrics
from serve.middleware import RequestObserver
from serve.recording import Recorder
from serve.settings import ServeSettings


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings())
    yield store
    await store.close()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def app(store: FeedbackStore, tmp_path: Path) -> FastAPI:
    """An app of these routes, where the API key is the principal's name, and root is the operator."""
    from serve import comparison_list, comparisons, erasure, ratings, summary
    from serve.services import Services

    settings, metrics = ServeSettings(), Metrics()
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Services))
    parts |= {"settings": settings, "store": store, "recorder": Recorder(store, settings, metrics), "metrics": metrics}
    parts["access"] = AnyKey()
    app = FastAPI(middleware=[Middleware(RequestObserver, metrics=metrics)])
    app.state.services = Services(**parts)
    app.state.archive = tmp_path / "archive"
    add_error_handlers(app)
    for routes in (comparisons, ratings, comparison_list, summary, erasure):
        app.include_router(routes.router)

    def named_by_key(request: Request) -> str:
        name = request.headers["authorization"].removeprefix("Bearer ")
        scopes = frozenset(Scope) if name == "root" else frozenset({Scope.COMPLETIONS, Scope.FEEDBACK})
        request.scope["instructloop.key"] = ApiKey(sha256="0" * 64, principal=name, scopes=scopes, created=1)
        return name

    for principal in (CompletionsPrincipal, FeedbackPrincipal, OperatorPrincipal):
        app.dependency_overrides[get_args(principal)[1].dependency] = named_by_key
    return app


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://il", timeout=30) as client:
        client.headers["authorization"] = "Bearer alice"
        yield client
