"""The same feedback sent again, with a key and without, one after the other and at once: one record."""

import asyncio
from typing import Any

import httpx2
import pytest
from feedback_routes import COMPARISONS, DEMONSTRATIONS, RATINGS, ROOT, UNDEPRECATED
from redis.asyncio import Redis
from stored_completions_app import kept

from feedback.store import FeedbackStore

pytest_plugins = ["feedback_fixtures"]
pytestmark = UNDEPRECATED

OUTSIDE: dict[str, Any] = {"prompt": "hi", "completions": ["a", "b"], "preferred": 0}


@pytest.mark.parametrize(
    ("path", "body", "other"),
    [
        (RATINGS, {"completion_id": "chatcmpl-1", "overall": 3}, {"completion_id": "chatcmpl-1", "overall": 4}),
        (DEMONSTRATIONS, {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "d"}),
        (COMPARISONS, OUTSIDE, OUTSIDE | {"preferred": 1}),
    ],
)
async def test_idempotency(
    store: FeedbackStore, http: httpx2.AsyncClient, path: str, body: dict[str, Any], other: dict[str, Any]
) -> None:
    await store.keep([kept("chatcmpl-1"), kept("chatcmpl-1", principal="root")])
    keyed = {"idempotency-key": "k" * 255} | ROOT
    first = await http.post(path, json=body, headers=keyed)
    again = await http.post(path, json=body, headers=keyed)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    reused = await http.post(path, json=other, headers=keyed)
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    unkeyed = [await http.post(path, json=other, headers=ROOT) for _ in range(2)]
    assert [answer.status_code for answer in unkeyed] == [201, 200]
    for wrong in ("", "k" * 256):
        refused = await http.post(path, json=body, headers=ROOT | {"idempotency-key": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert len([entry async for entry in store.scan()]) == 2


async def test_one_key_never_serves_two_kinds_of_record(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    keyed = {"idempotency-key": "k"} | ROOT
    assert (await http.post(COMPARISONS, json=OUTSIDE, headers=keyed)).status_code == 201
    demonstration = {"prompt": "hi", "completion": "c"}
    assert (await http.post(DEMONSTRATIONS, json=demonstration, headers=keyed)).status_code == 422


@pytest.mark.parametrize("keyed", [{"idempotency-key": "k"}, {}])
async def test_while_the_first_is_in_flight_the_same_is_told_to_come_back(
    http: httpx2.AsyncClient, redis: Redis, keyed: dict[str, str]
) -> None:
    await redis.client_pause(400, all=False)
    headers = keyed | ROOT
    first = asyncio.create_task(http.post(COMPARISONS, json=OUTSIDE, headers=headers))
    await asyncio.sleep(0.1)
    second = await http.post(COMPARISONS, json=OUTSIDE, headers=headers)
    assert not first.done()
    assert (second.status_code, second.headers["retry-after"]) == (409, "1")
    assert second.json()["error"]["type"] == "invalid_request_error"
    unlike = asyncio.create_task(http.post(COMPARISONS, json=OUTSIDE | {"preferred": 1}, headers=ROOT))
    other = asyncio.create_task(http.post(COMPARISONS, json=OUTSIDE, headers=keyed | {"authorization": "Bearer al"}))
    assert (await first).status_code == 201
    assert (await unlike).status_code in (201, 503)  # 503 where the machine made it wait too long behind the first
    assert (await other).status_code == 403
    third = await http.post(COMPARISONS, json=OUTSIDE, headers=headers)
    assert (third.status_code, third.json()) == (200, (await first).json())


async def test_20_keys_15_times_over_at_once_are_20_records(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    ids: dict[int, set[str]] = {number: set() for number in range(20)}

    async def insist(number: int) -> None:
        body, headers = OUTSIDE | {"labeler": f"L-{number}"}, ROOT | {"idempotency-key": f"key {number}"}
        while (answer := await http.post(COMPARISONS, json=body, headers=headers)).status_code in (409, 503):
            await asyncio.sleep(0.05)
        assert answer.status_code in (200, 201), answer.text
        ids[number].add(answer.json()["id"])

    async with asyncio.TaskGroup() as group:
        for number in [*ids] * 15:
            group.create_task(insist(number))
    assert all(len(found) == 1 for found in ids.values())
    assert len([entry async for entry in store.scan()]) == 20
