"""The paper's judgement of one completion by itself: overall quality and flags (InstructGPT Table 3), or a thumb."""

import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from feedback.records import Rating, RatingFlag, new_id
from serve.appending import IdempotencyKey, append, appended
from serve.auth import FeedbackPrincipal
from serve.comparisons import choice_of, find_completion
from serve.feedback_bodies import RatingBody
from serve.json_route import JsonRoute
from serve.services import ServicesDep

router = APIRouter(prefix="/v1/feedback", route_class=JsonRoute)


class RatingObject(BaseModel):
    """A rating as it was kept."""

    id: str
    object: Literal["feedback.rating"] = "feedback.rating"
    created: int = Field(description="unix seconds")
    completion_id: str
    index: int
    policy_version: int | None
    overall: int | None = Field(description="1 to 7; null for a thumb")
    thumb: Literal["up", "down"] | None
    flags: dict[RatingFlag, bool] = Field(description="those that were judged")
    labeler: str


@router.post("/ratings", status_code=201, responses=appended(RatingObject))
async def create_rating(
    body: RatingBody,
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: FeedbackPrincipal,
    idempotency_key: IdempotencyKey = None,
) -> RatingObject:
    """Keep what a labeler says of one choice. A later rating of it by the same labeler counts instead of this one."""
    candidate, prompt = choice_of(await find_completion(body.completion_id, services, principal), body.index)
    rating = Rating(
        id=new_id("rat_"),
        created=time.time(),
        principal=principal,
        labeler=body.labeler or principal,
        prompt=prompt,
        candidate=candidate,
        overall=body.overall,
        thumb=body.thumb,
        flags=body.judged_flags(),
        comment=body.comment,
    )
    kept = await append(rating, body, idempotency_key, request, response, services)
    return RatingObject(
        id=kept.id,
        created=int(kept.created),
        completion_id=body.completion_id,
        index=kept.candidate.index,
        policy_version=kept.candidate.policy_version,
        overall=kept.overall,
        thumb=kept.thumb,
        flags=kept.flags,
        labeler=kept.labeler,
    )
