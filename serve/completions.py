"""``POST /v1/completions`` and ``/v1/chat/completions``, and the models they can name."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from feedback.records import Prompt
from serve.auth import CompletionsPrincipal
from serve.errors import InvalidRequest, ModelNotFound
from serve.forwarding import EngineAnswer, completion_id
from serve.limits import check_completion, prompts_of
from serve.recording import Asked
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1")

_OURS = ("store", "metadata", "user", "safety_identifier", "request_id")
"""Fields the server acts on itself (or, for request_id, chooses itself); the engine does not get them."""


@router.get("/models")
async def list_models(services: ServicesDep) -> dict[str, Any]:
    """The released policy and each live version."""
    return {"object": "list", "data": list(_models(services).values())}


@router.get("/models/{model_id}")
async def get_model(model_id: str, services: ServicesDep) -> dict[str, Any]:
    """One of them."""
    models = _models(services)
    if model_id not in models:
        raise ModelNotFound(f"that model is not live; live are: {', '.join(models)}")
    return models[model_id]


def _models(services: Services) -> dict[str, dict[str, Any]]:
    fleet, released = services.fleet, services.settings.model_name
    named = {released: fleet.serving.stable} if fleet.serving.stable in fleet.live else {}
    named |= {fleet.model_id(version): version for version in fleet.roles()}
    return {
        model_id: {
            "id": model_id,
            "object": "model",
            "created": int(fleet.live[version].created),
            "owned_by": "instructloop",
            "policy_version": version,
            "release_role": fleet.roles()[version],
        }
        for model_id, version in named.items()
    }


@router.post("/chat/completions", operation_id="create_chat_completion")
async def create_chat_completion(request: Request, services: ServicesDep, principal: CompletionsPrincipal) -> Response:
    """A chat completion by the released policy, as OpenAI's; streamed with ``stream: true``."""
    body = await _json_object(request)
    check_completion(body, services.settings)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InvalidRequest("messages is required: a list of message objects", "messages")
    prompts = (Prompt(messages=tuple(messages)),)
    return _forward(request, services, principal, body, prompts)


@router.post("/completions", operation_id="create_completion")
async def create_completion(request: Request, services: ServicesDep, principal: CompletionsPrincipal) -> Response:
    """A text completion by the released policy, as OpenAI's; prompts are text or token ids, one or many."""
    body = await _json_object(request)
    check_completion(body, services.settings)
    prompts = tuple(
        Prompt(text=prompt) if isinstance(prompt, str) else Prompt(token_ids=tuple(prompt))
        for prompt in prompts_of(body, services.settings)
    )
    return _forward(request, services, principal, body, prompts)


def _forward(
    request: Request, services: Services, principal: str, body: dict[str, Any], prompts: tuple[Prompt, ...]
) -> Response:
    bare_id = secrets.token_hex(16)
    user = body.get("user", body.get("safety_identifier"))
    engine = services.fleet.pick(_model_of(body), principal, user if isinstance(user, str) else None, bare_id)
    model_id = services.fleet.model_id(engine.version)
    if body.get("store") is not False:
        services.recorder.expect(
            Asked(
                completion_id=completion_id(request.url.path, bare_id),
                object="chat.completion" if request.url.path.endswith("/chat/completions") else "text_completion",
                principal=principal,
                user=user if isinstance(user, str) else None,
                model=model_id,
                policy_version=engine.version,
                tokenizer=engine.tokenizer,
                prompts=prompts,
                metadata=body.get("metadata") or {},
                store=body.get("store"),
            )
        )
    engine_body = {name: value for name, value in body.items() if name not in _OURS} | {"model": model_id}
    return EngineAnswer(engine, request, engine_body, bare_id, services.recorder)


def _model_of(body: dict[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidRequest("model must be a string", "model")
    return model


async def _json_object(request: Request) -> dict[str, Any]:
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        raise HTTPException(415, "the body must be JSON, sent with content-type: application/json")
    try:
        # Stricter than the standard library: NaN and half a surrogate pair are no JSON, and could not be recorded.
        body = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest("the body is not valid JSON") from error
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body
