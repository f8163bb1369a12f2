"""How what was asked and what was sampled become one record, on a store that can be away."""

import pytest

from feedback.errors import StoreUnavailable
from feedback.records import Prompt
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.metrics import Metrics
from serve.recording import Asked, Recorder, Sampled, SampledChoice
from serve.settings import ServeSettings


def sampled(request_id: str, *texts: str) -> Sampled:
    choices = [SampledChoice(i, text, [i + 5], [-0.5], "stop") for i, text in enumerate(texts)]
    return Sampled(request_id, [1, 2], choices, temperature=1.0, top_p=1.0)


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
