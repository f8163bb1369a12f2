"""Preference pairs in the forms that other training tools read, as JSON lines or Parquet.

- ``trl``: ``{"prompt", "chosen", "rejected"}`` of TRL's trainers; text prompts in its standard form, chats in its
  conversational form.
- ``openai``: ``{"input", "preferred_output", "non_preferred_output"}`` of OpenAI's preference fine-tuning.

A pair comes from each two completions that a ranking tells apart, and from a correction over what it corrects.
Ratings make no pairs here (see ``feedback.ratings``). The third form, ``native``, is the records themselves: see
``feedback.log_files``.
"""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from feedback.controls import is_check, is_golden
from feedback.errors import FeedbackError
from feedback.log_files import GROUP_ROWS
from feedback.records import Comparison, Demonstration, LogRecord, Prompt
from feedback.store import LogEntry

Row = dict[str, Any]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCHEMAS = {
    ("trl", "text"): pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")]),
    ("trl", "chat"): pa.schema([(name, _MESSAGES) for name in ("prompt", "chosen", "rejected")]),
    ("openai", "chat"): pa.schema(
        [
            ("input", pa.struct([("messages", _MESSAGES)])),
            ("preferred_output", _MESSAGES),
            ("non_preferred_output", _MESSAGES),
        ]
    ),
}


class Format(StrEnum):
    """A form of export."""

    NATIVE = "native"
    TRL = "trl"
    OPENAI = "openai"


class UnsayablePrompt(FeedbackError):
    """A record's prompt is known by token ids alone, which the pair forms cannot say."""


class NotForParquet(FeedbackError):
    """The pairs do not fit one Parquet file; JSON lines can say them."""


class PairFile(Protocol):
    """Takes pairs one at a time."""

    def add(self, row: Row) -> None:
        """Write a pair. Raises NotForParquet where this kind of file cannot hold it."""


class PairLines:
    """Pairs as JSON lines."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, row: Row) -> None:
        """Write a pair."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


class PairParquet:
    """Pairs as Parquet, zstd; a context manager around ``add``. A file holds text prompts or chats, as its first does.

    Args:
        file: where to write.
        form: of the rows.
    """

    def __init__(self, file: Path, form: Format) -> None:
        self._file = file
        self._form = form
        self._kind: str | None = None
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Row) -> None:
        """Write a pair. Raises NotForParquet where the file cannot hold it."""
        kind = "text" if isinstance(row.get("prompt"), str) else "chat"
        if self._kind not in (None, kind):
            raise NotForParquet(
                "the log has both text prompts and chats, and a Parquet file holds one kind; write JSON lines"
            )
        if kind == "chat" and not all(map(_is_plain, row["input"]["messages"] if "input" in row else row["prompt"])):
            raise NotForParquet("a chat has more in it than roles and text, which only JSON lines can say")
        self._kind = kind
        self._rows.append(row)
        if len(self._rows) >= GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        schema = _SCHEMAS[self._form, self._kind or "chat"]
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema))
        self._rows = []


def pairs(entry: LogEntry, form: Format) -> Iterator[Row]:
    """The pairs that ``entry`` becomes in the form ``trl`` or ``openai``.

    Raises:
        UnsayablePrompt: the prompt is known by token ids alone.
    """
    record = entry.record
    if not isinstance(record, Comparison | Demonstration):
        return
    if isinstance(record, Comparison) and (is_golden(record) or is_check(record)):
        return  # these measure labelers
    if record.prompt.text is None and record.prompt.messages is None:
        raise UnsayablePrompt(f"{record.id} has a prompt of token ids only, which has no form in {form}")
    pair = _trl if form is Format.TRL else _openai
    for chosen, rejected in _texts(record):
        yield pair(record.prompt, chosen, rejected)


def _texts(record: LogRecord) -> Iterator[tuple[str, str]]:
    if isinstance(record, Comparison):
        for chosen, rejected in record.pairs():
            yield record.candidates[chosen].text, record.candidates[rejected].text
    elif isinstance(record, Demonstration) and record.corrects is not None:
        yield record.completion, record.corrects.text


def _trl(prompt: Prompt, chosen: str, rejected: str) -> Row:
    if prompt.messages is None:
        return {"prompt": prompt.text, "chosen": chosen, "rejected": rejected}
    return {"prompt": list(prompt.messages), "chosen": _assistant(chosen), "rejected": _assistant(rejected)}


def _openai(prompt: Prompt, chosen: str, rejected: str) -> Row:
    messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else list(prompt.messages)
    return {
        "input": {"messages": messages},
        "preferred_output": _assistant(chosen),
        "non_preferred_output": _assistant(rejected),
    }


def _assistant(content: str) -> list[Row]:
    return [{"role": "assistant", "content": content}]


def _is_plain(message: Row) -> bool:
    return message.keys() == {"role", "content"} and all(isinstance(value, str) for value in message.values())
