"""How an arm runs: what each server counts of a version's traffic, and the sum over the servers."""

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Times that first tokens are held against. Servers of one loop must agree on them."""


class ArmFigures(BaseModel):
    """One version's traffic since the release last changed, on one server or on several."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    requests: int = Field(0, ge=0, description="ended, whatever came of them")
    errors: int = Field(0, ge=0, description="of these, failed by the server (HTTP 5xx)")
    timed: int = Field(0, ge=0, description="prompts whose first token was timed")
    slower: tuple[int, ...] = Field(
        (0,) * len(FIRST_TOKEN_SECONDS), description="of these, later than each of FIRST_TOKEN_SECONDS"
    )
    completions: int = Field(0, ge=0, description="sampled to their end")
    unfinished: int = Field(0, ge=0, description="of these, cut off by their length")
    unrecorded: int = Field(0, ge=0, description="of these, not kept for feedback though they should have been")

    @classmethod
    def total(cls, figures: Iterable[Self]) -> Self:
        """The sum."""
        each = list(figures)
        counted = {name: sum(getattr(one, name) for one in each) for name in cls.model_fields if name != "slower"}
        return cls(slower=tuple(map(sum, zip(cls().slower, *(one.slower for one in each), strict=False))), **counted)
