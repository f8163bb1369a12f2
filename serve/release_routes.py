"""For operators: which version serves whom, and moving it, as ``python -m deploy`` does.

A change names the generation it was decided on (``If-Match``), so that of two operators one learns that the release
has moved on (412) instead of undoing what the other did.
"""

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from deploy import operations
from deploy import release as transitions
from deploy.errors import StaleGeneration, TransitionRefused
from deploy.operations import Transition
from deploy.release import MAX_CANARY_FRACTION, Release, ReplicaReport
from deploy.verdict import Verdict
from serve.auth import OperatorPrincipal
from serve.errors import InvalidRequest
from serve.json_route import JsonRoute
from serve.openapi import errors
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1/release", route_class=JsonRoute)

_GENERATION = re.compile(r'"?(?P<number>[0-9]{1,15})"?')
_CHANGES = errors(400, 409, 412, 428)
IfMatch = Annotated[
    str | None,
    Header(alias="If-Match", max_length=64, description="the generation this change was decided on, as ETag has it"),
]


class VerdictObject(Verdict):
    """What blind comparisons say of the canary so far, and the sentence for an operator."""

    said: str


class ReplicaObject(ReplicaReport):
    """What a server has live, and whether that is the release."""

    converged: bool


class ReleaseObject(BaseModel):
    """The release in force."""

    object: Literal["release"] = "release"
    stable: int | None = Field(description="policy version that serves everyone but the canary's share")
    canary: int | None
    canary_fraction: float
    previous: int | None = Field(description="where a rollback without a canary goes")
    generation: int
    changed_at: float = Field(description="unix seconds, by Redis' clock")
    by: str
    reason: str


class ReleaseStatus(ReleaseObject):
    """The release, the verdict on its canary, and how far each server has followed."""

    verdict: VerdictObject | None
    replicas: list[ReplicaObject]


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid")
    reason: str = Field("", max_length=500, description="why; kept in the log")


class RollbackBody(_Change):
    """Drop the canary; without one, return to the previous version."""


class PromoteBody(_Change):
    """Make the canary stable."""

    override: str | None = Field(
        None, min_length=1, max_length=500, description="why to go ahead without the verdict's consent; kept in the log"
    )


class CanaryBody(_Change):
    """Let a version serve a share of the traffic."""

    version: int = Field(ge=1, le=2**53)
    fraction: float = Field(gt=0, le=MAX_CANARY_FRACTION, description="share of sticky traffic")
    override: str | None = Field(
        None, min_length=1, max_length=500, description="why to go ahead without the gate's consent; kept in the log"
    )


@router.get("")
async def get_release(services: ServicesDep, principal: OperatorPrincipal, response: Response) -> ReleaseStatus:
    """The release, the verdict on its canary, and the servers."""
    release = await services.releases.read()
    verdict = await _verdict(services, release) if release.canary is not None else None
    told = await services.releases.replicas()
    response.headers["ETag"] = f'"{release.generation}"'
    return ReleaseStatus(
        **release.model_dump(),
        verdict=VerdictObject(**verdict.model_dump(), said=verdict.sentence()) if verdict else None,
        replicas=[ReplicaObject(**one.model_dump(), converged=one.generation == release.generation) for one in told],
    )


@router.post("/canary", responses=_CHANGES)
async def start_canary(
    body: CanaryBody, services: ServicesDep, principal: OperatorPrincipal, response: Response, if_match: IfMatch = None
) -> ReleaseObject:
    """Let a version that passed its gate serve a share of the traffic, and one side of every blind comparison."""
    transition = operations.start_canary(services.registry, body.version, body.fraction, body.override)
    why = operations.why(body.reason, body.override)
    return await _change(services, transition, "canary", principal, why, _generation(if_match), response)


@router.post("/promote", responses=_CHANGES)
async def promote(
    body: PromoteBody, services: ServicesDep, principal: OperatorPrincipal, response: Response, if_match: IfMatch = None
) -> ReleaseObject:
    """Make the canary stable, once blind comparisons have decided for it."""
    expect, release = _generation(if_match), await services.releases.read()
    verdict = await _verdict(services, release)
    transition = operations.promote_canary(verdict, body.override)
    why = operations.why(body.reason or (verdict.sentence() if release.canary else ""), body.override)
    return await _change(services, transition, "promote", principal, why, expect, response)


@router.post("/rollback", responses=_CHANGES)
async def rollback(
    body: RollbackBody,
    services: ServicesDep,
    principal: OperatorPrincipal,
    response: Response,
    if_match: IfMatch = None,
) -> ReleaseObject:
    """Drop the canary; without one, return to the previous version."""
    expect = _generation(if_match)
    return await _change(services, transitions.rollback, "rollback", principal, body.reason, expect, response)


async def _verdict(services: Services, release: Release) -> Verdict:
    return await services.guard.verdict(release)


def _generation(if_match: str | None) -> int:
    if if_match is None:
        raise HTTPException(428, "say which generation this change was decided on: If-Match: <generation>")
    found = _GENERATION.fullmatch(if_match.strip())
    if found is None:
        raise InvalidRequest("If-Match must be one generation, as the ETag of GET /v1/release has it", "If-Match")
    return int(found["number"])


async def _change(
    services: Services, transition: Transition, verb: str, by: str, reason: str, expect: int, response: Response
) -> ReleaseObject:
    try:
        changed = await services.releases.change(transition, verb=verb, by=by, reason=reason, expect=expect)
    except StaleGeneration as error:
        raise HTTPException(412, str(error)) from error
    except TransitionRefused as error:
        raise HTTPException(409, str(error)) from error
    response.headers["ETag"] = f'"{changed.generation}"'
    return ReleaseObject(**changed.model_dump())
