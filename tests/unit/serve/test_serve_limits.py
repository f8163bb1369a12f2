"""Each limit is tested at its boundary and one past it."""

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
        ("best_of", 16, 17),
        ("max_tokens", 100, 101),
        ("max_completion_tokens", 100, 101),
        ("logprobs", 20, 21),
        ("top_logprobs", 20, 21),
        ("prompt_logprobs", 20, 21),
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
