"""Puts a feedback record into the log, once, and says in the answer whether it was there already."""

import hashlib
import json
from typing import Annotated, TypeVar

from fastapi import Header, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from feedback.records import Comparison, Demonstration, Rating
from feedback.store import AppendInFlight
from serve.feedback_bodies import FeedbackBody
from serve.openapi import Error, Responses, errors, replayed
from serve.services import Services

RETRY_SECONDS = 1
"""What a client is told to wait while the first of its equal requests is being served."""

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
Record = TypeVar("Record", Comparison, Demonstration, Rating)


def appended(model: type[BaseModel]) -> Responses:
    """What a route documents that ends in ``append`` and answers with ``model``."""
    in_flight = {
        "model": Error,
        "description": "The first of equal requests is still being served",
        "headers": {"Retry-After": {"$ref": "#/components/headers/Retry-After"}},
    }
    return replayed(model) | errors(404, 422) | {409: in_flight}


async def append(
    record: Record,
    body: FeedbackBody,
    idempotency_key: str | None,
    request: Request,
    response: Response,
    services: Services,
) -> Record:
    """Append what a client has posted; the same posted again gets the first record, and status 200.

    Raises:
        HTTPException: 409, the same is being appended right now.
        IdempotencyKeyReuse: the key was used with another body.
        StoreUnavailable: nothing was acknowledged.
    """
    canonical = json.dumps(body.model_dump(mode="json"), sort_keys=True)
    body_digest = hashlib.sha256(f"{record.kind}\n{canonical}".encode()).hexdigest()
    try:
        done = await services.store.append(
            record, idempotency_key=idempotency_key, body_digest=body_digest, refuse_in_flight=True
        )
    except AppendInFlight as error:
        raise conflict(request, str(error)) from error
    if done.replayed:
        response.status_code = 200
        response.headers["Idempotent-Replayed"] = "true"
    else:
        services.metrics.feedback.labels(record.kind).inc()
    assert isinstance(done.record, type(record))  # the digest of the body holds its kind
    return done.record


def conflict(request: Request, message: str) -> HTTPException:
    """A 409 that tells the client to try again after ``RETRY_SECONDS``."""
    told = request.scope.get("instructloop.headers", ())
    request.scope["instructloop.headers"] = [*told, (b"retry-after", str(RETRY_SECONDS).encode())]
    return HTTPException(409, message)
