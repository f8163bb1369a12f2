"""How what was asked and what was sampled become one record, on a store that can be away."""

from dataclasses import replace
from typing import Any

import pytest

from feedback.errors import StoreUnavailable
from feedback.records import Prompt
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.metrics import Metrics
from serve.recording import Asked, Recorder, Sampled, SampledChoice
from serve.settings import ServeSettings


def sampled(request_id: str, *texts: str) -> Sampled:
    choices = {i: SampledChoice(i, text, [i + 5], [-0.5], "stop") for i, text in enumerate(texts)}
    return Sampled(
        request_id,
        {"temperature": 1.0},
        recorded=True,
        finished=True,
        prompt_token_ids=[1, 2],
        completion_tokens=len(texts),
        choices=choices,
    )


def asked(completion_id: str, *prompts: str) -> Asked:
    return Asked(
        completion_id=completion_id,
        object="text_completion",
        principal="local",
        user="ann",
        model="policy-v3",
        policy_version=3,
        tokenizer="digest",
        prompts=tuple(Prompt(text=prompt) for prompt in prompts),
        metadata={"k": "v"},
        store=None,
    )


@pytest.fixture
def recorder() -> Recorder:
    store = FeedbackStore.connect("unix:///nonexistent/redis.sock", FeedbackSettings())
    return Recorder(store, ServeSettings(record_capacity=3), Metrics())


async def test_a_completion_of_one_prompt(recorder: Recorder) -> None:
    recorder.expect(asked("cmpl-a", "hello"))
    recorder.sampled(sampled("cmpl-a-0", "x", "y"))
    kept = await recorder.find("cmpl-a")
    assert kept is not None
    assert [choice.text for choice in kept.choices] == ["x", "y"]
    assert kept.prompts == (Prompt(text="hello", token_ids=(1, 2), tokenizer="digest"),)
    assert (kept.policy_version, kept.user, kept.metadata) == (3, "ann", {"k": "v"})


async def test_choices_of_many_prompts_are_numbered_through_in_the_order_of_the_prompts(recorder: Recorder) -> None:
    recorder.expect(asked("cmpl-a", "one", "two"))
    recorder.sampled(sampled("cmpl-a-1", "c", "d"))  # the second prompt finishes first
    recorder.sampled(sampled("cmpl-a-0", "a", "b"))
    kept = await recorder.find("cmpl-a")
    assert kept is not None
    assert [(c.index, c.prompt_index, c.text) for c in kept.choices] == [
        (0, 0, "a"),
        (1, 0, "b"),
        (2, 1, "c"),
        (3, 1, "d"),
    ]
    assert kept.prompt_of(2).text == "two"


async def test_until_every_prompt_is_finished_nothing_is_recorded(recorder: Recorder) -> None:
    recorder.expect(asked("cmpl-a", "one", "two"))
    recorder.sampled(sampled("cmpl-a-0", "a"))
    recorder.forget("cmpl-a")
    recorder.sampled(sampled("cmpl-a-1", "b"))
    with pytest.raises(StoreUnavailable):  # it is not waiting, so the store is asked
        await recorder.find("cmpl-a")


async def test_tokens_are_counted_whether_recorded_finished_or_neither(recorder: Recorder) -> None:
    ways: list[dict[str, Any]] = [{}, {"recorded": False}, {"finished": False}]
    for changes in ways:
        recorder.expect(asked("cmpl-a", "one"))
        recorder.sampled(replace(sampled("cmpl-a-0", "a", "b"), **changes))
        if changes:
            with pytest.raises(StoreUnavailable):  # it is not waiting, so the store is asked
                await recorder.find("cmpl-a")
        assert recorder.forget("cmpl-a") == 4
        recorder._waiting.clear()


async def test_a_chat_with_tools_is_kept_as_it_was_answered(recorder: Recorder) -> None:
    question = replace(asked("chatcmpl-a", "one"), object="chat.completion", answered={})
    recorder.expect(question)
    recorder.sampled(sampled("chatcmpl-a", '{"a": 1}'))
    with pytest.raises(StoreUnavailable):
        await recorder.find("chatcmpl-a")
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    recorder.served("chatcmpl-a", {0: {"message": message, "finish_reason": "tool_calls"}})
    kept = await recorder.find("chatcmpl-a")
    assert kept is not None
    assert (kept.choices[0].message, kept.choices[0].finish_reason) == (message, "tool_calls")
    assert kept.choices[0].text == '{"a": 1}'


async def test_a_completion_of_two_versions_names_neither_as_a_candidate(recorder: Recorder) -> None:
    recorder.expect(asked("cmpl-a", "one"))
    part = sampled("cmpl-a-0", "ab", "c")
    part.choices[0].version_spans = ((3, 0, 1), (4, 1, 2))
    recorder.sampled(part)
    kept = await recorder.find("cmpl-a")
    assert kept is not None
    assert [kept.candidate(index).policy_version for index in (0, 1)] == [None, 3]


async def test_what_nobody_announced_is_not_recorded(recorder: Recorder) -> None:
    recorder.sampled(sampled("chatcmpl-x", "a"))
    with pytest.raises(StoreUnavailable):
        await recorder.find("chatcmpl-x")


async def test_while_redis_is_away_the_oldest_are_shed_and_counted() -> None:
    metrics = Metrics()
    store = FeedbackStore.connect("unix:///nonexistent/redis.sock", FeedbackSettings())
    recorder = Recorder(store, ServeSettings(record_capacity=3), metrics)
    for number in range(5):
        recorder.expect(asked(f"cmpl-{number}", "hello"))
        recorder.sampled(sampled(f"cmpl-{number}-0", "x"))
    assert await recorder.flush() is False
    assert b"instructloop_unrecorded_total 2.0" in metrics.page()
    assert b"instructloop_recorded_total 0.0" in metrics.page()
    assert await recorder.find("cmpl-4") is not None
