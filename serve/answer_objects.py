"""What the completion routes answer, for the OpenAPI document: OpenAI's shapes, made by the engine and not here.

Fields of vLLM's own come along where a request asks for them (``return_token_ids``, ``return_prompt_text``,
``prompt_logprobs``), so what they can come with is open.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.completion_objects import ChatFinishReason, TextFinishReason

ToldChatReason = ChatFinishReason | Literal["repetition"]
ToldTextReason = TextFinishReason | Literal["repetition"]
"""Why a choice ended; ``repetition`` where the request has ``repetition_detection``, which is vLLM's."""


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Open):
    """How much of the prompt was computed before."""

    cached_tokens: int | None


class CompletionTokensDetails(_Closed):
    """What the sampled tokens were for."""

    reasoning_tokens: int


class AnswerUsage(_Closed):
    """Tokens; a prompt counts once, however many completions it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class LikelyToken(_Closed):
    """A token and its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int] | None


class SampledToken(LikelyToken):
    """A sampled token, and the likeliest ones at its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Closed):
    """With ``logprobs: true``: each sampled token."""

    content: list[SampledToken] | None


class TextLogprobs(_Closed):
    """With ``logprobs``: each token, in parallel lists; null for the first token of an echoed prompt."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CalledFunction(_Closed):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(_Closed):
    """A call of one of the request's tools."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(_Open):
    """What the policy answered."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | None = None


class ChatAnswerChoice(_Open):
    """One of ``n`` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ToldChatReason


class TextAnswerChoice(_Open):
    """One answer, numbered through the prompts: the n answers of the first, then those of the second."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: ToldTextReason


class _Answer(_Open):
    id: str = Field(description="feedback names the completion by it")
    created: int = Field(description="unix seconds")
    model: str = Field(description="the version that sampled it: policy-v7")
    system_fingerprint: str | None = None


class ChatCompletionAnswer(_Answer):
    """A chat completion, as OpenAI's."""

    object: Literal["chat.completion"]
    choices: list[ChatAnswerChoice]
    usage: AnswerUsage


class TextCompletionAnswer(_Answer):
    """A text completion, as OpenAI's."""

    object: Literal["text_completion"]
    choices: list[TextAnswerChoice]
    usage: AnswerUsage


class FunctionPart(_Closed):
    """More of a called function."""

    name: str | None = None
    arguments: str | None = None


class ToolCallPart(_Closed):
    """More of the tool call ``index``."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPart | None = None


class MessagePart(_Open):
    """What a choice's message goes on with."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallPart] | None = None


class ChatChunkChoice(_Open):
    """More of one choice; with a reason, its end."""

    index: int
    delta: MessagePart
    logprobs: ChatLogprobs | None
    finish_reason: ToldChatReason | None


class TextChunkChoice(_Open):
    """More of one choice; with a reason, its end."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: ToldTextReason | None


class ChatCompletionChunk(_Answer):
    """Part of a streamed chat completion; the last one has no choices and, if asked for, the usage."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: AnswerUsage | None = None


class TextCompletionChunk(_Answer):
    """Part of a streamed text completion; the last one has no choices and, if asked for, the usage."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: AnswerUsage | None = None
