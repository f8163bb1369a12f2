"""Ratings over HTTP: what is kept of them, and what is refused."""

from typing import Any, get_args

import httpx2
import pytest
from feedback_routes import UNDEPRECATED, rate
from stored_completions_app import kept, kept_text

from feedback.records import Rating, RatingFlag
from feedback.store import FeedbackStore

pytest_plugins = ["feedback_fixtures"]
pytestmark = UNDEPRECATED


async def test_a_rating_is_kept_with_what_was_rated(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1")])
    flags = {"hallucination": True, "violent_content": False, "harmful_advice": None}
    answer = await rate(http, overall=5, flags=flags, comment="made up", labeler="L-3")
    assert answer.status_code == 201
    told = answer.json()
    assert (told.pop("id")[:4], told.pop("created") > 0) == ("rat_", True)
    assert told == {
        "object": "feedback.rating",
        "completion_id": "chatcmpl-1",
        "index": 0,
        "policy_version": 1,
        "overall": 5,
        "thumb": None,
        "flags": {"hallucination": True, "violent_content": False},
        "labeler": "L-3",
    }
    record = await store.record(answer.json()["id"])
    assert isinstance(record, Rating)
    assert (record.candidate.text, record.comment, record.principal) == ("text of chatcmpl-1", "made up", "alice")
    assert record.prompt == kept("chatcmpl-1").prompts[0]


async def test_a_thumb_of_one_choice_of_a_text_completion(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept_text("cmpl-1")])
    answer = await rate(http, completion_id="cmpl-1", index=2, thumb="down")
    assert (answer.status_code, answer.json()["thumb"], answer.json()["overall"]) == (201, "down", None)
    record = await store.record(answer.json()["id"])
    assert isinstance(record, Rating)
    assert (record.prompt.text, record.candidate.index, record.labeler) == ("two", 2, "alice")


async def test_a_later_rating_of_a_choice_counts_and_the_first_stays_in_the_log(
    store: FeedbackStore, http: httpx2.AsyncClient
) -> None:
    await store.keep([kept("chatcmpl-1")])
    for overall in (2, 6):
        assert (await rate(http, overall=overall)).status_code == 201
    assert (await rate(http, overall=1, labeler="L-2")).status_code == 201
    records = [entry.record async for entry in store.scan()]
    ratings = [record for record in records if isinstance(record, Rating)]
    assert [rating.overall for rating in ratings] == [2, 6, 1]
    assert await store.in_force(ratings) == [False, True, True]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"overall": 0}, "overall"),
        ({"overall": 8}, "overall"),
        ({"overall": "5"}, "overall"),
        ({"overall": True}, "overall"),
        ({"overall": 2.5}, "overall"),
        ({"overall": 3, "thumb": "up"}, None),
        ({"thumb": "sideways"}, "thumb"),
        ({"thumb": "up", "flags": {"hallucination": True}}, None),
        ({"overall": 3, "flags": {"boring": True}}, "flags.boring"),
        ({"overall": 3, "flags": {"hallucination": "yes"}}, "flags.hallucination"),
        ({"overall": 3, "stars": 5}, "stars"),
        ({"overall": 3, "index": -1}, "index"),
        ({"overall": 3, "index": 1}, "index"),
        ({"overall": 3, "labeler": ""}, "labeler"),
        ({"overall": 3, "comment": "x" * 4001}, "comment"),
    ],
)
async def test_a_malformed_rating_is_refused_with_its_field(
    store: FeedbackStore, http: httpx2.AsyncClient, body: dict[str, Any], param: str | None
) -> None:
    await store.keep([kept("chatcmpl-1")])
    answer = await rate(http, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert await store.head() == "0-0"


async def test_every_flag_of_the_paper_can_be_given(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1")])
    flags = dict.fromkeys(get_args(RatingFlag), True)
    assert len(flags) == 11
    assert (await rate(http, overall=1, flags=flags)).json()["flags"] == flags


async def test_others_completions_and_none_are_rated_alike(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1", principal="bob")])
    others, none = await rate(http, overall=1), await rate(http, overall=1, completion_id="chatcmpl-none")
    assert (others.status_code, others.json()) == (none.status_code, none.json())
    assert others.status_code == 404
