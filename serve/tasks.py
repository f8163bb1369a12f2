"""Blind tasks: candidates from every live arm in a recorded random order; nothing shown reveals the version."""

import asyncio
import random
import secrets
import time
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, JsonValue

from feedback.records import BlindTask, Candidate, Prompt, new_id
from serve.auth import FeedbackPrincipal
from serve.engine import CHAT, TEXT, Engine
from serve.errors import InvalidRequest, NotFound, NotServing
from serve.feedback_bodies import TaskBody
from serve.fleet import hold
from serve.forwarding import completion_id
from serve.openapi import errors
from serve.recording import Asked
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1/feedback")

_SHUFFLE = random.SystemRandom()


class ShownCandidate(BaseModel):
    """What a labeler sees of a candidate."""

    index: int
    text: str


class TaskObject(BaseModel):
    """A prompt with its candidates, to rank by a comparison that names the task."""

    id: str
    object: Literal["feedback.task"]
    created: int = Field(description="unix seconds")
    expires: int = Field(description="unix seconds")
    prompt: str = Field("", description="absent where the prompt is messages")
    messages: list[dict[str, JsonValue]] = Field([], description="absent where the prompt is text")
    candidates: list[ShownCandidate]


@router.post("/tasks", status_code=201, response_model_exclude_unset=True, responses=errors(404))
async def create_task(body: TaskBody, services: ServicesDep, principal: FeedbackPrincipal) -> TaskObject:
    """Sample k candidates, as evenly as k allows from the live arms, and show them without their versions."""
    if body.prompt is not None and body.messages is not None:
        raise InvalidRequest("give at most one of prompt and messages", "prompt")
    prompt = body.asked() or await _pool_prompt(services)
    live = services.fleet.live
    arms = [live[version] for version in services.fleet.serving.live() if version in live]
    if not arms:
        raise NotServing("no policy version is being served yet")
    _SHUFFLE.shuffle(arms)  # which arm gives the extra candidate of an odd k is drawn, too
    shares = [body.k // len(arms) + (place < body.k % len(arms)) for place in range(len(arms))]
    sampled = await asyncio.gather(
        *(_sample(engine, prompt, n, services, principal) for engine, n in zip(arms, shares, strict=True) if n)
    )
    candidates = [candidate for _, part in sampled for candidate in part]
    _SHUFFLE.shuffle(candidates)
    now = int(time.time())
    task = BlindTask(
        id=new_id("task_"),
        created=now,
        expires=now + services.feedback_settings.task_ttl_seconds,
        principal=principal,
        labeler=body.labeler,
        prompt=sampled[0][0],
        candidates=tuple(candidates),
    )
    await services.store.keep_task(task)
    asked = {"messages": list(prompt.messages)} if prompt.messages is not None else {"prompt": prompt.text}
    candidates_shown = [ShownCandidate(index=index, text=c.text) for index, c in enumerate(task.candidates)]
    return TaskObject(
        id=task.id,
        object="feedback.task",
        created=task.created,
        expires=task.expires,
        candidates=candidates_shown,
        **asked,
    )


async def _pool_prompt(services: Services) -> Prompt:
    pooled = [one.prompt for one in await services.store.pool_prompts(100)]
    pool = [prompt for prompt in pooled if prompt.text is not None or prompt.messages]
    if not pool:
        raise NotFound("no prompt has been recorded yet to show to labelers; give one")
    return _SHUFFLE.choice(pool)


async def _sample(
    engine: Engine, prompt: Prompt, n: int, services: Services, principal: str
) -> tuple[Prompt, list[Candidate]]:
    route = CHAT if prompt.messages is not None else TEXT
    bare_id = secrets.token_hex(16)
    asked = Asked(
        completion_id=completion_id(route, bare_id),
        object="chat.completion" if prompt.messages is not None else "text_completion",
        principal=principal,
        user=None,
        model=services.fleet.model_id(engine.version),
        policy_version=engine.version,
        tokenizer=engine.tokenizer,
        prompts=(prompt.model_copy(update={"token_ids": None, "tokenizer": None}),),
        metadata={"purpose": "blind task"},
        store=None,
    )
    settings = services.settings
    body: dict[str, JsonValue] = {
        "model": asked.model,
        "n": n,
        "temperature": settings.task_temperature,
        "max_tokens": settings.task_max_completion_tokens,
    }
    if prompt.messages is not None:
        body["messages"] = list(prompt.messages)
    else:
        body["prompt"] = prompt.text
    services.recorder.expect(asked)
    try:
        with hold(engine):
            await engine.complete(route, body, bare_id)
        completion = await services.recorder.find(asked.completion_id)
    finally:
        tokens = services.recorder.forget(asked.completion_id)
        if services.rates.counts_tokens(principal):
            await services.rates.spend(principal, tokens)
    if completion is None:
        raise NotServing("the candidates could not be recorded; try again")
    return completion.prompts[0], [completion.candidate(choice.index) for choice in completion.choices]
