"""What OpenAI's answers do not have is left out of events, and nothing else is touched."""

import json

import pytest

from serve.answer_shape import openai_event


def test_nulls_nobody_asked_for_go_and_all_else_stays() -> None:
    event = 'data: {"choices":[{"delta":{"content":"a"},"logprobs":null,"stop_reason":null,"token_ids":null}]}\n\n'
    assert openai_event(event) == 'data: {"choices":[{"delta":{"content":"a"},"logprobs":null}]}\n\n'


def test_usage_keeps_what_openai_has() -> None:
    usage = '"prompt_tokens_details":{"cached_tokens":4%s}}}\n\n'
    event = 'data: {"usage":{"prompt_tokens":7,' + usage % ',"created_cache_tokens":0,"multimodal_tokens":null'
    assert openai_event(event) == 'data: {"usage":{"prompt_tokens":7,' + usage % ""


@pytest.mark.parametrize(
    "text",
    [',"token_ids":null', '"usage":{,"created_cache_tokens":7', "\\" + ',"stop_reason":null', '","token_ids":null'],
)
def test_what_the_model_says_is_never_touched(text: str) -> None:
    event = "data: " + json.dumps({"choices": [{"text": text}], "usage": None}, separators=(",", ":")) + "\n\n"
    assert openai_event(event) == event
