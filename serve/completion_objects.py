"""A kept completion in the shape OpenAI stores it in, rebuilt from its record."""

from operator import attrgetter
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from feedback.records import Choice, StoredCompletion

ChatFinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
TextFinishReason = Literal["stop", "length", "content_filter"]
CUT_SHORT: TextFinishReason = "length"
"""Shown for what OpenAI has no word for: vLLM's abort, error and repetition. Each ended before the policy did."""


class Usage(BaseModel):
    """Tokens; a prompt counts once, however many completions it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    """What the policy answered; with whatever more was served, such as reasoning."""

    model_config = ConfigDict(extra="allow")

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[dict[str, JsonValue]] | None = None


class ChatChoice(BaseModel):
    """One of a chat completion's ``n`` answers."""

    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
    logprobs: None


class TextChoice(BaseModel):
    """One of a text completion's answers, numbered through its prompts."""

    index: int
    text: str
    finish_reason: TextFinishReason
    logprobs: None


class _KeptCompletion(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    created: int = Field(description="unix seconds")
    model: str = Field(description="the model that was sampled, policy-v7")
    usage: Usage | None
    metadata: dict[str, str]
    input_user: str | None = Field(description="the request's user or safety_identifier")
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None


class ChatCompletion(_KeptCompletion):
    """A stored chat completion, with what is known of how it was sampled."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_KeptCompletion):
    """A stored text completion, with what is known of how it was sampled."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class RequestMessage(BaseModel):
    """One message of the request, with an id of its own; with whatever more it had, such as tool calls."""

    model_config = ConfigDict(extra="allow")

    id: str
    role: str
    content: str | None = Field(description="null where the content came in parts")
    name: str | None
    content_parts: list[dict[str, JsonValue]] | None


def chat_completion(completion: StoredCompletion) -> ChatCompletion:
    """A kept chat completion."""
    choices = [
        _fields_of_choice(choice, get_args(ChatFinishReason)) | {"message": _assistant_message(choice)}
        for choice in sorted(completion.choices, key=attrgetter("index"))
    ]
    return ChatCompletion.model_validate(_fields(completion) | {"choices": choices})


def text_completion(completion: StoredCompletion) -> TextCompletion:
    """A kept text completion."""
    choices = [
        _fields_of_choice(choice, get_args(TextFinishReason)) | {"text": choice.text}
        for choice in sorted(completion.choices, key=attrgetter("index"))
    ]
    return TextCompletion.model_validate(_fields(completion) | {"choices": choices})


def request_message(message_id: str, message: dict[str, JsonValue]) -> RequestMessage:
    """A message of a kept chat completion's prompt."""
    content = message.get("content")
    return RequestMessage.model_validate(
        message
        | {
            "id": message_id,
            "content": content if isinstance(content, str) else None,
            "name": message.get("name"),
            "content_parts": content if isinstance(content, list) else None,
        }
    )


def _fields(completion: StoredCompletion) -> dict[str, Any]:
    return completion.sampling | {
        "id": completion.id,
        "object": completion.object,
        "created": completion.created,
        "model": completion.model,
        "usage": _usage(completion),
        "metadata": completion.metadata,
        "input_user": completion.user,
    }


def _fields_of_choice(choice: Choice, reasons: tuple[str, ...]) -> dict[str, Any]:
    reason = choice.finish_reason if choice.finish_reason in reasons else CUT_SHORT
    return {"index": choice.index, "finish_reason": reason, "logprobs": None}


def _usage(completion: StoredCompletion) -> Usage | None:
    read = [len(prompt.token_ids) for prompt in completion.prompts if prompt.token_ids is not None]
    if len(read) < len(completion.prompts):
        return None
    prompt_tokens, completion_tokens = sum(read), sum(len(choice.token_ids) for choice in completion.choices)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _assistant_message(choice: Choice) -> dict[str, Any]:
    if choice.message is None:
        return {"role": "assistant", "content": choice.text, "refusal": None}
    return {"role": "assistant", "content": None, "refusal": None} | choice.message
