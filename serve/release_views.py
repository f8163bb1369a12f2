"""For operators who watch: the versions and what is known of each, what people prefer, and who changed the release."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from deploy.arms import FIRST_TOKEN_SECONDS, ArmFigures
from deploy.errors import DeployError
from deploy.evidence import HISTORY
from deploy.gate import GateReport
from deploy.registry import Registry
from deploy.release import Attempt, Release, ReplicaReport
from deploy.versions import Manifest, VersionKind
from serve.auth import OperatorPrincipal
from serve.errors import NotFound
from serve.openapi import errors
from serve.plots import canary_plot, released_plot
from serve.services import Services, ServicesDep
from serve.summary import summary_reader
from serve.win_rates import CanaryCourse, Course, WinRate, released_win_rates, steps

router = APIRouter(prefix="/v1/release")

Role = Literal["stable", "canary", "previous"]

MAX_STEPS = 12
"""Versions whose win rates are told, the newest: as many as can be told apart in a plot."""


class AttemptObject(Attempt):
    """An entry of the audit log."""

    created: float = Field(description="unix seconds, by Redis' clock")


class AttemptList(BaseModel):
    """The newest entries, newest first."""

    object: Literal["list"] = "list"
    data: list[AttemptObject]


class TrafficObject(ArmFigures):
    """How a live version runs on all servers together, since the release last changed."""

    first_token_p50: float | None = Field(description="seconds in which half of the first tokens came; null: unknown")
    first_token_p95: float | None = Field(description="seconds in which 95 % of them came; null: unknown, or over 10")

    @classmethod
    def of(cls, version: int, release: Release, replicas: Iterable[ReplicaReport]) -> Self:
        """The sum of what the servers that serve this release report of a version."""
        current = [report.arms for report in replicas if report.generation == release.generation]
        total = ArmFigures.total(arms[version] for arms in current if version in arms)
        return cls(
            **total.model_dump(),
            first_token_p50=_first_token_seconds(total, 0.5),
            first_token_p95=_first_token_seconds(total, 0.95),
        )


class VersionObject(BaseModel):
    """A policy version, and how it runs if it is live."""

    version: int
    role: Role | None
    traffic: TrafficObject | None = Field(description="null: it is neither stable nor the canary")
    problem: str | None = Field(None, description="why its manifest cannot be believed; then all below is null")
    created: datetime | None = None
    parent: int | None = None
    reward_model: int | None = None
    comparisons: int | None = Field(None, description="trained on")
    demonstrations: int | None = Field(None, description="trained on")
    gate: GateReport | None = Field(None, description="null: never measured")


class VersionList(BaseModel):
    """The newest versions and those that serve, newest first."""

    object: Literal["list"] = "list"
    data: list[VersionObject]


class WinRateList(BaseModel):
    """Of each version that took another's place and was compared with it, oldest first; last the canary's."""

    object: Literal["list"] = "list"
    alpha: float = Field(description="chance that a bound is wrong at any look")
    data: list[WinRate]


class _Svg(Response):
    media_type = "image/svg+xml"


@dataclass
class _Views:
    """What is kept between requests."""

    course: CanaryCourse
    manifests: dict[int, Manifest] = field(default_factory=dict)
    canary: tuple[Course, bytes] | None = None
    released: tuple[list[WinRate], bytes] | None = None


@router.get("/history")
async def get_release_history(
    services: ServicesDep,
    principal: OperatorPrincipal,
    count: Annotated[int, Query(ge=1, le=1000, description="newest entries")] = 50,
) -> AttemptList:
    """Who tried to change the release, why, and what came of it."""
    entries = await services.releases.history(count)
    return AttemptList(data=[AttemptObject(**entry.model_dump(), created=entry.at) for entry in entries])


@router.get("/versions")
async def get_release_versions(
    request: Request,
    services: ServicesDep,
    principal: OperatorPrincipal,
    count: Annotated[int, Query(ge=1, le=1000, description="newest versions")] = 20,
) -> VersionList:
    """The policy versions: role, origin, gate, and how those that are live run."""
    release, replicas = await services.releases.read(), await services.releases.replicas()
    views = _views(request, services)
    return await asyncio.to_thread(_versions, services.registry, views.manifests, release, replicas, count)


@router.get("/win-rates")
async def get_win_rates(request: Request, services: ServicesDep, principal: OperatorPrincipal) -> WinRateList:
    """How often people prefer each released version, and the canary, to the one before."""
    rates = await _win_rates(request, services)
    return WinRateList(alpha=services.deploy_settings.verdict.alpha, data=rates)


@router.get("/plots/canary.svg", response_class=_Svg, responses=errors(404))
async def get_canary_plot(request: Request, services: ServicesDep, principal: OperatorPrincipal) -> _Svg:
    """The canary's win rate over the stable version as comparisons came in, with bounds that hold at any time."""
    release, views = await services.releases.read(), _views(request, services)
    if release.canary is None:
        raise NotFound("there is no canary")
    course = await views.course.read(release)
    if views.canary is None or views.canary[0] is not course:
        views.canary = course, await asyncio.to_thread(canary_plot, course)
    return _Svg(views.canary[1])


@router.get("/plots/released.svg", response_class=_Svg)
async def get_released_plot(request: Request, services: ServicesDep, principal: OperatorPrincipal) -> _Svg:
    """The win rate of each released version, and of the canary, over the one before."""
    rates, views = await _win_rates(request, services), _views(request, services)
    if views.released is None or views.released[0] != rates:
        views.released = rates, await asyncio.to_thread(released_plot, rates)
    return _Svg(views.released[1])


async def _win_rates(request: Request, services: Services) -> list[WinRate]:
    release, history = await services.releases.read(), await services.releases.history(HISTORY)
    taken = steps(history, release)[-MAX_STEPS:]
    summary = await summary_reader(request, services.store).read()
    rates = released_win_rates(taken, summary.version_pairs, services.deploy_settings.verdict.alpha)
    if release.canary is None:
        return rates
    course = await _views(request, services).course.read(release)  # since it began, and to the second
    return [*(one for one in rates if one.since != taken[-1].since), course.win_rate(taken[-1])]


def _versions(
    registry: Registry, known: dict[int, Manifest], release: Release, replicas: Sequence[ReplicaReport], count: int
) -> VersionList:
    """Reads the manifests that are not ``known`` yet: a version never changes."""
    roles: dict[int | None, Role] = {release.previous: "previous", release.canary: "canary", release.stable: "stable"}
    numbers = registry.numbers(VersionKind.POLICY)
    told = []
    for number in sorted({*numbers[-count:], *(one for one in numbers if one in roles)}, reverse=True):
        traffic = TrafficObject.of(number, release, replicas) if number in release.live() else None
        shown = VersionObject(version=number, role=roles.get(number), traffic=traffic)
        try:
            if number not in known:
                known[number] = registry.get(VersionKind.POLICY, number).manifest
        except DeployError as error:
            told.append(shown.model_copy(update={"problem": str(error)}))
            continue
        manifest = known[number]
        same = ("created", "parent", "reward_model", "comparisons", "demonstrations", "gate")
        told.append(shown.model_copy(update={name: getattr(manifest, name) for name in same}))
    return VersionList(data=told)


def _first_token_seconds(figures: ArmFigures, share: float) -> float | None:
    """The first of ``FIRST_TOKEN_SECONDS`` in which so large a share of the first tokens had come."""
    if not figures.timed:
        return None
    kept = zip(FIRST_TOKEN_SECONDS, figures.slower, strict=False)
    return next((seconds for seconds, slower in kept if slower <= (1 - share) * figures.timed), None)


def _views(request: Request, services: Services) -> _Views:
    state = request.app.state
    if not hasattr(state, "release_views"):
        state.release_views = _Views(CanaryCourse(services.store, services.deploy_settings.verdict.alpha))
    views: _Views = state.release_views
    return views
