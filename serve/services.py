"""What the routes work with; made once by the app's lifespan."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from deploy.guard import Guard
from deploy.registry import Registry, ReleaseStore
from deploy.settings import DeploySettings
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import Access, Rates
from serve.fleet import Fleet
from serve.metrics import Metrics
from serve.recording import Recorder
from serve.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class Services:
    """The parts of a running server."""

    settings: ServeSettings
    feedback_settings: FeedbackSettings
    deploy_settings: DeploySettings
    store: FeedbackStore
    registry: Registry
    releases: ReleaseStore
    guard: Guard
    fleet: Fleet
    recorder: Recorder
    metrics: Metrics
    access: Access
    rates: Rates


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
