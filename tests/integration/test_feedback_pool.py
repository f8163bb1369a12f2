"""The prompt pool over a real Redis: its order, what a labeler was given, and where golden pairs are found."""

import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from redis import Redis
from stored_completions_app import kept, kept_text

from feedback.erasure import erase
from feedback.pool import DRAWN_FROM, UNSCORED_NATS, unscored
from feedback.records import Comparison, Prompt, StoredCompletion
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

MakeComparison = Callable[..., Comparison]


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings(pool_prompts=50))
    yield store
    await store.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def asked(number: int, text: str | None = None, **changes: Any) -> StoredCompletion:
    return kept(f"c{number}", 1000 + number, prompts=(Prompt(text=text or f"p{number}"),), store=None, **changes)


async def drawn(store: FeedbackStore, labeler: str = "L-1") -> list[str]:
    """All that is left for a labeler, in the order given."""
    found = []
    while (prompt := await store.draw_prompt(labeler)) is not None:
        found.append(prompt.text or "")
    return found


def test_an_unscored_prompt_counts_as_four_to_one_and_newer_ones_more() -> None:
    assert pytest.approx(0.5004, abs=1e-4) == UNSCORED_NATS
    assert UNSCORED_NATS < unscored(1.7e9) < unscored(1.7e9 + 1) < UNSCORED_NATS + 0.01
    assert 0 < UNSCORED_NATS < math.log(2)


async def test_the_least_informative_leave_a_full_pool_first(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([asked(number) for number in range(50)])
    await store.score_prompts({"c7": 0.05, "c3": 0.65, "never there": 0.6})
    await store.keep([asked(50), asked(51)])
    left = redis.zrevrange("pool:prompts", 0, -1)
    assert left == ["c3", *(f"c{n}" for n in range(51, 0, -1) if n not in (3, 7))]


async def test_all_prompts_come_newest_first_whatever_their_place(store: FeedbackStore) -> None:
    await store.keep([asked(number) for number in range(6)])
    await store.score_prompts({"c0": 0.69, "c5": 0.01})
    assert [one.prompt.text for one in await store.pool_prompts(100)] == [f"p{n}" for n in range(5, -1, -1)]
    assert [one.prompt.text for one in await store.pool_prompts(3)] == ["p4", "p3", "p0"], "the most informative"


async def test_a_prompt_asked_twice_is_given_once(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([asked(number, f"p{number % 3}") for number in range(40)])
    assert sorted(await drawn(store)) == ["p0", "p1", "p2"]
    assert await store.draw_prompt("L-1") is None
    seen = redis.smembers(redis.keys("task:seen:*")[0])
    assert {f"c{number}" for number in range(40)} <= seen, "completions without another prompt are not read again"
    assert sorted(await drawn(store, "L-2")) == ["p0", "p1", "p2"]
    for key in redis.keys("task:seen:*"):
        assert 90 * 24 * 3600 - 60 < redis.ttl(key) <= 90 * 24 * 3600
        assert "L-1" not in key and "L-2" not in key


async def test_every_prompt_of_a_request_and_only_readable_ones(store: FeedbackStore) -> None:
    ids_only = kept("ids", prompts=(Prompt(token_ids=(1, 2)),))
    await store.keep([kept_text("both"), ids_only, kept("empty", prompts=(Prompt(text=""),))])
    assert sorted(await drawn(store)) == ["one", "two"]
    assert {one.prompt.token_ids for one in await store.pool_prompts(9)} >= {(1, 2)}, "training reads ids, too"


async def test_expired_and_damaged_completions_leave_the_pool(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([asked(number) for number in range(20)])
    redis.delete(*(f"gen:c{number}" for number in range(5, 20)))
    redis.set("gen:c4", "not zlib")
    assert sorted(await drawn(store)) == ["p0", "p1", "p2", "p3"]
    assert redis.zrevrange("pool:prompts", 0, -1) == ["c3", "c2", "c1", "c0"]


async def test_a_draw_reads_few_completions(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([asked(number) for number in range(50)])
    for _ in range(40):
        await store.draw_prompt("L-1")

    def sent() -> int:
        figures: Any = redis.info("stats")
        return int(figures["total_net_output_bytes"])

    whole = sum(redis.strlen(f"gen:c{number}") for number in range(50))
    before = sent()
    assert await store.draw_prompt("L-1") is not None
    assert sent() - before < whole / 2, "forty that were given are known by their ids"


async def test_who_was_given_what_can_be_undone(store: FeedbackStore) -> None:
    await store.keep([asked(1)])
    prompt = await store.draw_prompt("L-1")
    assert prompt is not None and prompt.asked_by == "alice"
    assert not await store.give("L-1", prompt)
    await store.take_back("L-1", prompt)
    assert await store.draw_prompt("L-1") == prompt


async def test_what_is_to_be_scored_is_half_new_and_half_next(store: FeedbackStore) -> None:
    await store.keep([asked(number) for number in range(30)])
    await store.score_prompts({f"c{number}": 0.6 + number / 1000 for number in range(10)})
    await store.score_prompts({f"c{number}": 0.2 for number in range(10, 15)})
    chosen = await store.prompts_to_score(8)
    assert set(chosen) == {"c29", "c28", "c27", "c26", "c9", "c8", "c7", "c6"}
    assert [prompt.text for prompt in chosen["c29"]] == ["p29"]
    assert len(await store.prompts_to_score(1000)) == 30


async def test_drawn_at_random_from_the_first_few(store: FeedbackStore) -> None:
    await store.keep([asked(number) for number in range(20)])
    expected, first = {f"p{number}" for number in range(20 - DRAWN_FROM, 20)}, set()
    for labeler in range(400):  # with so many, one in 10^22 runs would miss one of the eight
        prompt = await store.draw_prompt(f"L-{labeler}")
        assert prompt is not None
        first.add(prompt.text)
        if labeler > 40 and first == expected:
            break
    assert first == expected


async def test_golden_pairs_are_found_as_the_log_grows(
    store: FeedbackStore, redis: Redis, make_comparison: MakeComparison
) -> None:
    def golden(text: str, **changes: Any) -> Comparison:
        return make_comparison(prompt=Prompt(text=text), metadata={"golden": "true"}, **changes)

    assert await store.golden_ids(2) == []
    first = golden("one")
    for number in range(600):
        await store.append(make_comparison(prompt=Prompt(text=str(number))))
    await store.append(first)
    await store.append(golden("two", source="choices"))
    await store.append(make_comparison(metadata={"golden": "false"}))
    await store.append(make_comparison(comment='"golden":"true"'))
    assert await store.golden_ids(2) == [first.id]
    later = golden("three")
    await store.append(later)
    assert sorted(await store.golden_ids(2)) == sorted([first.id, later.id])
    assert await store.golden_ids(3) == []
    await store.drop_golden(first.id)
    assert await store.golden_ids(2) == [later.id]


async def test_an_erasure_leaves_the_search_where_it_was(
    store: FeedbackStore, make_comparison: MakeComparison, tmp_path: Any
) -> None:
    await store.append(make_comparison(metadata={"golden": "true"}, principal="operator"))
    await store.append(make_comparison(principal="bob"))
    assert len(await store.golden_ids(2)) == 1
    await erase(store, "bob", tmp_path / "archive", by="operator")
    later = make_comparison(metadata={"golden": "true"}, prompt=Prompt(text="later"), principal="operator")
    await store.append(later)
    assert later.id in await store.golden_ids(2)
