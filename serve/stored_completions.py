"""Stored completions, as OpenAI's: list, get, change the metadata of, and delete what ``POST`` has kept.

Only the principal that made a completion sees it; for anyone else it does not exist. Every kept completion can be
got, changed and deleted, also one that will expire; the list shows those with ``store: true``.
"""

import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from feedback.completion_store import NotStored
from feedback.errors import StoreUnavailable
from feedback.records import StoredCompletion
from serve.auth import CompletionsPrincipal
from serve.completion_objects import (
    ChatCompletion,
    RequestMessage,
    TextCompletion,
    chat_completion,
    request_message,
    text_completion,
)
from serve.errors import InvalidRequest, NotFound
from serve.feedback_bodies import Pairs
from serve.json_route import JsonRoute
from serve.limits import check_completion
from serve.openapi import errors
from serve.services import Services, ServicesDep

router = APIRouter(prefix="/v1", route_class=JsonRoute)

Kind = Literal["chat.completion", "text_completion"]
_METADATA_FILTER = re.compile(r"metadata\[(.+)\]", re.DOTALL)


class DeletedChatCompletion(BaseModel):
    """Says that a chat completion is deleted."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True


class DeletedTextCompletion(BaseModel):
    """Says that a text completion is deleted."""

    id: str
    object: Literal["text_completion.deleted"] = "text_completion.deleted"
    deleted: Literal[True] = True


Item = TypeVar("Item", ChatCompletion, RequestMessage)


class Page(BaseModel, Generic[Item]):
    """Part of a list; where there is more, it goes on behind ``last_id``."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MetadataChange(BaseModel):
    """The one change that a stored completion takes."""

    model_config = ConfigDict(extra="forbid")

    metadata: Pairs | None = Field(
        description="replaces all pairs; null removes them; as many as in a completion request"
    )


def _metadata_filter(request: Request) -> list[tuple[str, str]]:
    """The pairs of ``metadata[key]=value``, which FastAPI cannot declare. Raises InvalidRequest."""
    pairs = []
    for name, value in request.query_params.multi_items():
        if match := _METADATA_FILTER.fullmatch(name):
            pairs.append((match[1], value))
        elif name not in ("after", "limit", "order", "model"):
            raise InvalidRequest("the list takes after, limit, order, model and metadata[key], and nothing else")
    return pairs


After = Annotated[str | None, Query(max_length=128, description="id of the last one seen; the list goes on behind it")]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query(description="by time")]
MetadataFilter = Annotated[list[tuple[str, str]], Depends(_metadata_filter)]
_METADATA_PARAMETER = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "description": "metadata[key]=value; a completion must have all pairs named",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


@router.get("/chat/completions", response_model_exclude_unset=True, openapi_extra={"parameters": [_METADATA_PARAMETER]})
async def list_chat_completions(
    services: ServicesDep,
    principal: CompletionsPrincipal,
    metadata: MetadataFilter,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    model: Annotated[str | None, Query(description="the model that was sampled, policy-v7")] = None,
) -> Page[ChatCompletion]:
    """This principal's chat completions with ``store: true``, by time.

    An ``after`` that is none of them, or has been deleted, is an error: begin again without it.
    """
    await _write_waiting(services)
    found: list[StoredCompletion] = []
    stored = services.store.stored(
        principal,
        after=after,
        newest_first=order == "desc",
        batch=limit + 1,  # enough where nothing is filtered out
    )
    try:
        async with aclosing(stored) as completions:
            async for completion in completions:
                if completion.object == "chat.completion" and _passes(completion, model, metadata):
                    found.append(completion)
                    if len(found) > limit:  # this one is only to say that there is more
                        break
    except NotStored as error:
        raise InvalidRequest("after is no stored chat completion; it may have been deleted", "after") from error
    return _page([chat_completion(completion) for completion in found], limit)


@router.get("/chat/completions/{completion_id}", response_model_exclude_unset=True, responses=errors(404))
async def get_chat_completion(
    completion_id: str, services: ServicesDep, principal: CompletionsPrincipal
) -> ChatCompletion:
    """A chat completion of this principal's."""
    return chat_completion(await _own(completion_id, "chat.completion", services, principal))


@router.post("/chat/completions/{completion_id}", response_model_exclude_unset=True, responses=errors(404))
async def update_chat_completion(
    completion_id: str, body: MetadataChange, services: ServicesDep, principal: CompletionsPrincipal
) -> ChatCompletion:
    """Replace the metadata of a chat completion of this principal's."""
    check_completion({"metadata": body.metadata}, services.settings)
    await _write_waiting(services)
    await _own(completion_id, "chat.completion", services, principal)
    changed = await services.store.set_metadata(completion_id, body.metadata or {})
    if changed is None:
        raise _not_found()
    return chat_completion(changed)


@router.delete("/chat/completions/{completion_id}", responses=errors(404))
async def delete_chat_completion(
    completion_id: str, services: ServicesDep, principal: CompletionsPrincipal
) -> DeletedChatCompletion:
    """Delete a chat completion of this principal's; feedback on it stays."""
    await _delete(completion_id, "chat.completion", services, principal)
    return DeletedChatCompletion(id=completion_id)


@router.get("/chat/completions/{completion_id}/messages", response_model_exclude_unset=True, responses=errors(404))
async def list_chat_completion_messages(
    completion_id: str,
    services: ServicesDep,
    principal: CompletionsPrincipal,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Page[RequestMessage]:
    """The messages that a chat completion of this principal's was asked with."""
    completion = await _own(completion_id, "chat.completion", services, principal)
    messages = [
        request_message(f"{completion.id}-{place}", message)
        for place, message in enumerate(completion.prompts[0].messages or ())
    ]
    if order == "desc":
        messages.reverse()
    if after is not None:
        places = {message.id: place for place, message in enumerate(messages)}
        if after not in places:
            raise InvalidRequest("after is no message of this chat completion", "after")
        messages = messages[places[after] + 1 :]
    return _page(messages[: limit + 1], limit)


@router.get("/completions/{completion_id}", response_model_exclude_unset=True, responses=errors(404))
async def get_completion(completion_id: str, services: ServicesDep, principal: CompletionsPrincipal) -> TextCompletion:
    """A text completion of this principal's."""
    return text_completion(await _own(completion_id, "text_completion", services, principal))


@router.delete("/completions/{completion_id}", responses=errors(404))
async def delete_completion(
    completion_id: str, services: ServicesDep, principal: CompletionsPrincipal
) -> DeletedTextCompletion:
    """Delete a text completion of this principal's; feedback on it stays."""
    await _delete(completion_id, "text_completion", services, principal)
    return DeletedTextCompletion(id=completion_id)


async def _own(completion_id: str, kind: Kind, services: Services, principal: str) -> StoredCompletion:
    completion = await services.recorder.find(completion_id)
    if completion is None or completion.principal != principal or completion.object != kind:
        raise _not_found()
    return completion


def _not_found() -> NotFound:
    return NotFound("there is no such completion; it may have expired, or been deleted, or made with store: false")


async def _delete(completion_id: str, kind: Kind, services: Services, principal: str) -> None:
    await _write_waiting(services)  # or it would be written again after its deletion
    if not await services.store.delete_completion(await _own(completion_id, kind, services, principal)):
        raise _not_found()


async def _write_waiting(services: Services) -> None:
    if not await services.recorder.flush():
        raise StoreUnavailable("finished completions still wait to be recorded")


def _passes(completion: StoredCompletion, model: str | None, metadata: Sequence[tuple[str, str]]) -> bool:
    return model in (None, completion.model) and all(completion.metadata.get(name) == value for name, value in metadata)


def _page(items: Sequence[Item], limit: int) -> Page[Item]:
    """The first ``limit`` items; whether there are more shows in their number."""
    data = list(items[:limit])
    return Page(
        object="list",
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(items) > limit,
    )
