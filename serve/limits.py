"""Caps on a completion request, checked before the engine sees it: vLLM itself accepts n = 16 384.

Each cap is a setting. A request at the cap is served; one past it is refused with the field's name.
"""

import re
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json, to_json

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
    "ec_transfer_params",
    "vllm_xargs",
    "logits_processors",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
)
"""Fields that would let a client run a template, fetch a URL or hold the engine; never passed on. Those of
``guided_*`` vLLM no longer knows, and a constraint must not be dropped in silence."""

_GRAMMARS = ("regex", "grammar", "structural_tag")
_NAMED_SCHEMAS = ("properties", "$defs", "definitions", "dependentSchemas")
"""Keywords of JSON schema whose value maps names to schemas; the map itself is no level of nesting."""
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_PLAIN_PATH = re.compile(r"#(?:/[^/%~]+)*")


def check_completion(body: dict[str, Any], settings: ServeSettings) -> None:
    """Refuse what is over a limit.

    Raises:
        InvalidRequest: Names the field and its limit, never its value.
    """
    for field in REFUSED_FIELDS:
        if body.get(field) is not None:
            raise InvalidRequest(f"{field} is not supported", field)
    for field, least, most in (
        ("n", 1, settings.max_n),
        ("best_of", 1, 1),  # vLLM knows it no more, and would drop it in silence
        ("max_tokens", 0, settings.max_model_len),
        ("max_completion_tokens", 0, settings.max_model_len),
        ("min_tokens", 0, settings.max_model_len),
        ("logprobs", 0, settings.max_logprobs),
        ("top_logprobs", 0, settings.max_logprobs),
        ("prompt_logprobs", 0, settings.max_logprobs),
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("top_k", -1, 2**31 - 1),  # past 64 bits it does not reach the engine, and the request fails
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 0.01, 100),  # far beyond, logits are no numbers any more
    ):
        _between(body, field, least, most)
    for field in ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
        _count(field, body.get(field), settings.max_logit_bias)
    stops = body.get("stop")
    if isinstance(stops, str):
        stops = [stops]
    for field, words in (("stop", stops), ("bad_words", body.get("bad_words"))):
        _count(field, words, settings.max_stops)
        if isinstance(words, list) and any(isinstance(w, str) and len(w) > settings.max_stop_chars for w in words):
            raise InvalidRequest(f"each entry of {field} may have at most {settings.max_stop_chars} characters", field)
    _check_constraints(body, settings)
    _check_together(body)
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


def _between(body: dict[str, Any], field: str, least: float, most: float) -> None:
    value = body.get(field)
    if isinstance(value, str):  # vLLM would read it as a number, and past the limit
        raise InvalidRequest(f"{field} must be a number", field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value > most:
            raise InvalidRequest(f"{field} may be at most {most}", field)
        if value < least:
            raise InvalidRequest(f"{field} must be at least {least}", field)


def _count(field: str, value: Any, limit: int) -> None:
    if isinstance(value, list | dict) and len(value) > limit:
        raise InvalidRequest(f"{field} may have at most {limit} entries", field)


def _check_constraints(body: dict[str, Any], settings: ServeSettings) -> None:
    """Bounds what a client can have compiled: JSON schemas by size and depth, and no regular expressions."""
    constraints = body.get("structured_outputs")
    if constraints is not None and not isinstance(constraints, dict):
        raise InvalidRequest("structured_outputs must be an object", "structured_outputs")
    if constraints is not None:
        if not settings.allow_grammars and any(constraints.get(kind) is not None for kind in _GRAMMARS):
            raise InvalidRequest(f"{', '.join(_GRAMMARS)} are not enabled on this server", "structured_outputs")
        _count("structured_outputs", constraints.get("choice"), settings.max_logit_bias)
        _check_schema("structured_outputs", constraints.get("json"), settings)
    response_format = body.get("response_format")
    if isinstance(response_format, dict):
        if response_format.get("type") == "structural_tag" and not settings.allow_grammars:
            raise InvalidRequest("structural_tag is not enabled on this server", "response_format")
        named = response_format.get("json_schema")
        _check_schema("response_format", named.get("schema") if isinstance(named, dict) else None, settings)
    for tool in body["tools"] if isinstance(body.get("tools"), list) else ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest('each of tools must be {"type": "function", "function": {"name": …}}', "tools")
        _check_schema("tools", function.get("parameters"), settings)


def _check_together(body: dict[str, Any]) -> None:
    # Where both leave no token at all, the engine ends the request with an error of its own.
    response_format = body.get("response_format")
    free = response_format is None or response_format == {"type": "text"}
    if not free or body.get("structured_outputs") is not None or body.get("tools") is not None:
        for field in ("allowed_token_ids", "bad_words"):
            if body.get(field):
                raise InvalidRequest(f"{field} does not go with structured outputs or tools", field)
    if any(_beyond_64_bits(value) for field, value in body.items() if field not in ("prompt", "messages")):
        raise InvalidRequest("a field holds an integer of more than 64 bits")


def _beyond_64_bits(value: Any) -> bool:
    pending = [value]  # whatever is nested in what; vLLM encodes it for its engine process
    while pending:
        value = pending.pop()
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            return True
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
    return False


def _check_schema(field: str, schema: Any, settings: ServeSettings) -> None:
    if schema is None:
        return
    text = schema if isinstance(schema, str) else to_json(schema).decode()
    if len(text.encode()) > settings.max_schema_bytes:
        raise InvalidRequest(f"a JSON schema in {field} may have at most {settings.max_schema_bytes} bytes", field)
    try:
        level = _schemas_of([from_json(text)])
    except ValueError as error:
        raise InvalidRequest(f"a JSON schema in {field} is not valid JSON", field) from error
    depth = 0
    while level:
        depth += 1
        if depth > settings.max_schema_depth:
            raise InvalidRequest(f"a JSON schema in {field} may be {settings.max_schema_depth} schemas deep", field)
        if not settings.allow_grammars and any("patternProperties" in at or _is_pattern(at) for at in level):
            raise InvalidRequest(f"pattern and patternProperties in {field} are not enabled on this server", field)
        references = [at[name] for at in level for name in _REFERENCES if isinstance(at.get(name), str)]
        if not settings.allow_grammars and not all(map(_is_schema_path, references)):
            raise InvalidRequest(f"a $ref in {field} must be a plain path to a schema, such as #/$defs/name", field)
        inner = [(name, value) for at in level for name, value in at.items()]
        level = [schema for name, value in inner for schema in _schemas_in(name, value)]


def _is_pattern(schema: dict[str, Any]) -> bool:
    return isinstance(schema.get("pattern"), str)  # a property may have this name; its value is a schema


def _is_schema_path(reference: str) -> bool:
    """False for what may end where no schema was looked for: at a map from names to schemas, or out of the document."""
    in_map = False
    for part in reference.split("/")[1:]:
        in_map = not in_map and part in _NAMED_SCHEMAS
    return _PLAIN_PATH.fullmatch(reference) is not None and not in_map


def _schemas_in(keyword: str, value: Any) -> list[dict[str, Any]]:
    """The schemas directly below a keyword: one, a list of them, or a map from names to them."""
    if keyword in _NAMED_SCHEMAS and isinstance(value, dict):
        return _schemas_of(list(value.values()))
    return _schemas_of([value])


def _schemas_of(values: list[Any]) -> list[dict[str, Any]]:
    """Those among ``values``, in lists within lists too."""
    schemas: list[dict[str, Any]] = []
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            schemas.append(value)
        elif isinstance(value, list):
            waiting += value
    return schemas


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
