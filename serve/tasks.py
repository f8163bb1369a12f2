"""Blind tasks: candidates from every live arm in a recorded random order; nothing shown reveals the version.

Where the server picks the prompt it is one of the most informative that this labeler was never given; a share of such
tasks measures the labeler instead (``serve.task_controls``). For those, too, every arm samples as many candidates as
for any task, which nobody sees and nothing keeps: the labeler waits as long and pays as many tokens.
"""

import asyncio
import random
import secrets
import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, JsonValue
from starlette.exceptions import HTTPException

from feedback.records import BlindTask, Candidate, Prompt, new_id
from serve.auth import FeedbackPrincipal
from serve.engine import CHAT, TEXT, Engine
from serve.errors import EngineRefused, InvalidRequest, NotFound, NotServing
from serve.feedback_bodies import TaskBody
from serve.forwarding import cache_salt, completion_id, until_gone
from serve.json_route import JsonRoute
from serve.limits import check_completion
from serve.openapi import errors
from serve.recording import Asked
from serve.services import Services, ServicesDep
from serve.task_controls import draw_control

router = APIRouter(prefix="/v1/feedback", route_class=JsonRoute)

_SHUFFLE = random.SystemRandom()
_PROMPT_TRIES = 5
"""Pooled prompts that the engine refuses, being too long for a completion to fit, before the labeler is told so."""


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
async def create_task(
    body: TaskBody, request: Request, services: ServicesDep, principal: FeedbackPrincipal
) -> TaskObject:
    """Sample k candidates, as evenly as k allows from the live arms, and show them without their versions."""
    if body.prompt is not None and body.messages is not None:
        raise InvalidRequest("give at most one of prompt and messages", "prompt")
    check_completion({"messages": body.messages}, services.settings)
    labeler = body.labeler or principal
    shown = None
    async with until_gone(request.receive):
        shown = await _shown(body, services, principal, labeler)
    if shown is None:
        raise HTTPException(499, "the client has gone")  # nobody reads it; it shows in the log
    prompt, candidates, repeatable = shown
    now = int(time.time())
    task = BlindTask(
        id=new_id("task_"),
        created=now,
        expires=now + services.feedback_settings.task_ttl_seconds,
        principal=principal,
        labeler=body.labeler,
        prompt=prompt,
        candidates=candidates,
    )
    await services.store.keep_task(task)
    if repeatable:
        await services.store.remember_task(labeler, task)
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


async def _shown(
    body: TaskBody, services: Services, principal: str, labeler: str
) -> tuple[Prompt, tuple[Candidate, ...], bool]:
    """Prompt and candidates of a task, and whether it may be repeated later."""
    if (given := body.asked()) is not None:
        shown = await _sampled(given, body.k, services, principal)
        await services.store.give(labeler, given)
        return *shown, False
    if (control := await draw_control(services, principal, labeler, body.k)) is not None:
        try:
            await _sampled(control.prompt, body.k, services, principal, store=False)
        except EngineRefused as error:
            if not _will_never_fit(error):
                raise
        return control.prompt, control.candidates, False
    for _ in range(_PROMPT_TRIES):
        prompt = await _pool_prompt(services, labeler)
        try:
            return *await _sampled(prompt, body.k, services, principal), True
        except BaseException as error:
            if not _will_never_fit(error):
                await services.store.take_back(labeler, prompt)
                raise
            refused = error
    raise refused


def _will_never_fit(error: BaseException) -> bool:
    """Whether the engine refuses a prompt for what it is, rather than for being busy or broken."""
    return isinstance(error, EngineRefused) and error.status < 500


async def _pool_prompt(services: Services, labeler: str) -> Prompt:
    prompt = await services.store.draw_prompt(labeler)
    if prompt is None:
        raise NotFound(
            "this labeler was given every prompt there is: give one with the request, or come back when more were asked"
        )
    return prompt


async def _sampled(
    prompt: Prompt, k: int, services: Services, principal: str, *, store: bool | None = None
) -> tuple[Prompt, tuple[Candidate, ...]]:
    """The prompt as the engines read it, and ``k`` candidates in random order; ``store`` as a completion's."""
    async with services.fleet.arms() as arms:
        _SHUFFLE.shuffle(arms)  # which arm gives the extra candidate of an odd k is drawn, too
        shares = [k // len(arms) + (place < k % len(arms)) for place in range(len(arms))]
        sampled = await asyncio.gather(
            *(_sample(engine, prompt, n, services, principal, store) for engine, n in zip(arms, shares, strict=True))
        )
    candidates = [candidate for _, part in sampled for candidate in part]
    _SHUFFLE.shuffle(candidates)
    return sampled[0][0], tuple(candidates)


async def _sample(
    engine: Engine, prompt: Prompt, n: int, services: Services, principal: str, store: bool | None
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
        store=store,
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
        await engine.complete(route, body, bare_id, cache_salt(principal))
        if store is False:  # nobody sees them, and they may be forgotten already
            return prompt, []
        completion = await services.recorder.find(asked.completion_id)
    finally:
        tokens = services.recorder.forget(asked.completion_id)
        if services.rates.counts_tokens(principal):
            await services.rates.spend(principal, tokens)
    if completion is None:
        raise NotServing("the candidates could not be recorded; try again")
    return completion.prompts[0], [completion.candidate(choice.index) for choice in completion.choices]
