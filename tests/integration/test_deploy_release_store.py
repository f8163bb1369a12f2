"""The release, its log and the training lease in a real Redis."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from deploy import operations
from deploy.errors import LeaseLost, ReleaseUnavailable, StaleGeneration, TransitionRefused
from deploy.gate import GateCheck, GateReport
from deploy.registry import Lease, Registry, ReleaseStore
from deploy.release import Release, ReplicaReport, canary, first, promote, rollback
from deploy.settings import VerdictSettings
from deploy.verdict import Verdict
from deploy.versions import Draft, VersionKind
from feedback.embedded import start_or_join
from feedback.records import Candidate, Comparison, Prompt, new_id
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore


@pytest.fixture
async def store(redis_url: str, state_dir: Path) -> AsyncIterator[ReleaseStore]:
    store = ReleaseStore.connect(redis_url, state_dir)
    await store.change(partial(first, number=1), verb="first", by="setup", reason="")
    yield store
    await store.close()


def start(number: int) -> partial[Release]:
    return partial(canary, number=number, fraction=0.1)


async def test_a_new_loop_has_no_release(redis_url: str, state_dir: Path) -> None:
    empty = ReleaseStore.connect(redis_url, state_dir)
    assert await empty.read() == Release()
    assert empty.last_known() == Release()
    await empty.close()


async def test_a_change_is_read_back_whole(store: ReleaseStore) -> None:
    before = time.time()
    changed = await store.change(start(2), verb="canary", by="ann", reason="looks good")
    assert (changed.stable, changed.canary, changed.canary_fraction, changed.generation) == (1, 2, 0.1, 2)
    assert (changed.by, changed.reason) == ("ann", "looks good")
    assert before - 1 < changed.changed_at < time.time() + 1
    assert await store.read() == changed == store.last_known()
    dropped = await store.change(rollback, verb="rollback", by="ann", reason="")
    assert await store.read() == dropped
    assert (dropped.canary, dropped.canary_fraction, dropped.reason) == (None, 0.0, "")


async def test_of_two_operators_at_once_one_wins(store: ReleaseStore, redis_url: str, state_dir: Path) -> None:
    other = ReleaseStore.connect(redis_url, state_dir)
    for round_number in range(10):
        results = await asyncio.gather(
            store.change(start(2), verb="canary", by="ann", reason=""),
            other.change(start(3), verb="canary", by="bob", reason=""),
            return_exceptions=True,
        )
        won = [result for result in results if isinstance(result, Release)]
        lost = [result for result in results if isinstance(result, (StaleGeneration, TransitionRefused))]
        assert (len(won), len(lost)) == (1, 1)
        assert await store.read() == won[0]
        assert won[0].generation == 2 + 2 * round_number
        await store.change(rollback, verb="rollback", by="ann", reason="")
    await other.close()


async def test_a_double_rollback_does_not_go_back_twice(store: ReleaseStore) -> None:
    """Both operators mean the canary; the second must not take the stable version back as well."""
    await store.change(start(2), verb="canary", by="ann", reason="")
    await store.change(promote, verb="promote", by="ann", reason="")
    seen = await store.change(start(3), verb="canary", by="ann", reason="")
    await store.change(rollback, verb="rollback", by="ann", reason="", expect=seen.generation)
    with pytest.raises(StaleGeneration, match=f"not {seen.generation}"):
        await store.change(rollback, verb="rollback", by="bob", reason="", expect=seen.generation)
    assert (await store.read()).stable == 2


async def test_every_attempt_is_logged_with_who_and_why(store: ReleaseStore) -> None:
    await store.change(start(2), verb="canary", by="ann", reason="first try")
    with pytest.raises(TransitionRefused):
        await store.change(start(3), verb="canary", by="bob", reason="me too")
    with pytest.raises(StaleGeneration):
        await store.change(promote, verb="promote", by="eve", reason="quick", expect=1)
    newest = await store.history(3)
    assert [(a.verb, a.by, a.reason, a.accepted) for a in newest] == [
        ("promote", "eve", "quick", False),
        ("canary", "bob", "me too", False),
        ("canary", "ann", "first try", True),
    ]
    assert "generation is 2, not 1" in newest[0].outcome
    assert "version 2 is the canary" in newest[1].outcome
    assert newest[2].generation == 2
    assert abs(newest[2].at - time.time()) < 60


async def test_a_change_that_loses_the_race_inside_redis_is_refused_and_logged(
    store: ReleaseStore, redis_url: str
) -> None:
    """The release moves between this operator's read and its compare-and-set."""

    def overtaken(release: Release) -> Release:
        with SyncRedis.from_url(redis_url) as redis:
            redis.hset("rel:state", "generation", "9")
        return canary(release, 2, 0.1)

    with pytest.raises(StaleGeneration, match="left generation 1"):
        await store.change(overtaken, verb="canary", by="ann", reason="")
    assert (await store.history(1))[0].outcome == "refused: generation is 9 by now"
    assert (await store.read()).canary is None


async def test_changes_are_announced(store: ReleaseStore, redis_url: str, state_dir: Path) -> None:
    server = ReleaseStore.connect(redis_url, state_dir)
    await server.changed(0.05)  # the first call subscribes
    waiting = asyncio.create_task(server.changed(20.0))
    await asyncio.sleep(0.05)
    await store.change(start(2), verb="canary", by="ann", reason="")
    await asyncio.wait_for(waiting, 2.0)
    began = time.monotonic()
    await server.changed(0.2)
    assert 0.15 < time.monotonic() - began < 10, "without news, the time is up"
    await server.close()


async def test_servers_are_forgotten_once_they_fall_silent(store: ReleaseStore) -> None:
    await store.report(ReplicaReport(replica="a", generation=1, live=(1,)))
    await store.report(ReplicaReport(replica="b", generation=0, live=()), ttl_seconds=2.0)
    assert [r.replica for r in await store.replicas()] == ["a", "b"]
    await asyncio.sleep(2.1)
    assert await store.replicas() == [ReplicaReport(replica="a", generation=1, live=(1,))]


async def test_without_redis_the_last_release_is_known(state_dir: Path) -> None:
    redis = start_or_join(state_dir)
    store = ReleaseStore.connect(redis.url, state_dir)
    released = await store.change(partial(first, number=1), verb="first", by="ann", reason="")
    redis.close()
    began = time.monotonic()
    for attempt in (store.read(), store.change(rollback, verb="rollback", by="ann", reason=""), store.history()):
        with pytest.raises(ReleaseUnavailable):
            await attempt
    assert time.monotonic() - began < 4, "a Redis that is gone is noticed fast"
    assert store.last_known() == released
    assert ReleaseStore.connect(redis.url, state_dir).last_known() == released, "also after a restart"
    await store.changed(0.1)
    await store.close()


async def test_an_empty_redis_is_given_the_release_back(store: ReleaseStore, redis_url: str) -> None:
    released = await store.change(start(2), verb="canary", by="ann", reason="")
    async with Redis.from_url(redis_url) as redis:
        await redis.delete("rel:state")
    assert await store.read() == released
    newest = (await store.history(1))[0]
    assert (newest.verb, newest.accepted) == ("restore", True)


async def test_storage_that_hangs_stops_nothing_but_the_copy(store: ReleaseStore, state_dir: Path) -> None:
    copy = state_dir / "release.json"
    copy.unlink()
    os.mkfifo(copy)  # whoever reads it waits for somebody who writes
    threading.Timer(0.5, copy.write_bytes, [b"what was there"]).start()
    reading, turns = asyncio.create_task(store.read()), 0
    while not reading.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5, "the event loop went on"
    assert store.last_known() == await reading, "the copy is a file again"


async def test_a_release_that_is_none_is_named(store: ReleaseStore, redis_url: str, state_dir: Path) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.hset("rel:state", "stable", "seven")
    with pytest.raises(ReleaseUnavailable, match="holds no release"):
        await store.read()
    (state_dir / "release.json").write_text("{")
    with pytest.raises(ReleaseUnavailable, match=r"release\.json"):
        store.last_known()


# --- what speaks against a verb


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def gate(passed: bool) -> GateReport:
    return GateReport.of(
        [GateCheck(name="eos_share", passed=passed, value=0.5, limit=0.95, sentence="eos_share is 0.5")]
    )


async def test_a_canary_needs_its_gate_or_an_override_and_its_digests(
    store: ReleaseStore, state_dir: Path, model: Path
) -> None:
    registry = Registry(state_dir)
    for passed in (True, False, True):
        registry.publish(Draft(kind=VersionKind.POLICY, gate=gate(passed)), model)

    async def attempt(number: int, override: str | None = None) -> Release:
        transition = operations.start_canary(registry, number, 0.1, override)
        return await store.change(transition, verb="canary", by="ann", reason=override or "")

    with pytest.raises(TransitionRefused, match="did not pass its gate: eos_share"):
        await attempt(2)
    assert "did not pass its gate" in (await store.history(1))[0].outcome
    assert (await attempt(2, "the prompts are odd")).canary == 2
    assert (await store.history(1))[0].reason == "the prompts are odd"
    await store.change(rollback, verb="rollback", by="ann", reason="")

    weights = state_dir / "policies" / "3" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"weighty")
    with pytest.raises(TransitionRefused, match="sha256"):
        await attempt(3, "nothing overrides a wrong digest")
    with pytest.raises(TransitionRefused, match="no policy version 9"):
        await attempt(9)


async def test_promotion_needs_a_verdict_or_an_override(store: ReleaseStore) -> None:
    await store.change(start(2), verb="canary", by="ann", reason="")

    async def attempt(verdict: Verdict, override: str | None = None) -> Release:
        return await store.change(operations.promote_canary(verdict, override), verb="promote", by="ann", reason="")

    for decision in ("undecided", "worse"):
        with pytest.raises(TransitionRefused, match="version 2"):
            await attempt(Verdict.model_validate({"decision": decision}))
    assert (await attempt(Verdict(decision="better"))).stable == 2
    await store.change(start(3), verb="canary", by="ann", reason="")
    assert (await attempt(Verdict(decision="not_worse"))).stable == 3
    await store.change(start(4), verb="canary", by="ann", reason="")
    assert (await attempt(Verdict(), "we must")).stable == 4


def blind(canary_wins: bool, task: int) -> Comparison:
    return Comparison(
        id=new_id("cmp_"),
        created=0.0,
        principal="alice",
        labeler="L-1",
        prompt=Prompt(text="hello"),
        source="task",
        candidates=tuple(
            Candidate(completion_id=f"c{task}-{version}", policy_version=version, text="x") for version in (1, 2)
        ),
        ranking=((1,), (0,)) if canary_wins else ((0,), (1,)),
    )


async def test_the_verdict_comes_from_blind_comparisons_since_the_canary_began(
    store: ReleaseStore, redis_url: str
) -> None:
    feedback = FeedbackStore.connect(redis_url, FeedbackSettings())
    settings = VerdictSettings()
    for task in range(40):  # before the canary: another trial's
        await feedback.append(blind(False, task))
    await asyncio.sleep(0.01)
    release = await store.change(start(2), verb="canary", by="ann", reason="")
    assert (await operations.current_verdict(feedback, release, settings)).comparisons == 0
    for task in range(100, 130):
        await feedback.append(blind(True, task))
    for task in range(200, 210):  # not blind: no evidence
        await feedback.append(blind(False, task).model_copy(update={"source": "candidates"}))
    await feedback.append(blind(False, 100))  # a changed mind replaces the first judgement
    verdict = await operations.current_verdict(feedback, release, settings)
    assert (verdict.decision, verdict.comparisons, verdict.wins) == ("better", 30, 29)
    dropped = await store.change(rollback, verb="rollback", by="ann", reason="")
    assert (await operations.current_verdict(feedback, dropped, settings)).decision == "undecided"
    await feedback.close()


# --- the lease


TERM_SECONDS = 2.0
"""Of a lease: longer than a busy machine holds up a test."""


@pytest.fixture
async def leases(redis_url: str) -> AsyncIterator[tuple[Lease, Lease]]:
    pair = Lease.connect(redis_url, TERM_SECONDS), Lease.connect(redis_url, TERM_SECONDS)
    yield pair
    for lease in pair:
        await lease.close()


async def test_one_worker_holds_the_lease(leases: tuple[Lease, Lease]) -> None:
    ours, theirs = leases
    assert await ours.acquire()
    assert not await theirs.acquire()
    await ours.check()
    ours.check_time()
    await ours.release()
    assert await theirs.acquire()
    assert theirs.token is not None and ours.token is not None and theirs.token > ours.token


async def test_renewing_keeps_it(leases: tuple[Lease, Lease]) -> None:
    ours, theirs = leases
    assert await ours.acquire()
    for _ in range(3):
        await asyncio.sleep(0.4 * TERM_SECONDS)
        await ours.renew()
    ours.check_time()
    assert not await theirs.acquire()


async def test_a_paused_holder_is_refused_in_every_way(
    leases: tuple[Lease, Lease], state_dir: Path, model: Path
) -> None:
    ours, theirs = leases
    assert await ours.acquire()
    await asyncio.sleep(1.1 * TERM_SECONDS)
    assert await theirs.acquire()
    with pytest.raises(LeaseLost):
        ours.check_time()
    with pytest.raises(LeaseLost, match=f"not by token {ours.token}"):
        await ours.check()
    with pytest.raises(LeaseLost):
        await ours.renew()
    with pytest.raises(LeaseLost):
        await ours.release()
    await theirs.check()

    registry, loop = Registry(state_dir), asyncio.get_running_loop()

    def check_fence() -> None:
        asyncio.run_coroutine_threadsafe(ours.check(), loop).result()

    with pytest.raises(LeaseLost):
        await asyncio.to_thread(registry.publish, Draft(kind=VersionKind.POLICY), model, check_fence=check_fence)
    assert registry.numbers(VersionKind.POLICY) == []


async def test_nobody_holds_a_lease_never_taken(leases: tuple[Lease, Lease]) -> None:
    for check in (leases[0].check, leases[0].renew):
        with pytest.raises(LeaseLost):
            await check()
    with pytest.raises(LeaseLost):
        leases[0].check_time()
