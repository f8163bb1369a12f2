"""Caps on a completion request, checked before the engine sees it: vLLM itself accepts n = 16 384.

Each cap is a setting. A request at the cap is served; one past it is refused with the field's name.
"""

from collections.abc import Callable
from typing import Any

from serve.errors import InvalidRequest
from serve.settings import ServeSettings

REFUSED_FIELDS = (
    "prompt_embeds",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "use_beam_search",
    "media_io_kwargs",
    "kv_transfer_params",
    "vllm_xargs",
)
"""Fields that would let a client run a template, fetch a URL or hold the engine; never passed on."""


def check_completion(body: dict[str, Any], settings: ServeSettings) -> None:
    """Refuse what is over a limit.

    Raises:
        InvalidRequest: Names the field and its limit, never its value.
    """
    for field in REFUSED_FIELDS:
        if body.get(field) is not None:
            raise InvalidRequest(f"{field} is not supported", field)
    _at_most(body, "n", settings.max_n)
    _at_most(body, "best_of", settings.max_n)
    for field in ("max_tokens", "max_completion_tokens"):
        _at_most(body, field, settings.max_model_len)
    _at_most(body, "logprobs", settings.max_logprobs)
    _at_most(body, "top_logprobs", settings.max_logprobs)
    _at_most(body, "prompt_logprobs", settings.max_logprobs)
    stops = body.get("stop")
    if isinstance(stops, str):
        stops = [stops]
    _count(body, "stop", stops, settings.max_stops)
    for stop in stops or ():
        if isinstance(stop, str) and len(stop) > settings.max_stop_chars:
            raise InvalidRequest(f"a stop string may have at most {settings.max_stop_chars} characters", "stop")
    _count(body, "logit_bias", body.get("logit_bias"), settings.max_logit_bias)
    if body.get("store") not in (None, True, False):
        raise InvalidRequest("store must be true, false or null", "store")
    _check_metadata(body, settings)
    _text_parts_only(body)


def prompts_of(body: dict[str, Any], settings: ServeSettings) -> list[str] | list[list[int]]:
    """The prompts of a text completion request: text or token ids, one or many.

    Raises:
        InvalidRequest: The prompt is missing, empty, of mixed kinds, or too many.
    """
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not _all(prompt, _is_token) else [prompt]
    if not prompts or prompt is None or prompt == []:
        raise InvalidRequest("prompt is required: a string, a list of token ids, or a list of either", "prompt")
    if len(prompts) > settings.max_prompts:
        raise InvalidRequest(f"at most {settings.max_prompts} prompts in one request", "prompt")
    texts = [item for item in prompts if isinstance(item, str)]
    token_lists = [item for item in prompts if isinstance(item, list) and item and _all(item, _is_token)]
    if len(texts) == len(prompts):
        return texts
    if len(token_lists) == len(prompts):
        return token_lists
    raise InvalidRequest("prompt must be a string, a list of token ids, or a list of either", "prompt")


def _all(items: list[Any], holds: Callable[[Any], bool]) -> bool:
    return all(holds(item) for item in items)


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _at_most(body: dict[str, Any], field: str, limit: int) -> None:
    value = body.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and value > limit:
        raise InvalidRequest(f"{field} may be at most {limit}", field)


def _count(body: dict[str, Any], field: str, value: Any, limit: int) -> None:
    if isinstance(value, list | dict) and len(value) > limit:
        raise InvalidRequest(f"{field} may have at most {limit} entries", field)


def _check_metadata(body: dict[str, Any], settings: ServeSettings) -> None:
    metadata = body.get("metadata")
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidRequest("metadata must be an object of strings", "metadata")
    if len(metadata) > settings.max_metadata_pairs:
        raise InvalidRequest(f"metadata may have at most {settings.max_metadata_pairs} pairs", "metadata")
    if any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise InvalidRequest("metadata keys may have 64 characters, values 512", "metadata")


def _text_parts_only(body: dict[str, Any]) -> None:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                raise InvalidRequest("message content may hold text parts only", "messages")
