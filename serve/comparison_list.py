"""For operators: every comparison that was given, page by page."""

from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel
from pydantic_core import to_json

from feedback.records import Comparison
from feedback.store import FeedbackStore
from serve.auth import OperatorPrincipal
from serve.comparisons import ComparisonObject, comparison_object
from serve.errors import InvalidRequest
from serve.services import ServicesDep

BATCH = 200
"""Records read at once: a few milliseconds of the event loop's time."""

router = APIRouter(prefix="/v1/feedback")


class ComparisonPage(BaseModel):
    """Part of the list; where there is more, it goes on behind ``last_id``."""

    object: Literal["list"] = "list"
    data: list[ComparisonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.get("/comparisons")
async def list_comparisons(
    services: ServicesDep,
    principal: OperatorPrincipal,
    after: Annotated[str | None, Query(max_length=128, description="id of the last one seen")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    labeler: Annotated[str | None, Query(min_length=1, max_length=128, description="who judged")] = None,
    policy_version: Annotated[int | None, Query(ge=1, le=2**53, description="of a candidate")] = None,
) -> ComparisonPage:
    """Everybody's comparisons in the order of the log, also those that later ones replaced."""
    place = "0-0"
    if after is not None:
        (found,) = await services.store.places([after])
        if found is None:
            raise InvalidRequest("after is no comparison; it may have been erased", "after")
        place = found
    shown = await _matching(services.store, place, limit + 1, labeler, policy_version)
    data = [comparison_object(comparison) for comparison in shown[:limit]]
    return ComparisonPage(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(shown) > limit,
    )


async def _matching(
    store: FeedbackStore, after: str, count: int, labeler: str | None, policy_version: int | None
) -> list[Comparison]:
    """The next ``count`` comparisons behind a place in the log that pass the filters."""
    # Few records of a long log may pass: the bytes are looked at before a record is decoded.
    marks = [b'"kind":"comparison"']
    marks += [b'"labeler":' + to_json(labeler)] if labeler is not None else []
    marks += [b'"policy_version":%d' % policy_version] if policy_version is not None else []
    matching: list[Comparison] = []
    async with aclosing(store.raw_batches(after, BATCH)) as batches:
        async for batch in batches:
            for entry in batch:
                if not all(mark in entry.body for mark in marks) or (decoded := store.decoded(entry)) is None:
                    continue
                record = decoded.record
                if isinstance(record, Comparison) and _passes(record, labeler, policy_version):
                    matching.append(record)
                    if len(matching) == count:
                        return matching
    return matching


def _passes(comparison: Comparison, labeler: str | None, policy_version: int | None) -> bool:
    versions = {candidate.policy_version for candidate in comparison.candidates}
    return labeler in (None, comparison.labeler) and (policy_version is None or policy_version in versions)
