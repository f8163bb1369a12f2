"""Completions that a version was measured by, kept as JSONL: for win rates over another version, and for its report."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from train.errors import DatasetUnusable


class Completed(BaseModel):
    """One sampled completion of one held-out prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt_ids: tuple[int, ...]
    prompt: str = Field(description="decoded, with special tokens")
    completion: str = Field(description="decoded, without special tokens")
    tokens: int = Field(description="of the completion, EOS included")
    finished: bool = Field(description="whether it ended by itself")
    score: float | None = Field(None, description="by the reward model, where there was one")
    gold: float | None = Field(None, description="by the hidden utility, in the tiny world")


def write(path: Path, completed: Iterable[Completed]) -> None:
    """Write them, one a line."""
    path.write_text("".join(f"{one.model_dump_json()}\n" for one in completed), encoding="utf-8")


def read(path: Path) -> list[Completed]:
    """What ``write`` wrote. Raises DatasetUnusable where the file holds something else."""
    try:
        return [Completed.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValidationError) as error:
        raise DatasetUnusable(f"{path} holds no completions: {error}") from error
