from itertools import count
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from feedback.ratings import rated_pairs, ratings_in_force
from feedback.records import Candidate, Prompt, Rating, decode, encode

_NUMBERS = count()


def rating(choice: str, overall: int | None = None, **changes: Any) -> Rating:
    fields: dict[str, Any] = {
        "id": f"rat_{next(_NUMBERS)}",
        "created": 1.0,
        "principal": "alice",
        "labeler": "L-1",
        "prompt": Prompt(text="frog?"),
        "candidate": Candidate(completion_id=choice, text=choice),
        "overall": overall,
    }
    return Rating(**fields | changes)


def thumb(choice: str, way: Literal["up", "down"], **changes: Any) -> Rating:
    return rating(choice, thumb=way, **changes)


def found(*ratings: Rating) -> list[tuple[str, str, int]]:
    return sorted((pair.chosen.text, pair.rejected.text, pair.difference) for pair in rated_pairs(ratings))


def test_completions_rated_differently_by_one_labeler_are_pairs() -> None:
    assert found(rating("a", 3), rating("b", 7), rating("c", 3)) == [("b", "a", 4), ("b", "c", 4)]


def test_thumbs_are_pairs_of_their_own() -> None:
    assert found(thumb("a", "up"), thumb("b", "down"), rating("c", 1)) == [("a", "b", 1)]


@pytest.mark.parametrize("changes", [{"labeler": "L-2"}, {"principal": "bob"}, {"prompt": Prompt(text="toad?")}])
def test_what_different_people_or_prompts_got_is_not_compared(changes: dict[str, Any]) -> None:
    assert found(rating("a", 1), rating("b", 7, **changes)) == []


def test_the_same_prompt_counts_as_such_whatever_else_is_known_of_it() -> None:
    assert found(rating("a", 1), rating("b", 2, prompt=Prompt(text="frog?", token_ids=(1,)))) == [("b", "a", 1)]


def test_a_later_rating_of_the_same_choice_replaces_the_first() -> None:
    ratings = [rating("a", 1), rating("b", 4), rating("a", 6), rating("a", 2, labeler="L-2")]
    assert ratings_in_force(ratings) == ratings[1:]
    assert found(*ratings) == [("a", "b", 2)]
    assert ratings_in_force([thumb("a", "up"), rating("a", 1)])[0].overall == 1


@pytest.mark.parametrize(
    "judgement",
    [
        {},
        {"overall": 4, "thumb": "up"},
        {"overall": 0},
        {"overall": 8},
        {"thumb": "down", "flags": {"hallucination": True}},
    ],
)
def test_a_rating_is_one_judgement_on_the_papers_scale(judgement: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        rating("a", **{"overall": None} | judgement)
    with pytest.raises(ValidationError, match="flags"):
        rating("a", 4, flags={"boring": True})


def test_a_rating_comes_back_as_it_was() -> None:
    said = rating("a", 4, flags={"hallucination": True, "expresses_opinion": False}, comment="hm")
    assert decode(*encode(said)) == said
