"""What vLLM's answers hold that OpenAI's do not: left out, unless a client asked for it by a field of vLLM's."""

import re
from typing import Any

NOT_OPENAIS: Any = {
    **dict.fromkeys(
        ("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics"),
        True,
    ),
    "service_tier": True,  # always null; OpenAI's text completions do not have it
    "usage": {"prompt_tokens_details": {"created_cache_tokens", "multimodal_tokens"}},
    "choices": {
        "__all__": {
            **dict.fromkeys(
                ("stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs", "routed_experts"), True
            ),
            "message": {"reasoning", "audio", "function_call", "annotations"},
        }
    },
}
"""What to exclude from a whole answer; as pydantic's ``exclude``."""

_NULL_FIELDS = tuple(
    f',"{field}":null' for field in ("token_ids", "prompt_token_ids", "prompt_text", "stop_reason", "prompt_logprobs")
)
_USAGE_FIELDS = re.compile(r',"(?:created_cache_tokens|multimodal_tokens)":\w+')


def openai_event(event: str) -> str:
    """A server-sent event without them. No text of the model's can match: its quotes are escaped."""
    for field in _NULL_FIELDS:
        event = event.replace(field, "")
    return _USAGE_FIELDS.sub("", event) if '"usage":{' in event else event
