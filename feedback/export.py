"""Feedback as JSON lines in the forms that other training tools read.

- ``native``: every record of the log as it is stored, with its stream id.
- ``trl``: preference pairs ``{"prompt", "chosen", "rejected"}`` of TRL's trainers; text prompts in its standard form,
  chats in its conversational form.
- ``openai``: preference pairs ``{"input", "preferred_output", "non_preferred_output"}`` of OpenAI's
  preference fine-tuning.

A pair comes from each two completions that a ranking tells apart, and from a correction over what it corrects.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from feedback.records import Comparison, Demonstration, Prompt
from feedback.store import LogEntry

Row = dict[str, Any]


class Format(StrEnum):
    """A form of export."""

    NATIVE = "native"
    TRL = "trl"
    OPENAI = "openai"


def rows(entry: LogEntry, form: Format) -> Iterator[Row]:
    """The JSON objects that ``entry`` becomes.

    Raises:
        ValueError: the prompt is known by token ids alone, which the pair formats cannot say.
    """
    record = entry.record
    if form is Format.NATIVE:
        yield {"stream_id": entry.stream_id, **record.model_dump(mode="json")}
        return
    if record.prompt.text is None and record.prompt.messages is None:
        raise ValueError(f"{record.id} has a prompt of token ids only, which has no form in {form}")
    pair = _trl if form is Format.TRL else _openai
    for chosen, rejected in _texts(record):
        yield pair(record.prompt, chosen, rejected)


def _texts(record: Comparison | Demonstration) -> Iterator[tuple[str, str]]:
    if isinstance(record, Comparison):
        for chosen, rejected in record.pairs():
            yield record.candidates[chosen].text, record.candidates[rejected].text
    elif record.corrects is not None:
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
