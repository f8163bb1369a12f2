"""Feedback routes: a ranking of completions, and a completion written by a labeler."""

import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from feedback.principals import Scope
from feedback.records import (
    MAX_CANDIDATES,
    Candidate,
    Comparison,
    Demonstration,
    Prompt,
    StoredCompletion,
    new_id,
)
from serve.appending import IdempotencyKey, append, appended
from serve.auth import FeedbackPrincipal, require_scope
from serve.errors import InvalidRequest, NotFound
from serve.feedback_bodies import ComparisonBody, DemonstrationBody
from serve.json_route import JsonRoute
from serve.openapi import errors
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1/feedback", route_class=JsonRoute)


class ComparedCandidate(BaseModel):
    """Which completion was ranked, and whose it is; null for outside data."""

    completion_id: str | None
    index: int
    policy_version: int | None


class ComparisonObject(BaseModel):
    """A ranking as it was kept."""

    id: str
    object: Literal["feedback.comparison"] = "feedback.comparison"
    created: int = Field(description="unix seconds")
    pairs: int = Field(description="pairs of candidates of which one is better")
    ranking: list[list[int]] = Field(description="places in candidates; best group first, a group is a tie")
    candidates: list[ComparedCandidate]
    labeler: str


class DemonstrationObject(BaseModel):
    """A labeler's completion, as it was kept."""

    id: str
    object: Literal["feedback.demonstration"] = "feedback.demonstration"
    created: int = Field(description="unix seconds")
    labeler: str


@router.post("/comparisons", status_code=201, responses=appended(ComparisonObject))
async def create_comparison(
    body: ComparisonBody,
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: FeedbackPrincipal,
    idempotency_key: IdempotencyKey = None,
) -> ComparisonObject:
    """Keep one labeler's ranking. 201 means it is fsynced; the same request again answers 200 with the first."""
    if body.completions is not None:  # outside data: nothing shows that anybody was given these
        require_scope(request, Scope.OPERATOR)
    prompt, candidates, source, asked_of = await _candidates(body, services, principal)
    comparison = Comparison(
        id=new_id("cmp_"),
        created=time.time(),
        principal=principal,
        labeler=body.labeler or asked_of or principal,
        prompt=prompt,
        metadata=({"task": prompt.task} if prompt.task else {}) | body.metadata,
        source=source,
        task_id=body.task_id,
        candidates=candidates,
        ranking=body.ranked(len(candidates)),
        both_bad=body.preferred == "both_bad",
        comment=body.comment,
        duration_ms=body.duration_ms,
    )
    kept = await append(comparison, body, idempotency_key, request, response, services)
    return comparison_object(kept)


@router.get("/comparisons/{comparison_id}", responses=errors(404))
async def get_comparison(comparison_id: str, services: ServicesDep, principal: FeedbackPrincipal) -> ComparisonObject:
    """A comparison of this principal's."""
    record = await services.store.record(comparison_id)
    if not isinstance(record, Comparison) or record.principal != principal:
        raise NotFound("there is no such comparison")
    return comparison_object(record)


@router.post("/demonstrations", status_code=201, responses=appended(DemonstrationObject))
async def create_demonstration(
    body: DemonstrationBody,
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: FeedbackPrincipal,
    idempotency_key: IdempotencyKey = None,
) -> DemonstrationObject:
    """Keep a completion that a labeler wrote; with ``completion_id`` it corrects that choice."""
    prompt, corrects = body.asked(), None
    if body.completion_id is not None:
        corrected = await find_completion(body.completion_id, services, principal)
        corrects, prompt = choice_of(corrected, body.index)
    assert prompt is not None
    demonstration = Demonstration(
        id=new_id("demo_"),
        created=time.time(),
        principal=principal,
        labeler=body.labeler or principal,
        prompt=prompt,
        metadata=body.metadata,
        completion=body.completion,
        corrects=corrects,
    )
    kept = await append(demonstration, body, idempotency_key, request, response, services)
    return DemonstrationObject(id=kept.id, created=int(kept.created), labeler=kept.labeler)


async def find_completion(completion_id: str, services: Services, principal: str) -> StoredCompletion:
    """A completion of this principal's. Raises NotFound alike for others' and for none."""
    completion = await services.recorder.find(completion_id)
    if completion is None or completion.principal != principal:
        raise NotFound("there is no such completion; it may have expired, or was made with store: false")
    return completion


async def _candidates(
    body: ComparisonBody, services: Services, principal: str
) -> tuple[Prompt, tuple[Candidate, ...], Literal["choices", "candidates", "task", "outside"], str | None]:
    """What is compared, how it was named, and for a task the labeler it was given to."""
    if body.completion_id is not None:
        completion = await find_completion(body.completion_id, services, principal)
        if not 2 <= len(completion.choices) <= MAX_CANDIDATES:
            raise InvalidRequest(f"completion_id must have 2 to {MAX_CANDIDATES} choices to compare", "completion_id")
        picked = [choice_of(completion, choice.index) for choice in completion.choices]
        return _one_prompt(picked), tuple(candidate for candidate, _ in picked), "choices", None
    if body.candidates is not None:
        if len({(ref.completion_id, ref.index) for ref in body.candidates}) != len(body.candidates):
            raise InvalidRequest("candidates names one choice twice", "candidates")
        found = {
            completion_id: await find_completion(completion_id, services, principal)
            for completion_id in dict.fromkeys(ref.completion_id for ref in body.candidates)
        }
        picked = [choice_of(found[ref.completion_id], ref.index) for ref in body.candidates]
        return _one_prompt(picked), tuple(candidate for candidate, _ in picked), "candidates", None
    if body.task_id is not None:
        task = await services.store.task(body.task_id)
        if task is None or task.principal != principal:
            raise NotFound("there is no such task; it may have expired")
        if task.labeler is not None and body.labeler not in (None, task.labeler):
            raise InvalidRequest("the task was given to another labeler", "labeler")
        return task.prompt, task.candidates, "task", task.labeler
    prompt = body.asked()
    assert prompt is not None and body.completions is not None
    return prompt, tuple(Candidate(text=text, index=i) for i, text in enumerate(body.completions)), "outside", None


def choice_of(completion: StoredCompletion, index: int) -> tuple[Candidate, Prompt]:
    """A choice to judge, and the prompt it answers. Raises InvalidRequest where there is no such choice."""
    try:
        return completion.candidate(index), completion.prompt_of(index)
    except LookupError as error:
        raise InvalidRequest(str(error), "index") from error


def _one_prompt(picked: list[tuple[Candidate, Prompt]]) -> Prompt:
    first = picked[0][1]
    if not all(prompt.same_question(first) for _, prompt in picked):
        raise InvalidRequest("the candidates must answer one prompt", "candidates")
    return first


def comparison_object(comparison: Comparison) -> ComparisonObject:
    """A comparison as it is told."""
    return ComparisonObject(
        id=comparison.id,
        created=int(comparison.created),
        pairs=sum(1 for _ in comparison.pairs()),
        ranking=[list(group) for group in comparison.ranking],
        candidates=[
            ComparedCandidate(completion_id=c.completion_id, index=c.index, policy_version=c.policy_version)
            for c in comparison.candidates
        ],
        labeler=comparison.labeler,
    )
