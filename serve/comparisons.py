"""Feedback routes: a ranking of completions, and a completion written by a labeler."""

import hashlib
import json
import time
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Header, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from feedback.records import (
    MAX_CANDIDATES,
    Candidate,
    Comparison,
    Demonstration,
    Prompt,
    StoredCompletion,
    new_id,
    ranking_problem,
)
from serve.auth import PrincipalDep
from serve.errors import InvalidRequest, NotFound
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1/feedback")

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=255)]
Labeler = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(max_length=100_000)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CandidateRef(_Body):
    """One choice of a completion this server served."""

    completion_id: str = Field(max_length=128)
    index: int = Field(0, ge=0)


class _PromptBody(_Body):
    prompt: Text | None = None
    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=256)] | None = None

    def asked(self) -> Prompt | None:
        """The prompt of the body, if it has one."""
        if self.messages is not None:
            return Prompt(messages=tuple(self.messages))
        return Prompt(text=self.prompt) if self.prompt is not None else None


class ComparisonBody(_PromptBody):
    """A ranking of K candidates; which K is said in exactly one of four ways."""

    completion_id: str | None = Field(None, max_length=128)
    candidates: Annotated[list[CandidateRef], Field(min_length=2, max_length=MAX_CANDIDATES)] | None = None
    task_id: str | None = Field(None, max_length=128)
    completions: Annotated[list[Text], Field(min_length=2, max_length=MAX_CANDIDATES)] | None = None
    ranking: Annotated[list[list[int]], Field(max_length=MAX_CANDIDATES)] | None = None
    preferred: int | Literal["tie", "both_bad"] | None = None
    labeler: Labeler | None = None
    comment: Annotated[str, Field(max_length=4000)] | None = None
    duration_ms: int | None = Field(None, ge=0)
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [self.completion_id, self.candidates, self.task_id, self.completions]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("name the candidates by exactly one of completion_id, candidates, task_id, completions")
        if (self.prompt is None) == (self.messages is None) and self.completions is not None:
            raise ValueError("outside data needs exactly one of prompt and messages")
        if self.completions is None and (self.prompt is not None or self.messages is not None):
            raise ValueError("prompt and messages go with completions only")
        if (self.ranking is None) == (self.preferred is None):
            raise ValueError("give exactly one of ranking and preferred")
        return self

    def ranked(self, count: int) -> tuple[tuple[int, ...], ...]:
        """The ranking of ``count`` candidates. Raises InvalidRequest with what is wrong with it."""
        if self.ranking is not None:
            ranking = tuple(tuple(group) for group in self.ranking)
            if problem := ranking_problem(ranking, count):
                raise InvalidRequest(problem, "ranking")
            return ranking
        if count != 2:
            raise InvalidRequest(f"preferred judges two candidates, and there are {count}; give a ranking", "preferred")
        if self.preferred in ("tie", "both_bad"):
            return ((0, 1),)
        if self.preferred not in (0, 1):
            raise InvalidRequest('preferred must be 0, 1, "tie" or "both_bad"', "preferred")
        return ((self.preferred,), (1 - self.preferred,))


class DemonstrationBody(_PromptBody):
    """A completion written by a labeler: for a prompt, or as a correction of a sampled choice."""

    completion: Annotated[str, Field(min_length=1, max_length=100_000)]
    completion_id: str | None = Field(None, max_length=128)
    index: int = Field(0, ge=0)
    labeler: Labeler | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if sum(way is not None for way in (self.prompt, self.messages, self.completion_id)) != 1:
            raise ValueError("give exactly one of prompt, messages and completion_id")
        return self


@router.post("/comparisons", status_code=201)
async def create_comparison(
    body: ComparisonBody,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Keep one labeler's ranking. 201 means it is fsynced; the same request again answers 200 with the first."""
    prompt, candidates, source = await _candidates(body, services, principal)
    comparison = Comparison(
        id=new_id("cmp_"),
        created=time.time(),
        principal=principal,
        labeler=body.labeler or principal,
        prompt=prompt,
        metadata=body.metadata,
        source=source,
        task_id=body.task_id,
        candidates=candidates,
        ranking=body.ranked(len(candidates)),
        both_bad=body.preferred == "both_bad",
        comment=body.comment,
        duration_ms=body.duration_ms,
    )
    kept = await _append(comparison, body, idempotency_key, response, services)
    assert isinstance(kept, Comparison)
    return _comparison_object(kept)


@router.get("/comparisons/{comparison_id}")
async def get_comparison(comparison_id: str, services: ServicesDep, principal: PrincipalDep) -> dict[str, Any]:
    """A comparison of this principal's."""
    record = await services.store.record(comparison_id)
    if not isinstance(record, Comparison) or record.principal != principal:
        raise NotFound("there is no such comparison")
    return _comparison_object(record)


@router.post("/demonstrations", status_code=201)
async def create_demonstration(
    body: DemonstrationBody,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Keep a completion that a labeler wrote; with ``completion_id`` it corrects that choice."""
    prompt, corrects = body.asked(), None
    if body.completion_id is not None:
        corrected = await find_completion(body.completion_id, services, principal)
        corrects, prompt = _choice(corrected, body.index)
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
    kept = await _append(demonstration, body, idempotency_key, response, services)
    return {
        "id": kept.id,
        "object": "feedback.demonstration",
        "created": int(kept.created),
        "labeler": kept.labeler,
    }


async def find_completion(completion_id: str, services: Services, principal: str) -> StoredCompletion:
    """A completion of this principal's. Raises NotFound alike for others' and for none."""
    completion = await services.recorder.find(completion_id)
    if completion is None or completion.principal != principal:
        raise NotFound("there is no such completion; it may have expired, or was made with store: false")
    return completion


async def _candidates(
    body: ComparisonBody, services: Services, principal: str
) -> tuple[Prompt, tuple[Candidate, ...], Literal["choices", "candidates", "task", "outside"]]:
    if body.completion_id is not None:
        completion = await find_completion(body.completion_id, services, principal)
        if not 2 <= len(completion.choices) <= MAX_CANDIDATES:
            raise InvalidRequest(f"completion_id must have 2 to {MAX_CANDIDATES} choices to compare", "completion_id")
        picked = [_choice(completion, choice.index) for choice in completion.choices]
        return _one_prompt(picked), tuple(candidate for candidate, _ in picked), "choices"
    if body.candidates is not None:
        if len({(ref.completion_id, ref.index) for ref in body.candidates}) != len(body.candidates):
            raise InvalidRequest("candidates names one choice twice", "candidates")
        found = {
            completion_id: await find_completion(completion_id, services, principal)
            for completion_id in dict.fromkeys(ref.completion_id for ref in body.candidates)
        }
        picked = [_choice(found[ref.completion_id], ref.index) for ref in body.candidates]
        return _one_prompt(picked), tuple(candidate for candidate, _ in picked), "candidates"
    if body.task_id is not None:
        task = await services.store.task(body.task_id)
        if task is None or task.principal != principal:
            raise NotFound("there is no such task; it may have expired")
        if task.labeler is not None and body.labeler not in (None, task.labeler):
            raise InvalidRequest("the task was given to another labeler", "labeler")
        return task.prompt, task.candidates, "task"
    prompt = body.asked()
    assert prompt is not None and body.completions is not None
    return prompt, tuple(Candidate(text=text, index=i) for i, text in enumerate(body.completions)), "outside"


def _choice(completion: StoredCompletion, index: int) -> tuple[Candidate, Prompt]:
    try:
        return completion.candidate(index), completion.prompt_of(index)
    except LookupError as error:
        raise InvalidRequest(str(error), "index") from error


def _one_prompt(picked: list[tuple[Candidate, Prompt]]) -> Prompt:
    first = picked[0][1]
    if not all(prompt.same_question(first) for _, prompt in picked):
        raise InvalidRequest("the candidates must answer one prompt", "candidates")
    return first


async def _append(
    record: Comparison | Demonstration,
    body: _Body,
    idempotency_key: str | None,
    response: Response,
    services: Services,
) -> Comparison | Demonstration:
    canonical = json.dumps(body.model_dump(mode="json"), sort_keys=True)
    body_digest = hashlib.sha256(f"{record.kind}\n{canonical}".encode()).hexdigest()
    appended = await services.store.append(record, idempotency_key=idempotency_key, body_digest=body_digest)
    if appended.replayed:
        response.status_code = 200
        response.headers["Idempotent-Replayed"] = "true"
    else:
        services.metrics.feedback.labels(record.kind).inc()
    return appended.record


def _comparison_object(comparison: Comparison) -> dict[str, Any]:
    return {
        "id": comparison.id,
        "object": "feedback.comparison",
        "created": int(comparison.created),
        "pairs": sum(1 for _ in comparison.pairs()),
        "ranking": [list(group) for group in comparison.ranking],
        "candidates": [
            {"completion_id": c.completion_id, "index": c.index, "policy_version": c.policy_version}
            for c in comparison.candidates
        ],
        "labeler": comparison.labeler,
    }
