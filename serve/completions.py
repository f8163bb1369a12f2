"""``POST /v1/completions`` and ``/v1/chat/completions``, and the models they can name."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.responses import Response

from feedback.records import Prompt
from serve.auth import CompletionsPrincipal
from serve.engine import CHAT, TEXT
from serve.errors import InvalidRequest, ModelNotFound
from serve.fleet import Asker
from serve.forwarding import EngineAnswer
from serve.json_route import require_json
from serve.limits import check_completion, prompts_of
from serve.openapi import errors
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1")

_OURS = ("store", "metadata", "user", "safety_identifier", "request_id", "cache_salt", "priority")
"""Fields the server acts on itself, or chooses itself; the client's do not reach the engine."""

_ERRORS = errors(400, 404, 413, 415)


class Model(BaseModel):
    """What a completion request can name: the released policy, or a live version."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["instructloop"] = "instructloop"
    policy_version: int
    release_role: Literal["stable", "canary", "previous"]


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models")
async def list_models(services: ServicesDep, principal: CompletionsPrincipal) -> ModelList:
    """The released policy and each live version."""
    return ModelList(data=list(_models(services).values()))


@router.get("/models/{model_id}", responses=errors(404))
async def get_model(model_id: str, services: ServicesDep, principal: CompletionsPrincipal) -> Model:
    """One of them."""
    models = _models(services)
    if model_id not in models:
        raise ModelNotFound(f"that model is not live; live are: {', '.join(models)}")
    return models[model_id]


def _models(services: Services) -> dict[str, Model]:
    fleet, released = services.fleet, services.settings.model_name
    named = {released: fleet.serving.stable} if fleet.serving.stable in fleet.live else {}
    named |= {fleet.model_id(version): version for version in fleet.roles()}
    return {
        model_id: Model(
            id=model_id,
            created=int(fleet.live[version].created),
            policy_version=version,
            release_role=fleet.roles()[version],
        )
        for model_id, version in named.items()
    }


@router.post("/chat/completions", responses=_ERRORS)
async def create_chat_completion(request: Request, services: ServicesDep, principal: CompletionsPrincipal) -> Response:
    """A chat completion by the released policy, as OpenAI's; streamed with ``stream: true``."""
    body = await _json_object(request)
    check_completion(body, services.settings)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InvalidRequest("messages is required: a list of message objects", "messages")
    prompts = (Prompt(messages=tuple(messages)),)
    return _answer(CHAT, services, principal, body, prompts)


@router.post("/completions", responses=_ERRORS)
async def create_completion(request: Request, services: ServicesDep, principal: CompletionsPrincipal) -> Response:
    """A text completion by the released policy, as OpenAI's; prompts are text or token ids, one or many."""
    body = await _json_object(request)
    check_completion(body, services.settings)
    prompts = tuple(
        Prompt(text=prompt) if isinstance(prompt, str) else Prompt(token_ids=tuple(prompt))
        for prompt in prompts_of(body, services.settings)
    )
    return _answer(TEXT, services, principal, body, prompts)


def _answer(
    route: str, services: Services, principal: str, body: dict[str, Any], prompts: tuple[Prompt, ...]
) -> Response:
    user = _text_of("user", body)
    asker = Asker(principal, _text_of("safety_identifier", body) if user is None else user, _text_of("model", body))
    asked = {name: value for name, value in body.items() if name not in _OURS}
    return EngineAnswer(
        services, asker, route, asked, prompts, metadata=body.get("metadata") or {}, store=body.get("store")
    )


def _text_of(field: str, body: dict[str, Any]) -> str | None:
    text = body.get(field)
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a string", field)
    return text


async def _json_object(request: Request) -> dict[str, Any]:
    require_json(request)
    try:
        # Stricter than the standard library: NaN and half a surrogate pair are no JSON, and could not be recorded.
        body = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest("the body is not valid JSON") from error
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body
