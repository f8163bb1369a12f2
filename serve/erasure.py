"""For operators: erasing what a principal was served and has said."""

import logging
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from feedback.erasure import erase
from feedback.errors import StoreUnavailable
from feedback.removal import ErasureUnderWay
from serve.appending import conflict
from serve.auth import OperatorPrincipal
from serve.openapi import Error, Responses, errors
from serve.services import ServicesDep

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/feedback")

_UNDER_WAY: Responses = {
    409: {
        "model": Error,
        "description": "Another erasure is under way",
        "headers": {"Retry-After": {"$ref": "#/components/headers/Retry-After"}},
    }
}


class ErasureObject(BaseModel):
    """What was erased; all zero where there was nothing."""

    id: str | None = Field(description="of the erasure in the log; null where there was nothing to erase")
    object: Literal["feedback.erasure"] = "feedback.erasure"
    principal: str
    records: int = Field(description="feedback taken out of the log")
    completions: int
    tasks: int
    archived: int = Field(description="records taken out of the archive")
    unreadable: int = Field(description="damaged records that nobody can tell the owner of; they stay, unused")


@router.delete("/principals/{principal_name}", responses=errors(400) | _UNDER_WAY)
async def erase_principal(
    principal_name: Annotated[str, PathParameter(min_length=1, max_length=64)],
    request: Request,
    services: ServicesDep,
    principal: OperatorPrincipal,
) -> ErasureObject:
    """Erase a principal's completions and feedback, from Redis's files and the archive, too; revoke its keys first.

    Answers when all is gone, which on a long log takes minutes. Where it does not answer, ask again: it goes on.
    """
    archive: Path = request.app.state.archive
    if not await services.recorder.flush():
        raise StoreUnavailable("finished completions still wait to be recorded")
    try:
        done = await erase(services.store, principal_name, archive, by=principal)
    except ErasureUnderWay as error:
        raise conflict(request, str(error)) from error
    except StoreUnavailable as error:
        log.warning("an erasure is unfinished", extra={"why": str(error)})
        raise HTTPException(503, "the erasure is not finished; ask for it again, and it goes on") from error
    return ErasureObject(
        id=done.erasure_id,
        principal=principal_name,
        records=done.records,
        completions=done.completions,
        tasks=done.tasks,
        archived=done.archived,
        unreadable=done.unreadable,
    )
