"""What a comparison's body may say, before any store is asked."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve.errors import InvalidRequest
from serve.feedback_bodies import ComparisonBody, DemonstrationBody

OUTSIDE: dict[str, Any] = {"prompt": "hi", "completions": ["a", "b"]}


@pytest.mark.parametrize(
    ("preferred", "ranking"), [(0, ((0,), (1,))), (1, ((1,), (0,))), ("tie", ((0, 1),)), ("both_bad", ((0, 1),))]
)
def test_preferred_is_a_ranking_of_two(preferred: Any, ranking: Any) -> None:
    assert ComparisonBody(**OUTSIDE, preferred=preferred).ranked(2) == ranking


@pytest.mark.parametrize("preferred", [2, -1])
def test_preferred_names_one_of_the_two(preferred: int) -> None:
    with pytest.raises(InvalidRequest):
        ComparisonBody(**OUTSIDE, preferred=preferred).ranked(2)


def test_preferred_judges_two() -> None:
    with pytest.raises(InvalidRequest, match="there are 3"):
        ComparisonBody(**OUTSIDE, preferred=0).ranked(3)


@pytest.mark.parametrize(
    "body",
    [
        {"preferred": 0},
        {"completion_id": "c", "task_id": "t", "preferred": 0},
        {"completion_id": "c", "prompt": "hi", "preferred": 0},
        {"completions": ["a", "b"], "preferred": 0},
        {"prompt": "hi", "messages": [{"role": "user"}], "completions": ["a", "b"], "preferred": 0},
        {"prompt": "hi", "completions": ["a"], "preferred": 0},
        {"prompt": "hi", "completions": ["a"] * 10, "ranking": [[0]]},
        {"completion_id": "c"},
        {"completion_id": "c", "ranking": [[0], [1]], "preferred": 0},
        {"completion_id": "c", "preferred": 0, "duration_ms": -1},
        {"completion_id": "c", "preferred": 0, "metadata": {"k": "x" * 513}},
        {"completion_id": "c", "preferred": 0, "surprise": 1},
        {"messages": [{"role": "user", "content": "\ud800"}], "completions": ["a", "b"], "preferred": 0},
        {"prompt": "\ud800", "completions": ["a", "b"], "preferred": 0},
        {"completion_id": "c", "preferred": 0, "metadata": {"k": "\ud800"}},
    ],
)
def test_a_body_names_candidates_and_judgement_in_one_way_each(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ComparisonBody(**body)


def test_a_ranking_too_long_for_any_candidates_is_refused_before_it_is_looked_at() -> None:
    with pytest.raises(ValidationError, match="at most 9 items"):
        ComparisonBody(**OUTSIDE, ranking=[[0] * 10])


@pytest.mark.parametrize("metadata", [{"secret" * 11: "v"}, {"k": "secret" * 100}, {"secret\ud800": "v"}])
def test_metadata_at_fault_is_not_repeated(metadata: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as refused:
        ComparisonBody(**OUTSIDE, preferred=0, metadata=metadata)
    (problem,) = refused.value.errors()
    assert problem["loc"] == ("metadata",) and "secret" not in problem["msg"]


@pytest.mark.parametrize(
    "body",
    [
        {"completion": "x"},
        {"prompt": "hi", "completion": ""},
        {"prompt": "hi", "completion_id": "c", "completion": "x"},
        {"prompt": "hi", "messages": [{"role": "user"}], "completion": "x"},
    ],
)
def test_a_demonstration_has_one_prompt_and_a_completion(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DemonstrationBody(**body)
