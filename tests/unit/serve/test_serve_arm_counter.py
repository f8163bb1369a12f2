"""How a server counts what both arms do; the counter is told what the fleet and the engines would tell it."""

import asyncio

import pytest

from deploy.arms import ArmFigures
from serve.errors import EngineRefused, InvalidRequest, NotServing
from serve.guard import MAX_PER_USER, ArmCounter
from serve.recording import Sampled, SampledChoice


def ended(request_id: str, *reasons: str, first_token_seconds: float | None = 0.2) -> Sampled:
    choices = {place: SampledChoice(place, finish_reason=reason) for place, reason in enumerate(reasons)}
    return Sampled(
        request_id, {}, recorded=True, finished=True, choices=choices, first_token_seconds=first_token_seconds
    )


def test_a_request_is_counted_with_what_was_sampled_for_it() -> None:
    arms = ArmCounter()
    with arms.counted(2, "alice", None, "abc"):
        arms.sampled(ended("cmpl-abc-0", "stop", "length"))
        arms.sampled(ended("cmpl-abc-1", "stop", "stop", first_token_seconds=0.5))
    with arms.counted(1, "alice", None, "def"):
        arms.sampled(ended("chatcmpl-def", "length"))
    for lost in ("cmpl-abc", "cmpl-abc", "cmpl-task"):
        arms.lost(lost)
    found = arms.figures()
    # 0.2 s is later than 0.05 and 0.1; 0.5 s is later than 0.05, 0.1 and 0.25, and not than itself.
    assert found[2] == ArmFigures(
        requests=1, timed=2, slower=(2, 2, 1, 0, 0, 0, 0, 0), completions=4, unfinished=1, unrecorded=4
    )
    assert (found[1].requests, found[1].completions, found[1].unfinished) == (1, 1, 1)


def test_what_belongs_to_no_routed_request_is_not_counted() -> None:
    arms = ArmCounter()
    arms.sampled(ended("cmpl-task-0", "length"))  # a blind task's, or one that named its version
    left = ended("cmpl-abc-0", "length")
    left.finished = False
    with arms.counted(1, "alice", None, "abc"):
        arms.sampled(left)
    assert arms.figures() == {1: ArmFigures(requests=1)}


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (NotServing("the engine has ended"), True),
        (EngineRefused(500, "boom"), True),
        (RuntimeError("a bug"), True),
        (EngineRefused(400, "the prompt is too long"), False),
        (EngineRefused(503, "the queue is full"), False),
        (InvalidRequest("no such field"), False),
    ],
)
def test_what_the_client_got_wrong_is_no_error_of_the_version(error: Exception, ours: bool) -> None:
    arms = ArmCounter()
    with pytest.raises(type(error)), arms.counted(2, "alice", None, "abc"):
        raise error
    assert arms.figures()[2] == ArmFigures(requests=1, errors=int(ours))


def test_a_client_who_leaves_is_a_request_and_no_error() -> None:
    arms = ArmCounter()
    with pytest.raises(asyncio.CancelledError), arms.counted(2, "alice", None, "abc"):
        raise asyncio.CancelledError
    assert arms.figures()[2] == ArmFigures(requests=1)


def test_one_user_decides_nothing_alone() -> None:
    arms = ArmCounter()
    for place in range(MAX_PER_USER + 10):
        with arms.counted(2, "alice", "carol", f"a{place}"):
            arms.sampled(ended(f"cmpl-a{place}-0", "length"))
    with arms.counted(2, "alice", "dave", "other"):
        pass
    for place in range(MAX_PER_USER + 10):  # without a user each request is drawn by itself
        with arms.counted(1, "alice", None, f"b{place}"):
            pass
    found = arms.figures()
    assert (found[2].requests, found[2].unfinished) == (MAX_PER_USER + 1, MAX_PER_USER)
    assert found[1].requests == MAX_PER_USER + 10


def test_no_more_is_lost_than_was_counted() -> None:
    arms = ArmCounter()
    for place in range(MAX_PER_USER + 10):
        with arms.counted(2, "alice", "carol", f"a{place}"):
            arms.sampled(ended(f"chatcmpl-a{place}", "stop"))
        arms.lost(f"chatcmpl-a{place}")
    arms.sampled(ended("chatcmpl-pinned", "stop"))
    arms.lost("chatcmpl-pinned")
    found = arms.figures()[2]
    assert found.unrecorded == found.completions == MAX_PER_USER


def test_a_new_release_starts_from_zero() -> None:
    arms = ArmCounter()
    arms.begin(4)
    with arms.counted(1, "alice", "carol", "early"):
        arms.begin(4)
        assert arms.figures() == {}
        arms.begin(5)
        arms.sampled(ended("cmpl-early-0", "stop"))
    arms.lost("cmpl-early")
    assert arms.figures() == {}, "it was asked under the old release"
    with arms.counted(1, "alice", "carol", "late"):
        pass
    assert arms.figures() == {1: ArmFigures(requests=1)}
