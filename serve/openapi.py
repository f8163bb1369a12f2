"""The exact OpenAPI document: every route, every status it can answer, every error body.

FastAPI derives paths, parameters and most bodies from the routes. ``describe`` adds what every route shares, so that
no route can forget it, and the two completion requests, whose bodies the routes take raw. A route says only what is
its own: ``responses=errors(404)``.
"""

import importlib.metadata
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from serve.answer_objects import ChatCompletionAnswer, ChatCompletionChunk, TextCompletionAnswer, TextCompletionChunk
from serve.request_schema import Schema, chat_request, text_request
from serve.settings import ServeSettings

Responses = dict[int | str, dict[str, Any]]

_DESCRIPTION = (
    "Completions by a policy that learns from its users, in the shapes of OpenAI's API, and the door for their "
    "feedback. Every error of every route has the one body `Error`; that includes paths that are not here (404) and "
    "other methods of those that are (405)."
)
_MEANINGS = {
    400: "The request cannot be served as it stands; `param` names the field at fault",
    401: "There is no API key, or none in force",
    403: "The API key lacks the scope; or, on a server that is open to its own machine, the Host is no loopback name",
    404: "There is no such thing, or it is another principal's",
    409: "The release does not allow it; the message has the reasons",
    412: "The release has left that generation",
    413: "The body is over the limit",
    415: "The body is not sent as application/json",
    422: "The idempotency key was used with another body; code `idempotency_key_reuse`",
    428: "If-Match is missing",
    429: "Over the key's rate, or the engine's queue is full",
    500: "The server failed on this request",
    503: "Not now; try again after Retry-After",
}
_WITH_KEY = (401, 403, 429, 503)
_WITH_BODY = (400, 413, 415)

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "string", "pattern": "^[0-9]+$"}
_HEADERS: dict[str, Schema] = {
    "x-request-id": {
        "description": "the request's own, if it is printable ASCII of at most 128 characters, or a new one",
        "required": True,
        "schema": _TEXT | {"minLength": 1, "maxLength": 128},
    },
    "x-policy-version": {"description": "the version that sampled it", "required": True, "schema": _COUNT},
    "Retry-After": {
        "description": "seconds",
        "required": True,
        "schema": {"type": "integer", "minimum": 1, "maximum": 60},
    },
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
    "Idempotent-Replayed": {
        "description": "the request was served before; this is the first answer",
        "required": True,
        "schema": {"const": "true"},
    },
}
_RATES = {
    f"x-ratelimit-{told}-{of}": {"description": f"for keys with a rate of {of} a minute", "schema": schema}
    for of in ("requests", "tokens")
    for told, schema in (("limit", _COUNT), ("remaining", _COUNT), ("reset", _TEXT))
}


class Problem(BaseModel):
    """What was wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field(description="what was wrong and what to do; never the value at fault")
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "rate_limit_error",
        "overloaded_error",
        "server_error",
    ]
    param: str | None = Field(description="the field at fault")
    code: str | None = Field(description="names the problem for programs")


class Error(BaseModel):
    """The body of every error."""

    model_config = ConfigDict(extra="forbid")

    error: Problem


def errors(*statuses: int) -> Responses:
    """What a route documents of its own errors; those of every route with a key or a body come by themselves."""
    return {status: {"model": Error, "description": _MEANINGS[status]} for status in statuses}


def replayed(model: type[BaseModel]) -> Responses:
    """What a route documents whose second request, where it equals the first, answers 200 instead of 201."""
    headers = {"Idempotent-Replayed": _header("Idempotent-Replayed")}
    return {200: {"model": model, "description": "The same request was served before", "headers": headers}}


def describe(app: FastAPI, settings: ServeSettings) -> dict[str, Any]:
    """The document of an app that has all its routes."""
    document: dict[str, Any] = get_openapi(
        title=app.title,
        version=importlib.metadata.version("instructloop"),
        description=_DESCRIPTION,
        routes=app.routes,
    )
    components = document["components"]
    for theirs in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(theirs, None)
    models = (Error, ChatCompletionAnswer, ChatCompletionChunk, TextCompletionAnswer, TextCompletionChunk)
    _, definitions = models_json_schema([(model, "serialization") for model in models], ref_template=_ref("{model}"))
    components["schemas"] |= definitions["$defs"]
    components["headers"] = _HEADERS | _RATES
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            for method in route.methods:
                _complete(document["paths"][route.path_format][method.lower()], route.name)
    paths = document["paths"]
    _complete_completions(
        paths["/v1/chat/completions"]["post"], chat_request(settings), ChatCompletionAnswer, ChatCompletionChunk
    )
    _complete_completions(
        paths["/v1/completions"]["post"], text_request(settings), TextCompletionAnswer, TextCompletionChunk
    )
    return document


def _complete(operation: dict[str, Any], name: str) -> None:
    """Add what an operation shares with others: their errors, and the headers of its answers."""
    operation["operationId"] = name
    responses: dict[str, Any] = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):  # FastAPI's; ours answer 400
        del responses["422"]
    checked = any(parameter["in"] != "path" for parameter in operation.get("parameters", ()))
    keyed, embodied = "security" in operation, "requestBody" in operation
    shared = [500, *(_WITH_KEY if keyed else ()), *(_WITH_BODY if embodied else ()), *([400] if checked else [])]
    for status in shared:
        content = {"application/json": {"schema": {"$ref": _ref("Error")}}}
        responses.setdefault(str(status), {"description": _MEANINGS[status], "content": content})
    for status, response in responses.items():
        if int(status) >= 400 and "application/json" not in response["content"]:  # of a route that answers otherwise
            response["content"] = {"application/json": {"schema": {"$ref": _ref("Error")}}}
        names = ["x-request-id"]
        names += ["WWW-Authenticate"] if status == "401" else list(_RATES) if keyed else []
        names += ["Retry-After"] if status in ("429", "503") else []
        response["headers"] = response.get("headers", {}) | {name: _header(name) for name in names}
    operation["responses"] = dict(sorted(responses.items()))


def _complete_completions(
    operation: dict[str, Any], request: Schema, answer: type[BaseModel], chunk: type[BaseModel]
) -> None:
    """Add the body that a completion route takes raw, and both ways of answering it."""
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": request}}}
    told = {"anyOf": [{"$ref": _ref(chunk.__name__)}, {"$ref": _ref("Error")}]}
    data = {"anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": told}]}
    event = {
        "type": "object",
        "description": "One server-sent event; with `stream: true`. The last data is `[DONE]`, or an error.",
        "required": ["data"],
        "properties": {"data": {"type": "string"} | data},
    }
    answered = operation["responses"]["200"]
    answered["description"] = "The completion, whole or as it is sampled"
    answered["headers"]["x-policy-version"] = _header("x-policy-version")
    answered["content"] = {
        "application/json": {"schema": {"$ref": _ref(answer.__name__)}},
        "text/event-stream": {"schema": event},
    }


def _ref(schema: str) -> str:
    return f"#/components/schemas/{schema}"


def _header(name: str) -> Schema:
    return {"$ref": f"#/components/headers/{name}"}
