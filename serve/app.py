"""``create_app`` assembles the server: lifespan, middleware, routes. It decides nothing."""

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware

from deploy.guard import Guard
from deploy.registry import Registry, ReleaseStore
from deploy.settings import DeploySettings
from deploy.signatures import Signatures
from feedback.principals import KeyStore
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve import (
    comparison_list,
    comparisons,
    completions,
    erasure,
    health,
    page_routes,
    ratings,
    release_routes,
    release_views,
    stored_completions,
    summary,
    tasks,
)
from serve.auth import Access, Rates, is_loopback
from serve.error_response import add_error_handlers
from serve.fleet import Fleet
from serve.guard import ArmCounter, guard_canary
from serve.metrics import Metrics
from serve.middleware import BodyLimit, FeedbackQueue, RequestObserver
from serve.openapi import describe
from serve.recording import Recorder, Sampled
from serve.services import Services
from serve.settings import ServeSettings
from serve.supervision import supervise

log = logging.getLogger(__name__)

_ROUTES = (
    completions,
    stored_completions,
    comparisons,
    comparison_list,
    ratings,
    tasks,
    summary,
    erasure,
    release_routes,
    release_views,
    health,
    page_routes,
)


def create_app(
    settings: ServeSettings,
    feedback_settings: FeedbackSettings,
    deploy_settings: DeploySettings,
    state: Path,
    redis_url: str,
) -> FastAPI:
    """The server over one state directory and one Redis. Raises SigningKeyUnusable."""
    metrics, registry = Metrics(), Registry(state, Signatures.of(deploy_settings.signing))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # What the imports have made lives for ever; left to the collector, each full pass over it stops every
        # request for half a second.
        gc.collect()
        gc.freeze()
        async with _connected(
            settings, feedback_settings, deploy_settings, state, redis_url, metrics, registry
        ) as services:
            app.state.archive = state / "archive"
            app.state.services = services
            background = [asyncio.create_task(work) for work in _works(services)]
            for task in background:
                task.add_done_callback(_end_server_if_failed)
            try:
                yield
            finally:
                await _end(background)
                await services.fleet.close()
                await services.recorder.flush()

    app = FastAPI(
        title="instructloop",
        docs_url=None,  # FastAPI's pages load scripts from an outside host; /openapi.json is ours
        redoc_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(RequestObserver, metrics=metrics),
            Middleware(FeedbackQueue, max_pending=settings.max_pending_feedback),
            Middleware(BodyLimit, max_body_bytes=settings.max_body_bytes),
        ],
    )
    add_error_handlers(app)
    for routes in _ROUTES:
        app.include_router(routes.router)
    app.openapi_schema = describe(app, settings)
    return app


@contextlib.asynccontextmanager
async def _connected(
    settings: ServeSettings,
    feedback_settings: FeedbackSettings,
    deploy_settings: DeploySettings,
    state: Path,
    redis_url: str,
    metrics: Metrics,
    registry: Registry,
) -> AsyncIterator[Services]:
    """The parts of a server, at rest, over connections to Redis that end with them."""
    store = FeedbackStore.connect(redis_url, feedback_settings)
    releases = ReleaseStore.connect(redis_url, state)
    keys = KeyStore.connect(redis_url, feedback_settings)
    arms = ArmCounter()
    recorder = Recorder(store, settings, metrics, arms.lost)
    replica = f"{socket.gethostname()}:{os.getpid()}"

    def sampled(part: Sampled) -> None:
        arms.sampled(part)
        recorder.sampled(part)

    fleet = Fleet(replica, registry, releases, settings, metrics, sampled, arms)
    metrics.state_free_bytes.set_function(lambda: shutil.disk_usage(state).free)
    metrics.include_engines(lambda: [engine.metrics for engine in fleet.live.values()])
    access = Access(keys, loopback=is_loopback(settings.host), memory=state / "api-keys.json")
    try:
        await access.refresh()
        yield Services(
            settings=settings,
            feedback_settings=feedback_settings,
            deploy_settings=deploy_settings,
            store=store,
            registry=registry,
            releases=releases,
            guard=Guard(replica, releases, store, deploy_settings),
            fleet=fleet,
            recorder=recorder,
            metrics=metrics,
            access=access,
            rates=Rates(keys, metrics),
        )
    finally:
        await store.close()
        await releases.close()
        await keys.close()


def _works(services: Services) -> tuple[Coroutine[Any, Any, None], ...]:
    """What goes on beside the requests, for as long as the server runs."""
    return (
        services.fleet.watch(),
        services.fleet.report(),
        supervise(services.fleet, services.settings),
        guard_canary(services.guard, services.deploy_settings.guard_seconds, services.metrics),
        services.recorder.run(),
        services.access.watch(),
    )


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: a library that is just timing out may swallow the first cancellation."""
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)


def _end_server_if_failed(task: asyncio.Task[None]) -> None:
    """A server that no longer follows the release, or records nothing, must not look alive: it ends."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a background task failed; the server ends", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)
