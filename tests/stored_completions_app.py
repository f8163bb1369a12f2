"""An app of the stored completions' routes over a real store, and completions to keep in it; no engine."""

from dataclasses import fields
from typing import Any, get_args

from any_key import AnyKey
from fastapi import FastAPI, Request
from pydantic import JsonValue

from feedback.records import Choice, Prompt, StoredCompletion
from feedback.store import FeedbackStore
from serve.auth import CompletionsPrincipal
from serve.error_response import add_error_handlers
from serve.metrics import Metrics
from serve.recording import Asked, Recorder, Sampled, SampledChoice
from serve.settings import ServeSettings

HELLO: dict[str, JsonValue] = {"role": "user", "content": "hello"}


def kept(name: str, created: int = 1000, **changes: Any) -> StoredCompletion:
    choice = Choice(index=0, text=f"text of {name}", token_ids=(3, 4), logprobs=(-0.1, -0.2), finish_reason="stop")
    return StoredCompletion(
        id=name,
        object="chat.completion",
        created=created,
        principal="alice",
        model="policy-v1",
        policy_version=1,
        prompts=(Prompt(messages=(HELLO,), token_ids=(1, 2, 5)),),
        choices=(choice,),
        sampling={"temperature": 0.5, "top_p": 1.0},
        store=True,
    ).model_copy(update=changes)


def kept_text(name: str, **changes: Any) -> StoredCompletion:
    prompts = (Prompt(text="one", token_ids=(1,)), Prompt(text="two", token_ids=(1, 2)))
    choices = tuple(
        Choice(
            index=index,
            prompt_index=index // 2,
            text=str(index),
            token_ids=(3,) * (index + 1),
            logprobs=(-0.1,) * (index + 1),
            finish_reason="length",
        )
        for index in (2, 3, 0, 1)
    )
    return kept(name, object="text_completion", prompts=prompts, choices=choices).model_copy(update=changes)


def app_over(store: FeedbackStore) -> FastAPI:
    """An app of these routes, where the API key is the principal's name."""
    from serve import stored_completions
    from serve.services import Services

    settings, metrics = ServeSettings(), Metrics()
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Services))
    parts |= {"settings": settings, "store": store, "recorder": Recorder(store, settings, metrics), "access": AnyKey()}
    app = FastAPI()
    app.state.services = Services(**parts)
    add_error_handlers(app)
    app.include_router(stored_completions.router)

    def named_by_key(request: Request) -> str:
        return request.headers["authorization"].removeprefix("Bearer ")

    app.dependency_overrides[get_args(CompletionsPrincipal)[1].dependency] = named_by_key
    return app


def finish(recorder: Recorder, completion_id: str) -> None:
    """A request of alice's with ``store: true`` ends, as the engine reports it."""
    recorder.expect(
        Asked(
            completion_id=completion_id,
            object="chat.completion",
            principal="alice",
            user=None,
            model="policy-v1",
            policy_version=1,
            tokenizer="digest",
            prompts=(Prompt(messages=(HELLO,)),),
            metadata={},
            store=True,
        )
    )
    choice = SampledChoice(0, "text", [3], [-0.1], "stop")
    recorder.sampled(
        Sampled(
            completion_id,
            {"temperature": 1.0, "top_p": 1.0},
            recorded=True,
            finished=True,
            prompt_token_ids=[1],
            choices={0: choice},
        )
    )
