"""Whole rounds of the worker over a real Redis, on policies that train in seconds."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from stored_completions_app import kept
from tiny_loop import SETTINGS, TOLERANT, Loop, tiny_loop

from deploy.registry import Lease
from deploy.versions import VersionKind
from feedback.errors import StoreUnavailable
from feedback.pool import UNSCORED_NATS
from feedback.records import Erasure, Prompt, name_digest
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from train.rounds.frozen import thaw
from train.rounds.log_watch import log_until
from train.rounds.runs import Outcome, RunDirectory
from train.rounds.stores import Stores
from train.worker import Worker

LONG = SETTINGS.model_copy(update={"ppo": SETTINGS.ppo.model_copy(update={"iterations": 30})})
"""A round that is still under way when a test that waited for its first resume point does something."""


@pytest.fixture
async def loop(state_dir: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Loop]:
    async with tiny_loop(state_dir, redis_url, tmp_path) as made:
        yield made


async def step(worker: Worker) -> Outcome:
    outcome = await worker.step()
    assert outcome is not None
    return outcome


async def test_nothing_is_due_before_there_is_enough(loop: Loop) -> None:
    await loop.compare(39)
    assert await loop.worker().step() is None
    assert loop.runs() == []


async def test_a_round_publishes_a_reward_model_and_a_policy(loop: Loop) -> None:
    await loop.compare(80)
    head = await loop.stores.feedback.head()
    outcome = await step(loop.worker())
    assert (outcome.status, outcome.reward_model, outcome.policy) == ("passed", 1, 2)

    fitted = loop.registry.get(VersionKind.REWARD_MODEL, 1)
    policy = loop.registry.get(VersionKind.POLICY, 2)
    loop.registry.verify(fitted)
    loop.registry.verify(policy)
    assert fitted.manifest.metrics["held_out_accuracy"] > 0.75, "the labelers' taste is plain to see"
    assert fitted.manifest.reference_policy == 1
    assert fitted.manifest.gate is not None and fitted.manifest.gate.passed
    assert (policy.manifest.parent, policy.manifest.reference_policy, policy.manifest.reward_model) == (1, 1, 1)
    assert policy.manifest.feedback_cursor == fitted.manifest.feedback_cursor == head
    assert 0 < policy.manifest.comparisons < 80, "some are held out"
    assert policy.manifest.gate is not None and policy.manifest.gate.passed
    asked = set(thaw(loop.runs()[0].dataset).dataset.held_out_prompt_ids)
    assert len(asked) > 10 and len(policy.manifest.canary_prompts) == 2
    assert asked.isdisjoint(one.prompt_token_ids for one in policy.manifest.canary_prompts), "a manifest is for ever"
    assert {"score", "parent_score", "kl_to_reference", "ppo_score"} <= policy.manifest.metrics.keys()
    first = loop.registry.get(VersionKind.POLICY, 1)
    assert policy.manifest.files["model.safetensors"] != first.manifest.files["model.safetensors"]

    published = [a for a in await loop.stores.releases.history() if a.verb == "publish"]
    assert [(a.kind, a.version, a.reason) for a in reversed(published)] == [
        ("reward_model", 1, f"round-{head}"),
        ("policy", 2, f"round-{head}"),
    ]
    assert (await loop.stores.releases.read()).canary is None, "traffic is the operator's to give"

    (run,) = loop.runs()
    assert run.outcome is not None and run.outcome.policy == 2
    assert not list(run.path.rglob("*.safetensors")), "weights live in the registry"
    assert len((run.path / "ppo-history.jsonl").read_text().splitlines()) == 3
    assert json.loads((run.path / "progress.json").read_bytes())["run"] == run.path.name
    assert await loop.worker().step() is None, "the comparisons have had their round"


async def test_a_later_round_restarts_from_the_first_reward_model(loop: Loop) -> None:
    await loop.compare(60)
    await step(loop.worker())
    await loop.compare(40)
    left = loop.runs()[0].path / "work-1" / "policy"
    left.mkdir(parents=True)  # by a worker that was killed while it tidied up
    outcome = await step(loop.worker())
    assert (outcome.status, outcome.reward_model, outcome.policy) == ("passed", 2, 3)
    assert not left.exists()
    refitted = loop.registry.get(VersionKind.REWARD_MODEL, 2).manifest
    assert refitted.parent == 1
    training = [run.path / "reward_model.json" for run in loop.runs()]
    first, second = (json.loads(path.read_bytes())["prompts"] for path in training)
    fresh = refitted.comparisons - first
    assert second == 2 * fresh, "every fresh comparison, and as many of the first ones"
    assert "previous_held_out_accuracy" in refitted.metrics
    assert loop.registry.get(VersionKind.POLICY, 3).manifest.parent == 1, "from the stable policy, not the newest"


async def test_what_labelers_say_of_the_parents_own_completions_is_reported(loop: Loop) -> None:
    await loop.compare(60)
    assert (await step(loop.worker())).reward_model == 1
    await loop.compare(40, version=1)
    assert (await step(loop.worker())).reward_model == 2
    told, measured = [], []
    for fitted in loop.registry.list(VersionKind.REWARD_MODEL):
        assert fitted.manifest.gate is not None
        told.append({one.name: one.value for one in fitted.manifest.gate.reported}["own_accuracy"])
        measured.append(fitted.manifest.metrics.get("own_accuracy"))
    assert told == measured
    assert measured[0] is None, "nobody knows whose completions the first ones were"
    assert measured[1] is not None


async def ask_for_more(loop: Loop, count: int) -> None:
    """Customers' prompts, stored beside those of the comparisons."""
    tokenizer = loop.registry.get(VersionKind.POLICY, 1).manifest.files["tokenizer.json"].sha256
    asked = [tuple(loop.rng.randrange(2, 16) for _ in range(5)) for _ in range(count)]
    prompts = [Prompt(text=" ".join(f"w{i}" for i in ids), token_ids=ids, tokenizer=tokenizer) for ids in asked]
    await loop.stores.feedback.keep([kept(f"c{n:02d}", n, prompts=(prompt,)) for n, prompt in enumerate(prompts)])


async def test_the_new_reward_model_says_what_labelers_should_see_next(loop: Loop) -> None:
    await loop.compare(60)
    await ask_for_more(loop, 30)
    worker = SETTINGS.worker.model_copy(update={"score_pool_prompts": 20})
    assert (await step(loop.worker(SETTINGS.model_copy(update={"worker": worker})))).reward_model == 1
    async with Redis.from_url(loop.url, decode_responses=True) as redis:
        in_pool: Any = await redis.zrange("pool:prompts", 0, -1, withscores=True)
        nats: dict[str, float] = dict(in_pool)
    scored = {name for name, score in nats.items() if not UNSCORED_NATS <= score < UNSCORED_NATS + 1e-6}
    assert scored == {f"c{number}" for number in range(10, 30)}, "the newest"
    assert len({nats[name] for name in scored}) == 20, "each by its own completions"
    assert all(0 <= nats[name] <= math.log(2) for name in scored)


async def test_a_pool_that_cannot_be_scored_does_not_undo_the_round(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def unavailable(*_: object) -> None:
        raise StoreUnavailable("away")

    await loop.compare(60)
    monkeypatch.setattr(FeedbackStore, "prompts_to_score", unavailable)
    assert (await step(loop.worker())).status == "passed"
    assert "no prompts are scored for labelers: away" in caplog.text


async def test_what_was_erased_after_the_cursor_is_not_learnt_from(loop: Loop) -> None:
    await loop.compare(10)
    head = await loop.stores.feedback.head()
    assert len(await log_until(loop.stores.feedback, head)) == 10
    said = Erasure(id="era_1", created=1.0, principal="operator", erased=name_digest("alice"))
    await loop.stores.feedback.append(said)  # the records are still there
    assert await log_until(loop.stores.feedback, head) == []


async def test_the_record_of_a_round_counts_whom_it_trusts_less(loop: Loop) -> None:
    await loop.compare(30)
    await loop.compare(10, contrary=True)
    await step(loop.worker())
    (run,) = loop.runs()
    counts = json.loads((run.path / "dataset.json").read_bytes())
    assert (counts["labelers"], counts["superseded"], counts["golden"]) == (2, 0, 0)
    assert counts["labelers_trusted_less"] == 2, "they contradict each other, and nobody knows who is right"
    assert counts["comparisons_trusted_less"] == 50 and counts["comparisons_not_trusted"] == 0


async def test_a_refused_round_keeps_its_labels_and_waits_for_new_ones(loop: Loop) -> None:
    await loop.compare(60)
    outcome = await step(loop.worker(gate=TOLERANT.model_copy(update={"min_eos_share": 1.0})))
    assert outcome.status == "refused"
    assert "eos_share" in outcome.reasons[0]
    refused = loop.registry.get(VersionKind.POLICY, 2).manifest
    assert refused.gate is not None and not refused.gate.passed
    worker = loop.worker()
    assert await worker.step() is None
    await loop.compare(40)
    assert (await step(worker)).status == "passed"
    assert loop.registry.get(VersionKind.POLICY, 3).manifest.comparisons > refused.comparisons


async def test_a_reward_model_no_better_than_chance_ends_the_round(loop: Loop) -> None:
    await loop.compare(30, contrary=True)
    outcome = await step(loop.worker())
    assert outcome.status == "refused"
    assert "held_out_accuracy_low" in outcome.reasons[0]
    assert loop.registry.numbers(VersionKind.REWARD_MODEL) == []
    assert loop.registry.numbers(VersionKind.POLICY) == [1]
    assert await loop.worker().step() is None


async def test_a_stopped_round_is_resumed_where_it_was(loop: Loop) -> None:
    await loop.compare(60)
    worker = loop.worker(LONG)
    stopping = asyncio.create_task(worker.step())
    while not (runs := loop.runs()) or not list(runs[0].path.glob("work-*/ppo.pt")):
        await asyncio.sleep(0.005)
    worker.stop.set()
    assert await stopping is None
    (run,) = loop.runs()
    assert run.outcome is None and loop.registry.numbers(VersionKind.POLICY) == [1]
    (fitted,) = run.path.glob("work-*/reward_model.json")
    before = json.loads(fitted.read_bytes())["seconds"]
    await loop.compare(40)  # come too late for this round's cursor

    outcome = await step(loop.worker(LONG))
    assert (outcome.reward_model, outcome.policy) == (1, 2)
    again = json.loads((run.path / "reward_model.json").read_bytes())["seconds"]
    assert again == before, "the reward model is not fitted again"
    assert loop.registry.get(VersionKind.POLICY, 2).manifest.feedback_cursor == run.plan.cursor
    assert loop.registry.numbers(VersionKind.REWARD_MODEL) == [1]


async def test_a_worker_killed_after_publishing_publishes_nothing_twice(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    await loop.compare(60)
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "conclude", die)
        with pytest.raises(Killed):
            await loop.worker().step()
    assert loop.registry.numbers(VersionKind.POLICY) == [1, 2]
    assert (await step(loop.worker())).policy == 2
    assert loop.registry.numbers(VersionKind.POLICY) == [1, 2]
    assert loop.registry.numbers(VersionKind.REWARD_MODEL) == [1]


async def test_a_second_worker_waits(loop: Loop) -> None:
    await loop.compare(60)
    other = Lease.connect(loop.url, 5.0)
    assert await other.acquire()
    assert await loop.worker().step() is None
    assert loop.runs() == []
    await other.release()
    await other.close()
    assert (await step(loop.worker())).policy == 2


async def test_a_worker_that_lost_its_lease_publishes_nothing(loop: Loop) -> None:
    await loop.compare(60)
    paused = asyncio.create_task(loop.worker(LONG).step())
    while not (runs := loop.runs()) or not list(runs[0].path.glob("work-*/ppo.pt")):
        await asyncio.sleep(0.005)
    other = Lease.connect(loop.url, 5.0)
    async with Redis.from_url(loop.url) as redis:
        await redis.delete("train:lease")  # its term ran out while the process was paused
    assert await other.acquire()
    assert await paused is None
    assert loop.registry.numbers(VersionKind.POLICY) == [1], "refused by its token right before the rename"
    await other.release()
    await other.close()
    assert (await step(loop.worker())).policy == 2


async def test_too_few_prompts_fail_the_round_with_a_reason(loop: Loop) -> None:
    await loop.compare(90, prompts=1)
    outcome = await step(loop.worker())
    assert outcome.status == "failed"
    assert "prompts" in outcome.reasons[0]


async def test_the_worker_goes_on_after_redis_was_away(loop: Loop) -> None:
    worker = loop.worker()
    worker._stores = Stores.connect("redis://127.0.0.1:1", loop.state, SETTINGS.worker, FeedbackSettings())
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(0.3)
    assert not running.done(), "a Redis that is away is waited out"
    worker.stop.set()
    await asyncio.wait_for(running, 5)
    await worker._stores.close()


async def test_canaries_start_by_themselves_only_where_told_to(loop: Loop) -> None:
    await loop.compare(60)
    eager = SETTINGS.model_copy(update={"worker": SETTINGS.worker.model_copy(update={"canary_fraction": 0.2})})
    await step(loop.worker(eager))
    release = await loop.stores.releases.read()
    assert (release.stable, release.canary, release.canary_fraction, release.by) == (1, 2, 0.2, "worker")
