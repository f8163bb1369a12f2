"""Prompts that ask the same."""

from hypothesis import given
from hypothesis import strategies as st

from train.rounds.distinct import distinct

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=30)


def test_of_equal_prompts_the_newest_stays() -> None:
    assert distinct([(1, 2), (3,), (1, 2), (4,)], 0) == [1, 2, 3]
    assert distinct([(1, 2), (3,), (1, 2), (4,)], 5) == [1, 2, 3]


def test_prompts_that_begin_alike_for_long_are_one() -> None:
    template = tuple(range(10))
    filled = [(*template, 90), (7, 7), (*template, 91, 92), (*template, 93)]
    assert distinct(filled, 10) == [1, 3]
    assert distinct(filled, 11) == [0, 1, 2, 3], "ten tokens in common are no sign then"


def test_a_prefix_that_is_only_part_of_the_prompts_is_no_sign() -> None:
    system_message = tuple(range(10))
    questions = [(*system_message, *range(20 * asked, 20 * asked + 10)) for asked in (1, 2, 3)]
    assert distinct(questions, 10) == [0, 1, 2]


@given(PROMPTS)
def test_equality_alone_keeps_each_prompt_once(prompts: list[tuple[int, ...]]) -> None:
    last = {prompt: place for place, prompt in enumerate(prompts)}
    assert distinct(prompts, 0) == sorted(last.values())


@given(PROMPTS)
def test_a_longer_prefix_to_share_never_removes_more(prompts: list[tuple[int, ...]]) -> None:
    kept = [len(distinct(prompts, length)) for length in (1, 2, 3, 4, 7)]
    assert kept == sorted(kept)
    assert kept[-1] == len(set(prompts))
