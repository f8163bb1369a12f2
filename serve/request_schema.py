"""JSON schemas of the two completion requests, with this server's limits, for the OpenAPI document.

The routes take the raw body: ``limits.py`` checks the caps and vLLM the rest. What is written here is what they take.
"""

from typing import Any

from serve.limits import REFUSED_FIELDS
from serve.settings import ServeSettings

Schema = dict[str, Any]

_FLAG: Schema = {"type": ["boolean", "null"]}
_TEXT: Schema = {"type": "string", "minLength": 1}
_TOKEN: Schema = {"type": "integer", "minimum": 0}
_NOT_SUPPORTED: Schema = {"type": "null", "description": "not supported"}


def chat_request(settings: ServeSettings) -> Schema:
    """Of ``POST /v1/chat/completions``."""
    most = {"minimum": 1, "maximum": settings.max_model_len}
    tool = {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": _function(settings)},
    }
    properties = {
        "messages": {"type": "array", "minItems": 1, "items": _message(), "description": "text only"},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": settings.max_n, "default": 1},
        "max_completion_tokens": {"type": ["integer", "null"], **most, "description": "default: what the window holds"},
        "max_tokens": {"type": ["integer", "null"], **most, "deprecated": True},
        "logprobs": _FLAG,
        "top_logprobs": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": settings.max_logprobs,
            "description": "needs logprobs: true",
        },
        "tools": {"type": "array", "minItems": 1, "items": tool},
        "tool_choice": {
            "description": "auto, the default with tools, only where the server can parse the policy's tool calls",
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "required": ["type", "function"],
                    "properties": {
                        "type": {"const": "function"},
                        "function": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
                    },
                },
            ],
        },
        "parallel_tool_calls": _FLAG,
    }
    return _request("messages", properties, settings)


def text_request(settings: ServeSettings) -> Schema:
    """Of ``POST /v1/completions``."""
    many = {"type": "array", "minItems": 1, "maxItems": settings.max_prompts}
    token_ids = {"type": "array", "minItems": 1, "items": _TOKEN}
    properties = {
        "prompt": {
            "description": "text or token ids, one or many",
            "anyOf": [_TEXT, many | {"items": _TEXT}, token_ids, many | {"items": token_ids}],
        },
        "n": {"type": "integer", "minimum": 1, "maximum": settings.max_n, "default": 1},
        "max_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": settings.max_model_len, "default": 16},
        "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": settings.max_logprobs},
        "echo": _FLAG | {"description": "begin each text with its prompt; max_tokens may then be 0"},
        "suffix": _NOT_SUPPORTED,
        "best_of": {"enum": [1, None], "description": "more is not supported"},
    }
    return _request("prompt", properties, settings)


def _request(asked: str, own: Schema, settings: ServeSettings) -> Schema:
    return {
        "type": "object",
        "required": [asked],
        "properties": own | _openais(settings) | _vllms(settings) | _refused(),
    }


def _refused() -> Schema:
    return dict.fromkeys((field for field in REFUSED_FIELDS if field != "use_beam_search"), _NOT_SUPPORTED)


def _openais(settings: ServeSettings) -> Schema:
    """OpenAI's fields that both requests have."""
    penalty = {"type": ["number", "null"], "minimum": -2, "maximum": 2, "default": 0}
    stop = _TEXT | {"maxLength": settings.max_stop_chars}
    name = settings.model_name
    return {
        "model": {
            "type": ["string", "null"],
            "description": f"{name}, the released policy, or {name}-v7, a live version",
            "examples": [name],
        },
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2, "default": 1},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "default": 1},
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1},
        "stop": {"anyOf": [stop, {"type": "array", "maxItems": settings.max_stops, "items": stop}, {"type": "null"}]},
        "logit_bias": {
            "type": ["object", "null"],
            "description": "by token id",
            "maxProperties": settings.max_logit_bias,
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "stream": _FLAG | {"description": "answer with server-sent events"},
        "stream_options": {
            "type": ["object", "null"],
            "description": "needs stream: true",
            "properties": {"include_usage": _FLAG, "continuous_usage_stats": _FLAG},
        },
        "response_format": {"anyOf": [{"type": "null"}, *_formats(settings)]},
        "store": _FLAG | {"description": "true: kept until deleted; false: not kept; default: kept for a while"},
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": settings.max_metadata_pairs,
            "propertyNames": {"maxLength": 64},
            "additionalProperties": {"type": "string", "maxLength": 512},
        },
        "user": {"type": ["string", "null"], "description": "stays on one version for the life of a canary"},
        "safety_identifier": {"type": ["string", "null"], "description": "as user, where that is absent"},
    }


def _vllms(settings: ServeSettings) -> Schema:
    """VLLM's fields beyond OpenAI's; those that are not listed here are not promised."""
    tokens = {"type": ["array", "null"], "items": _TOKEN, "maxItems": settings.max_logit_bias}
    words = {"type": "array", "items": _TEXT | {"maxLength": settings.max_stop_chars}, "maxItems": settings.max_stops}
    constraints = [
        {"required": ["json"], "properties": {"json": _json_schema(settings)}},
        {"required": ["choice"], "properties": {"choice": {"type": "array", "minItems": 1, "items": _TEXT}}},
        {"required": ["json_object"], "properties": {"json_object": {"const": True}}},
    ]
    if settings.allow_grammars:
        constraints += [{"required": [kind], "properties": {kind: _TEXT}} for kind in ("regex", "grammar")]
    return {
        "top_k": {"type": ["integer", "null"], "minimum": -1, "maximum": 2**31 - 1},
        "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "repetition_penalty": {"type": ["number", "null"], "minimum": 0.01, "maximum": 100},
        "min_tokens": {"type": "integer", "minimum": 0, "maximum": settings.max_model_len},
        "stop_token_ids": tokens,
        "allowed_token_ids": tokens | {"minItems": 1},
        "bad_words": words,
        "ignore_eos": {"type": "boolean"},
        "skip_special_tokens": {"type": "boolean"},
        "include_stop_str_in_output": {"type": "boolean"},
        "structured_outputs": {
            "description": "exactly one constraint; not with allowed_token_ids or bad_words",
            "anyOf": [{"type": "null"}, *({"type": "object"} | constraint for constraint in constraints)],
        },
        "prompt_logprobs": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": settings.max_logprobs,
            "description": "not with stream: true",
        },
        "return_token_ids": _FLAG,
    }


def _message() -> Schema:
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    }
    content = [{"type": "string"}, {"type": "array", "minItems": 1, "items": part}]
    said = {"content": {"anyOf": content}, "name": {"type": "string"}}
    asked = {
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["developer", "system", "user"]}, **said},
    }
    returned = {
        "required": ["role", "content", "tool_call_id"],
        "properties": {"role": {"const": "tool"}, "tool_call_id": {"type": "string"}, **said},
    }
    called = {
        "type": "object",
        "required": ["id", "type", "function"],
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name", "arguments"],
                "properties": {
                    "name": _TEXT,
                    "arguments": {"type": "string", "contentMediaType": "application/json", "examples": ["{}"]},
                },
            },
        },
    }
    answered = {
        "required": ["role"],
        "properties": {
            "role": {"const": "assistant"},
            **said,
            "content": {"anyOf": [*content, {"type": "null"}]},
            "refusal": {"type": ["string", "null"]},
            "tool_calls": {"type": "array", "minItems": 1, "items": called},
        },
    }
    return {"type": "object", "anyOf": [asked, returned, answered]}


def _function(settings: ServeSettings) -> Schema:
    return {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": _TEXT,
            "description": {"type": ["string", "null"]},
            "parameters": {"anyOf": [_json_schema(settings), {"type": "null"}]},
            "strict": _FLAG,
        },
    }


def _formats(settings: ServeSettings) -> list[Schema]:
    named = {
        "type": "object",
        "required": ["name", "schema"],
        "properties": {
            "name": _TEXT,
            "description": {"type": ["string", "null"]},
            "schema": _json_schema(settings),
            "strict": _FLAG,
        },
    }
    return [
        {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}},
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {"type": {"const": "json_schema"}, "json_schema": named},
        },
    ]


def _json_schema(settings: ServeSettings) -> Schema:
    without = "; no pattern or patternProperties, and a $ref only as a plain path to a schema"
    return {
        "type": "object",
        "description": f"a JSON schema: at most {settings.max_schema_bytes} bytes, {settings.max_schema_depth} schemas "
        f"deep{'' if settings.allow_grammars else without}",
    }
