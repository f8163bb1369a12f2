"""Blind tasks: what a labeler is shown tells nothing, and what they are given next is worth their time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from labeling_app import Labeling
from redis import Redis
from scipy.stats import binomtest
from starlette.types import Message
from stored_completions_app import kept

from feedback.controls import in_force, is_check
from feedback.labelers import assess, golden_answers
from feedback.pool import REPEAT_GAP
from feedback.preference import bradley_terry, preferences
from feedback.records import Candidate, Comparison, Prompt
from serve.errors import EngineRefused, NotServing

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

PLAIN = {"golden_share": 0.0, "repeat_share": 0.0}
MakeComparison = Callable[..., Comparison]


@pytest.fixture
async def start(redis_url: str) -> AsyncIterator[Callable[..., Labeling]]:
    started: list[Labeling] = []

    def one(**settings: Any) -> Labeling:
        started.append(Labeling(redis_url, **PLAIN | settings))
        return started[-1]

    yield one
    for labeling in started:
        await labeling.close()


async def ask(labeling: Labeling, *texts: str, principal: str = "customer") -> None:
    """A customer has asked these; the first is the oldest."""
    for number, text in enumerate(texts):
        prompt = Prompt(messages=({"role": "user", "content": text},), token_ids=(1, 2))
        await labeling.store.keep([kept(f"chatcmpl-{text}", 1000 + number, prompts=(prompt,), principal=principal)])


def golden(number: int, *, worse: int = 1) -> Comparison:
    """A known answer: ``right`` is better than each of ``worse`` others, which are tied."""
    texts = ["right", *(f"wrong {place}" for place in range(worse))]
    return Comparison(
        id=f"cmp_golden{number}",
        created=1.0,
        principal="operator",
        labeler="operator",
        prompt=Prompt(messages=({"role": "user", "content": f"golden {number}"},)),
        metadata={"golden": "true"},
        source="outside",
        candidates=tuple(Candidate(text=text, index=index) for index, text in enumerate(texts)),
        ranking=((0,), tuple(range(1, worse + 1))),
    )


def asked(task: dict[str, Any]) -> str:
    return str(task["messages"][-1]["content"])


def texts(task: dict[str, Any]) -> list[str]:
    return [candidate["text"] for candidate in task["candidates"]]


def arms(task: dict[str, Any]) -> list[str]:
    return [text.split()[0] for text in texts(task)]


async def log(labeling: Labeling) -> list[Comparison]:
    return [entry.record async for entry in labeling.store.scan() if isinstance(entry.record, Comparison)]


# --- blindness


async def test_place_and_count_of_an_arms_candidates_are_drawn(start: Callable[..., Labeling]) -> None:
    labeling = start()
    pairs = [(await labeling.task(k=2, prompt="frog")).json() for _ in range(300)]
    assert all(sorted(arms(task)) == ["1", "2"] for task in pairs)
    first = sum(arms(task)[0] == "1" for task in pairs)
    assert binomtest(first, 300).pvalue > 1e-4
    odd = [(await labeling.task(k=3, prompt="frog")).json() for _ in range(200)]
    assert {tuple(sorted(Counter(arms(task)).values())) for task in odd} == {(1, 2)}
    assert binomtest(sum(arms(task).count("1") == 2 for task in odd), 200).pvalue > 1e-4
    orders = Counter("".join(arms(task)) for task in odd)
    assert len(orders) == 6 and min(orders.values()) > 12  # 33 each, by chance


async def test_nothing_but_the_texts_differs_between_tasks(start: Callable[..., Labeling]) -> None:
    labeling = start()
    answers = [await labeling.task(k=4, prompt="frog", labeler="L-1") for _ in range(20)]
    assert len({tuple(sorted(answer.headers)) for answer in answers}) == 1
    assert "x-policy-version" not in answers[0].headers
    for answer in answers:
        task = answer.json()
        assert [set(shown) for shown in task["candidates"]] == [{"index", "text"}] * 4
        assert [shown["index"] for shown in task["candidates"]] == [0, 1, 2, 3]
        del task["candidates"], task["id"], task["created"], task["expires"]
        assert task == {"object": "feedback.task", "prompt": "frog"}
        kept_task = await labeling.store.task(answer.json()["id"])
        assert kept_task is not None
        assert [str(one.policy_version) for one in kept_task.candidates] == arms(answer.json()), "the order is recorded"


# --- which prompt


async def test_the_most_informative_come_first_and_none_twice(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, *(f"p{number:02d}" for number in range(30)))
    await labeling.store.score_prompts({"chatcmpl-p03": 0.69, "chatcmpl-p04": 0.6, "chatcmpl-p29": 0.1})
    given = [asked((await labeling.task(labeler="L-1")).json()) for _ in range(30)]
    assert sorted(given) == [f"p{number:02d}" for number in range(30)]
    place = {prompt: number for number, prompt in enumerate(given)}
    # One of the eight first each time: whoever is n-th in order comes not before the (n - 7)-th task.
    order = ["p03", "p04", *(f"p{number:02d}" for number in range(28, -1, -1) if number not in (3, 4)), "p29"]
    assert all(place[prompt] >= rank - 7 for rank, prompt in enumerate(order))
    assert place["p29"] >= 22

    nothing = await labeling.task(labeler="L-1")
    assert nothing.status_code == 404
    assert "every prompt" in nothing.json()["error"]["message"]
    assert (await labeling.task(labeler="L-1", prompt="my own")).status_code == 201, "prompts of one's own are exempt"
    assert (await labeling.task(labeler="L-2")).status_code == 201, "another labeler has had none"
    await ask(labeling, "new")
    assert asked((await labeling.task(labeler="L-1")).json()) == "new"


async def test_without_a_name_the_principal_is_the_labeler(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, "a", "b")
    both = {asked((await labeling.task("bob")).json()), asked((await labeling.task("bob", labeler="bob")).json())}
    assert both == {"a", "b"}
    assert (await labeling.task("bob")).status_code == 404
    assert (await labeling.task("alice")).status_code == 201


async def test_tasks_asked_for_at_once_share_no_prompt(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, *(f"p{number}" for number in range(40)))
    answers = await asyncio.gather(*(labeling.task(labeler="L-1") for _ in range(24)))
    assert len({asked(answer.json()) for answer in answers}) == 24
    twice = await asyncio.gather(labeling.task(labeler="L-2"), labeling.task(labeler="L-3"))
    assert all(answer.status_code == 201 for answer in twice)


async def test_two_labelers_at_once_do_not_always_get_the_same(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, *(f"p{number}" for number in range(12)))
    first = {asked((await labeling.task(labeler=f"L-{number}")).json()) for number in range(40)}
    assert first <= {f"p{number}" for number in range(4, 12)}, "the eight most informative"
    assert len(first) > 3


async def test_a_prompt_the_engine_refuses_is_passed_over(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, "fits", "too long 1", "too long 2")
    assert asked((await labeling.task(labeler="L-1")).json()) == "fits"
    assert (await labeling.task(labeler="L-1")).status_code == 404, "what was not met on the way to it is met now"


async def test_a_prompt_that_could_not_be_shown_is_given_again(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, "only")
    labeling.engines[2].failing = NotServing("gone")
    assert (await labeling.task(labeler="L-1")).status_code == 503
    labeling.engines[2].failing = None
    assert asked((await labeling.task(labeler="L-1")).json()) == "only"


async def test_a_busy_engine_uses_no_prompts_up(start: Callable[..., Labeling]) -> None:
    labeling = start()
    await ask(labeling, "only")
    labeling.engines[1].failing = EngineRefused(503, "the queue is full")
    assert (await labeling.task(labeler="L-1")).status_code == 429
    assert [len(engine.asked) for engine in labeling.engines.values()] == [1, 1], "it was not asked again at once"
    labeling.engines[1].failing = None
    assert asked((await labeling.task(labeler="L-1")).json()) == "only"


async def test_messages_of_tasks_hold_text_only(start: Callable[..., Labeling]) -> None:
    labeling = start()
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/secret"}}
    refused = await labeling.task(messages=[{"role": "user", "content": [image]}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert labeling.engines[1].asked == labeling.engines[2].asked == []


async def test_the_engines_cache_prefixes_for_each_principal_apart(start: Callable[..., Labeling]) -> None:
    labeling = start()
    for principal in ("alice", "bob", "alice"):
        assert (await labeling.task(principal, prompt="frog")).status_code == 201
    first, second, third = labeling.engines[1].cache_salts
    assert first == third != second and first and second


async def test_a_client_who_leaves_ends_the_sampling_and_may_get_the_prompt_again(
    start: Callable[..., Labeling],
) -> None:
    labeling = start()
    await ask(labeling, "only")
    for engine in labeling.engines.values():
        engine.hanging = True
    body = b'{"labeler": "L-1"}'
    left = asyncio.Event()

    async def receive() -> Message:
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": body}
        await left.wait()
        return {"type": "http.disconnect"}

    sent: list[bool] = []
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer alice")]
    scope = {"type": "http", "method": "POST", "path": "/v1/feedback/tasks", "query_string": b"", "headers": headers}
    answering = asyncio.create_task(labeling.app(scope, receive, nobody))
    while not labeling.engines[2].asked:
        await asyncio.sleep(0.01)
    left.set()
    await asyncio.wait_for(answering, 1.0)
    assert [engine.aborted for engine in labeling.engines.values()] == [1, 1]
    for engine in labeling.engines.values():
        engine.hanging = False
    assert asked((await labeling.task(labeler="L-1")).json()) == "only"


async def nobody(message: Message) -> None:
    """Where an answer goes that nobody waits for."""


async def test_tasks_do_not_fill_the_pool_they_draw_from(start: Callable[..., Labeling], redis_url: str) -> None:
    labeling = start()
    await ask(labeling, "a", "b")
    for _ in range(2):
        await labeling.task(labeler="L-1")
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        assert redis.zrevrange("pool:prompts", 0, -1) == ["chatcmpl-b", "chatcmpl-a"]
        assert len(redis.keys("gen:chatcmpl-*")) == 2 + 2 * 2


# --- golden pairs


async def tasks_of(labeling: Labeling, count: int, **body: Any) -> list[dict[str, Any]]:
    return [(await labeling.task(**body)).json() for _ in range(count)]


async def test_golden_tasks_look_like_others_and_measure_the_labeler(
    start: Callable[..., Labeling], redis_url: str
) -> None:
    labeling = start(golden_share=0.5)
    await ask(labeling, *(f"p{number}" for number in range(60)))
    for number in range(10):
        await labeling.store.append(golden(number))
    for _ in range(60):
        answer = await labeling.task(labeler="L-1", k=2)
        task = answer.json()
        assert set(task) == {"id", "object", "created", "expires", "messages", "candidates"}
        assert "x-policy-version" not in answer.headers
        best = texts(task).index("right") if "right" in texts(task) else 0
        ranked = await labeling.rank(task_id=task["id"], preferred=best, labeler="L-1")
        assert ranked.status_code == 201, ranked.text
    # Every task, golden or not, has made each arm sample one candidate.
    assert [len(engine.asked) for engine in labeling.engines.values()] == [60, 60]
    prompts = [pooled.prompt.messages for pooled in await labeling.store.pool_prompts(1000)]
    assert len(prompts) == 60 and "golden" not in str(prompts)

    everything = await log(labeling)
    found = in_force(everything)
    shown = [one for one in everything if is_check(one)]
    assert 3 < len(shown) == len(found.checks) <= 10, "each golden pair at most once"
    assert len({one.prompt.key() for one in shown}) == len(shown)
    assert len({one.candidates[0].text for one in shown}) == 2, "the right answer stands first and last"
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        # The sixty of customers, and both arms' of every ordinary task: what golden tasks sampled is not kept.
        assert len(redis.keys("gen:chatcmpl-*")) == 60 + 2 * (60 - len(shown))
    assert len(found.ordinary) == 60 - len(shown) and len(found.golden) == 10
    # Nothing of them counts for a version, even where nobody sorts them out first.
    assert preferences(shown, 1, 2) == [] and bradley_terry(shown) == []
    report = assess([*found.ordinary, *found.checks], golden=golden_answers(found.golden))
    share = report.labelers["L-1"].golden
    assert share is not None and (share.value, share.n) == (1, len(shown))
    assert report.labelers["L-1"].reliability.value > 0.85


async def test_a_golden_task_needs_nothing_of_what_was_sampled_for_it(start: Callable[..., Labeling]) -> None:
    labeling = start(golden_share=0.5)
    await ask(labeling, *(f"p{number}" for number in range(20)))
    for number in range(20):
        await labeling.store.append(golden(number))
    for engine in labeling.engines.values():
        engine.tardy = True
    given = [await labeling.task() for _ in range(20)]
    assert [answer.status_code for answer in given] == [201] * 20
    assert any("right" in texts(answer.json()) for answer in given)


async def test_a_busy_engine_shows_no_task_to_be_golden(start: Callable[..., Labeling]) -> None:
    labeling = start(golden_share=0.5)
    await ask(labeling, "only")
    for number in range(20):
        await labeling.store.append(golden(number))
    labeling.engines[2].failing = EngineRefused(503, "the queue is full")
    assert {(await labeling.task()).status_code for _ in range(20)} == {429}


async def test_golden_candidates_are_as_many_as_asked_for(start: Callable[..., Labeling]) -> None:
    labeling = start(golden_share=0.5)
    await ask(labeling, *(f"p{number}" for number in range(40)))
    for number in range(6):
        await labeling.store.append(golden(number, worse=1 if number < 3 else 4))
    seen = [task for task in await tasks_of(labeling, 40, k=3, labeler="L-1") if "right" in texts(task)]
    assert {len(task["candidates"]) for task in seen} == {3}
    assert {asked(task) for task in seen} == {"golden 3", "golden 4", "golden 5"}, "those of five show three"


async def test_replaced_and_erased_golden_pairs_are_shown_no_more(
    start: Callable[..., Labeling], make_comparison: MakeComparison
) -> None:
    labeling = start(golden_share=0.5)
    await ask(labeling, *(f"p{number}" for number in range(40)))
    plain = golden(1).model_copy(update={"id": "cmp_again", "metadata": {}})
    for record in (golden(1), golden(2), make_comparison(metadata={"golden": "true"}, source="choices"), plain):
        await labeling.store.append(record)
    seen = [task for task in await tasks_of(labeling, 30, labeler="L-1") if "right" in texts(task)]
    assert [asked(task) for task in seen] == ["golden 2"]
    own = [task for task in await tasks_of(labeling, 20, labeler="operator") if "right" in texts(task)]
    assert own == [], "whoever gave the answer knows it"


# --- repeats


async def test_repeats_come_in_reverse_once_and_replace_nothing(start: Callable[..., Labeling]) -> None:
    labeling = start(repeat_share=0.5)
    await ask(labeling, *(f"p{number:03d}" for number in range(200)))
    first: dict[str, list[str]] = {}
    repeats = 0
    for number in range(120):
        task = (await labeling.task(labeler="L-1", k=3)).json()
        if asked(task) in first:
            assert texts(task) == first[asked(task)][::-1]
            repeats += 1
            first[asked(task)] = ["never again"]
        else:
            first[asked(task)] = texts(task)
        await labeling.rank(
            task_id=task["id"], ranking=[[number % 3], [(number + 1) % 3, (number + 2) % 3]], labeler="L-1"
        )
        if number == REPEAT_GAP - 1:
            assert repeats == 0, "too fresh in memory"
    assert repeats > 15
    found = in_force(await log(labeling))
    assert (len(found.ordinary), len(found.repeats), found.checks) == (120 - repeats, repeats, ())
    assert all(one.first.created < one.again.created for one in found.repeats)
    assert {one.first.id for one in found.repeats} <= {one.id for one in found.ordinary}
    assert [len(engine.asked) for engine in labeling.engines.values()] == [120, 120]
    report = assess(found.ordinary, repeats=found.repeats).labelers["L-1"]
    assert report.repeats is not None and report.repeats.n == pytest.approx(2 * repeats)


async def test_what_was_not_judged_or_is_anothers_is_not_repeated(start: Callable[..., Labeling]) -> None:
    labeling = start(repeat_share=0.5)
    await ask(labeling, *(f"p{number:03d}" for number in range(150)))
    unjudged = await tasks_of(labeling, 40, labeler="L-1")
    assert len({asked(task) for task in unjudged}) == 40
    for task in await tasks_of(labeling, 20, labeler="L-1"):
        await labeling.rank(task_id=task["id"], preferred=0, labeler="L-1")
    elsewhere = [(await labeling.task("bob", labeler="L-1")).json() for _ in range(30)]
    assert len({asked(task) for task in [*unjudged, *elsewhere]}) == 70
    other_k = await tasks_of(labeling, 20, labeler="L-1", k=3)
    assert len({asked(task) for task in [*unjudged, *elsewhere, *other_k]}) == 90
