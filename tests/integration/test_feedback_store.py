import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from redis import Redis

from feedback.controls import in_force
from feedback.errors import CorruptRecord, IdempotencyKeyReuse
from feedback.records import (
    BlindTask,
    Candidate,
    Choice,
    Comparison,
    Demonstration,
    Prompt,
    StoredCompletion,
    new_id,
)
from feedback.settings import FeedbackSettings, SettingsError
from feedback.store import FeedbackStore

MakeComparison = Callable[..., Comparison]


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings(pool_prompts=5))
    yield store
    await store.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def completion(number: int, *, prompt: str | None = None, store: bool | None = None) -> StoredCompletion:
    return StoredCompletion(
        id=f"cmpl-{number}",
        object="text_completion",
        created=1000 + number,
        principal="alice",
        model="policy-v1",
        policy_version=1,
        prompts=(Prompt(text=prompt or f"prompt {number}", token_ids=(1, number)),),
        choices=(Choice(index=0, text="text", token_ids=(2, 3), logprobs=(-0.1, -0.25), finish_reason="stop"),),
        store=store,
    )


async def stream_ids(store: FeedbackStore) -> list[str]:
    return [entry.stream_id async for entry in store.scan(batch=7)]


async def test_what_a_labeler_judged_is_noted_with_the_record(
    store: FeedbackStore, make_comparison: MakeComparison, redis: Redis
) -> None:
    judged = make_comparison()
    await store.append(judged)
    assert not await store.give(judged.labeler, judged.prompt)  # so no blind task shows it to them
    assert await store.give("somebody else", judged.prompt)
    assert await store.give(judged.labeler, Prompt(text="another"))


async def test_a_record_is_appended_and_found_again(store: FeedbackStore, make_comparison: MakeComparison) -> None:
    assert await store.head() == "0-0"
    comparison = make_comparison(comment="a frog — ünïcode 🐸", metadata={"task": "story"})
    demonstration = Demonstration(
        id=new_id("demo_"),
        created=2.0,
        principal="alice",
        labeler="L-2",
        prompt=Prompt(text="frog"),
        completion="green",
    )
    first = await store.append(comparison)
    second = await store.append(demonstration)
    assert (first.record, first.replayed) == (comparison, False)
    assert [(e.stream_id, e.record) async for e in store.scan()] == [
        (first.stream_id, comparison),
        (second.stream_id, demonstration),
    ]
    assert [e.record async for e in store.scan(after=first.stream_id)] == [demonstration]
    assert await store.head() == second.stream_id
    assert await store.record(comparison.id) == comparison
    assert await store.record("cmp_none") is None


async def test_the_same_key_and_body_answers_with_the_first_record(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison(), idempotency_key="k", body_digest="b")
    again = await store.append(make_comparison(comment="later"), idempotency_key="k", body_digest="b")
    assert again == type(again)(first.record, first.stream_id, replayed=True)
    assert await stream_ids(store) == [first.stream_id]


async def test_the_same_key_with_another_body_is_refused_and_stores_nothing(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison(), idempotency_key="k", body_digest="b")
    with pytest.raises(IdempotencyKeyReuse, match="another body"):
        await store.append(make_comparison(), idempotency_key="k", body_digest="c")
    assert await stream_ids(store) == [first.stream_id]


async def test_keys_are_a_principals_own(store: FeedbackStore, make_comparison: MakeComparison) -> None:
    await store.append(make_comparison(), idempotency_key="k", body_digest="b")
    other = await store.append(make_comparison(principal="bob"), idempotency_key="k", body_digest="c")
    assert not other.replayed


async def test_without_a_key_the_body_serves_and_never_meets_a_key_of_that_name(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison(), body_digest="b")
    assert (await store.append(make_comparison(), body_digest="b")).stream_id == first.stream_id
    assert not (await store.append(make_comparison(), body_digest="c")).replayed
    assert not (await store.append(make_comparison(), idempotency_key="b", body_digest="b")).replayed


async def test_without_a_digest_saying_the_same_again_is_a_replay(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    first = await store.append(make_comparison())
    again = await store.append(make_comparison(created=9.0))
    assert again.replayed
    assert again.record == first.record
    assert not (await store.append(make_comparison(comment="because"))).replayed


async def test_64_callers_at_once_each_get_their_own_answer(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    await store.append(make_comparison(), idempotency_key="taken", body_digest="first")
    sent = [make_comparison(labeler=f"L-{i}") for i in range(640)]

    async def caller(own: list[Comparison]) -> list[str]:
        found = []
        for record in own:
            appended = await store.append(record)
            assert appended.record == record
            found.append(appended.stream_id)
        return found

    async def refused() -> None:
        with pytest.raises(IdempotencyKeyReuse):
            await store.append(make_comparison(), idempotency_key="taken", body_digest="second")

    told = await asyncio.gather(*(caller(sent[i::64]) for i in range(64)), *(refused() for _ in range(8)))
    assert sorted(i for ids in told[:64] for i in ids or []) == sorted((await stream_ids(store))[1:])
    assert all(a < b for ids in told[:64] for a, b in pairwise(ids or []))
    assert {entry.record.id async for entry in store.scan()} > {record.id for record in sent}


async def test_the_same_record_from_64_callers_is_stored_once(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    answers = await asyncio.gather(*(store.append(make_comparison(), body_digest="b") for _ in range(64)))
    assert sum(not answer.replayed for answer in answers) == 1
    assert len({answer.record.id for answer in answers}) == 1
    assert len(await stream_ids(store)) == 1


async def test_a_later_comparison_of_the_same_candidates_replaces_the_first(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    first, other = make_comparison(), make_comparison(labeler="L-2")
    swapped = make_comparison(candidates=tuple(reversed(first.candidates)))
    for record in (first, other):
        await store.append(record)
    assert await store.in_force([first, other]) == [True, True]
    await store.append(swapped)
    assert await store.in_force([first, other, swapped]) == [False, True, True]
    assert len(await stream_ids(store)) == 3
    assert await store.in_force([]) == []


async def test_a_repetition_in_another_task_replaces_nothing(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    ids = tuple(Candidate(completion_id="cmpl-1", index=index, text="t") for index in (0, 1))
    first = make_comparison(source="task", task_id="task_1", candidates=ids)
    repeat = make_comparison(source="task", task_id="task_2", candidates=ids[::-1])
    second_thought = make_comparison(source="task", task_id="task_1", candidates=ids, ranking=((0, 1),))
    named = make_comparison(source="candidates", candidates=ids, comment="by name")
    repeat_again = make_comparison(source="task", task_id="task_2", candidates=ids, comment="again")
    given: list[Comparison] = []
    for record in (first, repeat, second_thought, named, repeat_again):
        await store.append(record)
        given.append(record)
        holds = [one for one, held in zip(given, await store.in_force(given), strict=True) if held]
        assert holds == list(in_force(given).ordinary), "as training takes them"
    assert holds == [named]


async def test_a_golden_answer_stands_whoever_is_said_to_judge_its_candidates(
    store: FeedbackStore, make_comparison: MakeComparison
) -> None:
    golden = make_comparison(labeler="root", metadata={"golden": "true"})
    check = make_comparison(labeler="root", source="task", task_id="task_1", ranking=((1,), (0,)))
    for record in (golden, check):
        await store.append(record)
    assert await store.in_force([golden, check]) == [True, True]
    await store.append(make_comparison(labeler="root"))
    assert await store.in_force([golden]) == [False], "withdrawn"


async def test_completions_are_kept_as_long_as_asked(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([completion(1), completion(2, store=True), completion(3, store=False)])
    assert await store.completion("cmpl-1") == completion(1)
    assert await store.completion("cmpl-2") == completion(2, store=True)
    assert await store.completion("cmpl-3") is None
    assert 7 * 24 * 3600 - 5 <= redis.ttl("gen:cmpl-1") <= 7 * 24 * 3600
    assert redis.ttl("gen:cmpl-2") == -1
    assert redis.zrange("gen:by:alice", 0, -1, withscores=True) == [("cmpl-2", 1002.0)]
    await store.keep([])
    await store.keep([completion(4, store=False)])
    assert redis.zcard("pool:prompts") == 2


async def test_the_prompt_pool_gives_different_prompts_newest_first(store: FeedbackStore, redis: Redis) -> None:
    assert await store.pool_prompts(3) == []
    await store.keep([completion(n) for n in range(1, 5)] + [completion(5, prompt="prompt 4")])
    assert [p.prompt.text for p in await store.pool_prompts(3)] == ["prompt 4", "prompt 3", "prompt 2"]
    assert [p.prompt.text for p in await store.pool_prompts(2)] == ["prompt 4", "prompt 3"]
    await store.keep([completion(6)])
    assert redis.zrange("pool:prompts", 0, -1) == [f"cmpl-{n}" for n in range(2, 7)]
    assert len(await store.pool_prompts(100)) == 4


async def test_expired_and_damaged_completions_leave_the_pool(store: FeedbackStore, redis: Redis) -> None:
    await store.keep([completion(n) for n in range(1, 6)])
    redis.delete("gen:cmpl-5", "gen:cmpl-3")
    redis.set("gen:cmpl-4", "not zlib")
    assert [p.prompt.text for p in await store.pool_prompts(2)] == ["prompt 2", "prompt 1"]
    assert redis.zrange("pool:prompts", 0, -1) == ["cmpl-1", "cmpl-2"]


async def test_a_damaged_completion_is_an_error_of_its_own(store: FeedbackStore, redis: Redis) -> None:
    redis.set("gen:cmpl-1", "not zlib")
    with pytest.raises(CorruptRecord, match="StoredCompletion is damaged"):
        await store.completion("cmpl-1")


async def test_a_task_is_kept_for_its_time(store: FeedbackStore, redis: Redis) -> None:
    task = BlindTask(
        id="task_1",
        created=1,
        expires=2,
        principal="alice",
        prompt=Prompt(text="frog"),
        candidates=(Candidate(text="a", policy_version=1), Candidate(text="b", policy_version=2)),
    )
    await store.keep_task(task)
    assert await store.task("task_1") == task
    assert await store.task("task_2") is None
    await store.give("L-1", task.prompt)
    [seen] = redis.scan_iter("task:seen:*")
    assert await store.task(seen.removeprefix("task:")) is None, "no task, and nothing that tells of labelers"
    assert 24 * 3600 - 5 <= redis.ttl("task:task_1") <= 24 * 3600


async def test_idempotency_is_kept_72_hours_and_records_for_ever(
    store: FeedbackStore, redis: Redis, make_comparison: MakeComparison
) -> None:
    await store.append(make_comparison(), idempotency_key="k")
    by_kind: dict[str, list[int]] = {}
    for key in redis.scan_iter("fb:*"):
        by_kind.setdefault(":".join(key.split(":")[:2]), []).append(redis.ttl(key))
    [left] = by_kind.pop("fb:idem")
    assert 72 * 3600 - 5 <= left <= 72 * 3600
    assert by_kind == {"fb:log": [-1], "fb:id": [-1], "fb:pair": [-1]}


async def test_a_tampered_record_is_quarantined_and_counted_once(
    store: FeedbackStore, redis: Redis, make_comparison: MakeComparison
) -> None:
    good = make_comparison()
    await store.append(good, idempotency_key="good")
    redis.xadd("fb:log", {"kind": "comparison", "id": "cmp_x", "json": good.model_dump_json(), "sha256": "0" * 64})
    place: Any = redis.xadd("fb:log", {"unknown": "entry"})
    redis.set("fb:id:cmp_x", place)
    for _ in range(2):
        assert [entry.record async for entry in store.scan()] == [good]
        assert store.quarantined == 2
    with pytest.raises(CorruptRecord):
        await store.record("cmp_x")
    assert store.quarantined == 2
    assert redis.xlen("fb:log") == 3


async def test_an_address_that_cannot_be_one_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="redis_url"):
        FeedbackStore.connect("http://127.0.0.1", FeedbackSettings())
