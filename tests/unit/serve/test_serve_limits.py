"""Each limit is tested at its boundary and one past it."""

from collections.abc import Callable
from typing import Any

import pytest

from serve.errors import InvalidRequest
from serve.limits import REFUSED_FIELDS, check_completion, prompts_of
from serve.settings import ServeSettings

SETTINGS = ServeSettings(max_model_len=100)


@pytest.mark.parametrize(
    ("field", "at", "past"),
    [
        ("n", 16, 17),
        ("best_of", 1, 2),
        ("max_tokens", 100, 101),
        ("max_completion_tokens", 100, 101),
        ("logprobs", 20, 21),
        ("top_logprobs", 20, 21),
        ("prompt_logprobs", 20, 21),
        ("min_tokens", 100, 101),
        ("n", 16, "17"),
        ("max_tokens", 100, "1"),
        ("bad_words", ["x"] * 16, ["x"] * 17),
        ("bad_words", ["x" * 256], ["x" * 257]),
        ("allowed_token_ids", [1] * 1024, [1] * 1025),
        ("stop_token_ids", [1] * 1024, [1] * 1025),
        ("logprob_token_ids", [1] * 1024, [1] * 1025),
        ("stop", ["x"] * 16, ["x"] * 17),
        ("stop", "x" * 256, "x" * 257),
        ("stop", ["x" * 256], ["x" * 257]),
        ("logit_bias", {str(i): 1 for i in range(1024)}, {str(i): 1 for i in range(1025)}),
        ("metadata", {str(i): "x" for i in range(16)}, {str(i): "x" for i in range(17)}),
        ("metadata", {"k" * 64: "x"}, {"k" * 65: "x"}),
        ("metadata", {"k": "x" * 512}, {"k": "x" * 513}),
    ],
)
def test_a_limit_holds_at_its_boundary(field: str, at: Any, past: Any) -> None:
    check_completion({field: at}, SETTINGS)
    with pytest.raises(InvalidRequest) as refused:
        check_completion({field: past}, SETTINGS)
    assert refused.value.param == field


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_dangerous_fields_are_refused(field: str) -> None:
    check_completion({field: None}, SETTINGS)
    with pytest.raises(InvalidRequest, match=field):
        check_completion({field: "x"}, SETTINGS)


@pytest.mark.parametrize("metadata", [[], "x", {"k": 1}])
def test_metadata_is_an_object_of_strings(metadata: Any) -> None:
    with pytest.raises(InvalidRequest, match="metadata"):
        check_completion({"metadata": metadata}, SETTINGS)


@pytest.mark.parametrize("store", ["abc", 2, {}])
def test_store_is_a_boolean(store: Any) -> None:
    check_completion({"store": None}, SETTINGS)
    with pytest.raises(InvalidRequest, match="store"):
        check_completion({"store": store}, SETTINGS)


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "input_audio"}, {}, "text"])
def test_messages_hold_text_only(part: Any) -> None:
    with pytest.raises(InvalidRequest, match="text parts"):
        check_completion({"messages": [{"role": "user", "content": [part]}]}, SETTINGS)
    check_completion({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, SETTINGS)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        ("", [""]),
        (["one", "two"], ["one", "two"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: Any) -> None:
    assert prompts_of({"prompt": prompt}, SETTINGS) == prompts


@pytest.mark.parametrize("prompt", [None, [], [[]], 7, [1, "x"], ["x", [1]], [True, False], {"text": "x"}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        prompts_of({"prompt": prompt}, SETTINGS)


def test_at_most_32_prompts() -> None:
    assert len(prompts_of({"prompt": ["x"] * 32}, SETTINGS)) == 32
    with pytest.raises(InvalidRequest, match="32"):
        prompts_of({"prompt": ["x"] * 33}, SETTINGS)


def nested(depth: int) -> dict[str, Any]:
    """A schema of objects in objects, ``depth`` schemas deep."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"type": "object", "properties": {"inner": schema}}
    return schema


def sized(bytes_long: int) -> dict[str, Any]:
    """A schema of so many bytes."""
    return {"description": "x" * (bytes_long - len('{"description":""}'))}


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "response_format": lambda s: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}
    },
    "structured_outputs": lambda s: {"structured_outputs": {"json": s}},
    "tools": lambda s: {"tools": [{"type": "function", "function": {"name": "f", "parameters": s}}]},
}


@pytest.mark.parametrize("field", WAYS)
@pytest.mark.parametrize(("at", "past"), [(nested(16), nested(17)), (sized(16 << 10), sized((16 << 10) + 1))])
def test_a_schema_is_bounded_wherever_it_stands(field: str, at: Any, past: Any) -> None:
    check_completion(WAYS[field](at), SETTINGS)
    with pytest.raises(InvalidRequest) as refused:
        check_completion(WAYS[field](past), SETTINGS)
    assert refused.value.param == field


@pytest.mark.parametrize("field", WAYS)
def test_regular_expressions_are_refused_in_schemas_but_not_properties_of_that_name(field: str) -> None:
    check_completion(WAYS[field]({"properties": {"pattern": {"type": "string"}}}), SETTINGS)
    with_patterns: list[Any] = [{"pattern": "a*"}, {"items": {"patternProperties": {}}}, {"anyOf": [{"pattern": "a"}]}]
    for schema in with_patterns:
        with pytest.raises(InvalidRequest, match="pattern"):
            check_completion(WAYS[field](schema), SETTINGS)
        check_completion(WAYS[field](schema), SETTINGS.model_copy(update={"allow_grammars": True}))


@pytest.mark.parametrize(
    "reference",
    ["#", "#/$defs/a", "#/definitions/a", "#/properties/properties", "#/properties/a/items", "#/anyOf/0"],
)
def test_a_reference_to_a_schema_is_served(reference: str) -> None:
    check_completion(WAYS["tools"]({"properties": {"again": {"$ref": reference}}}), SETTINGS)


REGEX = {"type": "string", "pattern": "(a*)*b"}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/properties", "properties": REGEX},  # what xgrammar would read as a schema is a map of properties
        {"$ref": "#/x/$defs", "x": {"$defs": REGEX}},
        {"$ref": "#/%24defs", "$defs": REGEX},
        {"$ref": "#a", "$defs": {"$anchor": "a", **REGEX}},
        {"$dynamicRef": "#/$defs", "$defs": REGEX},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/x/0/0", "x": [[REGEX]]},
    ],
)
def test_no_reference_leads_to_a_regular_expression(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"\$ref|pattern"):
        check_completion(WAYS["structured_outputs"](schema), SETTINGS)
    check_completion(WAYS["structured_outputs"](schema), SETTINGS.model_copy(update={"allow_grammars": True}))


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": "a*"}},
        {"structured_outputs": {"grammar": "root ::= 'a'"}},
        {"structured_outputs": {"structural_tag": "{}"}},
        {"response_format": {"type": "structural_tag"}},
    ],
)
def test_grammars_are_refused_unless_enabled(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not enabled"):
        check_completion(body, SETTINGS)
    check_completion(body, SETTINGS.model_copy(update={"allow_grammars": True}))


def test_a_schema_in_a_string_is_bounded_too() -> None:
    check_completion({"structured_outputs": {"json": "{}"}}, SETTINGS)
    for text in ("{", '{"pattern": "a"}'):
        with pytest.raises(InvalidRequest, match=r"schema|pattern"):
            check_completion({"structured_outputs": {"json": text}}, SETTINGS)
