"""The guard over a real Redis: simulated labelers judge a canary, and nobody else does anything."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from redis import Redis as SyncRedis

from deploy import operations
from deploy.arms import ArmFigures
from deploy.errors import TransitionRefused
from deploy.evidence import HISTORY
from deploy.guard import Action, Guard
from deploy.registry import ReleaseStore
from deploy.release import Release, ReplicaReport, canary, first, rollback
from deploy.settings import DeploySettings, VerdictSettings
from deploy.verdict import Verdict
from feedback.errors import StoreUnavailable
from feedback.records import Candidate, Comparison, Erasure, Prompt, name_digest, new_id
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore, LogEntry

PROMOTING = DeploySettings(auto_promote="non_inferior", guard_seconds=0.2)


def blind(outcome: int, number: int, release: Release, **changes: object) -> Comparison:
    """A labeler's judgement of task ``number``: 1 for the canary, −1 for the stable version, 0 a tie."""
    candidates = tuple(
        Candidate(completion_id=f"c{number}-{version}", policy_version=version, text="x") for version in release.live()
    )
    ranking = {1: ((1,), (0,)), -1: ((0,), (1,)), 0: ((0, 1),)}[outcome]
    record = Comparison(
        id=new_id("cmp_"),
        created=0.0,
        principal="alice",
        labeler="L-1",
        prompt=Prompt(text="hello"),
        source="task",
        task_id=f"task_{number}",
        candidates=candidates,
        ranking=ranking,
    )
    return record.model_copy(update=changes)


@dataclass
class Loop:
    """A release with stable version 1, its feedback, and guards."""

    releases: ReleaseStore
    feedback: FeedbackStore
    url: str
    state: Path

    async def begin(self, number: int) -> Release:
        start: Callable[[Release], Release] = partial(canary, number=number, fraction=0.2)
        return await self.releases.change(start, verb="canary", by="ann", reason="")

    async def guard(self, name: str = "a", settings: DeploySettings = PROMOTING) -> Guard:
        """A server's guard, with the server's report."""
        release = await self.releases.read()
        figures = dict.fromkeys(release.live(), ArmFigures())
        report = ReplicaReport(replica=name, generation=release.generation, live=release.live(), arms=figures)
        await self.releases.report(report)
        return Guard(name, self.releases, self.feedback, settings)

    async def judge(
        self, guard: Guard, release: Release, draw: Callable[[], int], most: int, **changes: object
    ) -> tuple[Action | None, int]:
        """Labelers judge, ten comparisons between two looks; what was done, and after how many."""
        for judged in range(10, most + 1, 10):
            outcomes = [draw() for _ in range(10)]
            appended = [
                self.feedback.append(blind(outcome, judged + place, release, **changes))
                for place, outcome in enumerate(outcomes)
            ]
            await asyncio.gather(*appended)
            if (done := (await guard.look()).done) is not None:
                return done, judged
        return None, most


@pytest.fixture
async def loop(redis_url: str, state_dir: Path) -> AsyncIterator[Loop]:
    releases = ReleaseStore.connect(redis_url, state_dir)
    feedback = FeedbackStore.connect(redis_url, FeedbackSettings(socket_timeout_seconds=10))
    await releases.change(partial(first, number=1), verb="first", by="setup", reason="")
    yield Loop(releases, feedback, redis_url, state_dir)
    await feedback.close()
    await releases.close()


def labelers(preference: float, ties: float = 0.2, seed: int = 1) -> Callable[[], int]:
    """Who prefer the canary with that probability where they prefer anything."""
    draw = random.Random(seed)
    return lambda: 0 if draw.random() < ties else 1 if draw.random() < preference else -1


async def test_a_good_canary_is_promoted_by_what_people_say(loop: Loop) -> None:
    release = await loop.begin(2)
    guard = await loop.guard(settings=PROMOTING.model_copy(update={"auto_promote": "better"}))
    done, judged = await loop.judge(guard, release, labelers(0.7), 200)
    assert done is not None and done.verb == "promote"
    assert 20 <= judged <= 120, "the median is 37 without ties"
    now = await loop.releases.read()
    assert (now.stable, now.previous, now.canary, now.by) == (2, 1, None, "guard")
    entry = (await loop.releases.history(1))[0]
    assert (entry.verb, entry.by, entry.accepted) == ("promote", "guard", True)
    assert "the canary is better" in entry.reason and "20 decides" in entry.reason
    assert (await guard.look()).done is None, "the next look finds nothing to do"


async def test_a_bad_canary_is_dropped_by_what_people_say(loop: Loop) -> None:
    """As bad as the trial's reward-hacked policy: preferred in 26 of 100."""
    release = await loop.begin(2)
    done, judged = await loop.judge(await loop.guard(), release, labelers(0.26), 300)
    assert done is not None and done.verb == "rollback" and "the canary is worse" in done.reason
    assert judged <= 120
    now = await loop.releases.read()
    assert (now.stable, now.canary, now.by) == (1, None, "guard")


async def test_a_canary_that_lost_one_kind_of_task_is_not_promoted(loop: Loop) -> None:
    """It refuses known questions and wins at the rest: not worse over all, and not good enough."""
    settings = PROMOTING.model_copy(update={"verdict": VerdictSettings(margin=0.1, max_comparisons=100)})
    release = await loop.begin(2)
    guard = await loop.guard(settings=settings)
    rest = itertools.cycle([1, 1, -1, 1])
    for number in range(100):
        known = number % 4 == 3
        outcome = (1 if number == 19 else -1) if known else next(rest)
        task = {"task": "known" if known else "rest"}
        await loop.feedback.append(blind(outcome, number, release, metadata=task))
        if known:
            assert (await guard.look()).done is None
    seen = (await guard.look()).verdict
    assert seen.wealth_not_worse >= 20 and seen.decision == "undecided" and seen.held
    assert [(one.task, one.wins, one.losses) for one in seen.tasks_down] == [("known", 1, 24)]
    assert (await operations.current_verdict(loop.feedback, release, settings.verdict)) == seen
    with pytest.raises(TransitionRefused, match=r"down on known \(1 of 25 won\)"):
        await loop.releases.change(operations.promote_canary(seen), verb="promote", by="ann", reason="")


async def test_every_fifth_promotion_must_be_of_a_better_version(loop: Loop) -> None:
    not_worse = Verdict(decision="not_worse")
    for number in (2, 3, 4, 5):
        await loop.begin(number)
        promote = operations.promote_canary(not_worse)
        await loop.releases.change(promote, verb="promote", by="guard", reason=not_worse.sentence())
    settings = PROMOTING.model_copy(update={"verdict": VerdictSettings(margin=0.2)})
    release = await loop.begin(6)
    guard = await loop.guard(settings=settings)
    even = iter([1, -1] * 60)
    done, _ = await loop.judge(guard, release, lambda: next(even), 100)
    verdict = (await guard.look()).verdict
    assert done is None and (verdict.decision, verdict.must_be_better) == ("not_worse", True)
    history = await loop.releases.history(HISTORY)
    assert await operations.current_verdict(loop.feedback, release, settings.verdict, history) == verdict
    done, _ = await loop.judge(guard, release, lambda: 1, 100)
    assert done is not None and "the canary is better" in done.reason


async def test_a_changed_mind_counts_once_and_what_is_erased_not_at_all(loop: Loop) -> None:
    release = await loop.begin(2)
    guard = await loop.guard()
    for number in range(12):
        who = "bob" if number < 4 else "alice"
        await loop.feedback.append(blind(1 if number % 2 else -1, number, release, principal=who))
    seen = (await guard.look()).verdict
    assert (seen.comparisons, seen.wins) == (12, 6)
    await loop.feedback.append(blind(-1, 11, release))
    await loop.feedback.append(blind(1, 10, release, task_id="task_again"))  # a repeat measures the labeler
    seen = (await guard.look()).verdict
    assert (seen.comparisons, seen.wins) == (12, 5)
    erasure = Erasure(id=new_id("era_"), created=0.0, principal="operator", erased=name_digest("bob"))
    await loop.feedback.append(erasure)
    seen = (await guard.look()).verdict
    assert (seen.comparisons, seen.wins) == (8, 3)


async def test_the_evidence_of_one_canary_is_not_the_next_ones(loop: Loop) -> None:
    release = await loop.begin(2)
    guard = await loop.guard()
    await loop.feedback.append(blind(1, 1, release))
    assert (await guard.look()).verdict.comparisons == 1
    await loop.releases.change(rollback, verb="rollback", by="ann", reason="")
    assert (await guard.look()).verdict == Verdict()
    await asyncio.sleep(0.01)
    await loop.begin(2)
    assert (await guard.look()).verdict.comparisons == 0


async def test_a_look_reads_only_what_is_new(loop: Loop) -> None:
    release = await loop.begin(2)
    guard = await loop.guard()
    await asyncio.gather(*(loop.feedback.append(blind(1 - 2 * (n % 2), n, release)) for n in range(400)))
    assert (await guard.look()).verdict.comparisons == 400
    with SyncRedis.from_url(loop.url, decode_responses=True) as redis:
        redis.config_resetstat()
        await guard.look()
        await loop.feedback.append(blind(1, 1000, release))
        assert (await guard.look()).verdict.comparisons == 401
        stats = redis.info("commandstats")
    assert stats["cmdstat_xrange"]["calls"] <= 3, "a few entries, not the four hundred again"


async def test_what_was_read_before_redis_went_away_counts_when_it_is_back(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = await loop.begin(2)
    guard = await loop.guard()
    await asyncio.gather(*(loop.feedback.append(blind(1 - 2 * (n % 2), n, release)) for n in range(60)))
    whole = loop.feedback.batches

    async def broken_off(after: str, size: int) -> AsyncIterator[list[LogEntry]]:
        async for batch in whole(after, size):
            yield batch
        monkeypatch.undo()
        raise StoreUnavailable("Redis has gone before the end of the log was seen")

    monkeypatch.setattr(loop.feedback, "batches", broken_off)
    with pytest.raises(StoreUnavailable):
        await guard.look()
    assert (await guard.look()).verdict.comparisons == 60


async def test_of_many_guards_one_acts_and_the_log_has_one_entry(loop: Loop) -> None:
    release = await loop.begin(2)
    names = [f"host-{place}" for place in range(4)]
    guards = [await loop.guard(name) for name in names]
    for number in range(40):
        await loop.feedback.append(blind(-1, number, release))
    for _ in range(3):
        looks = await asyncio.gather(*(guard.look() for guard in guards[::-1]))
        assert sum(look.done is not None for look in looks) <= 1
        await asyncio.sleep(0.05)
    assert [entry.by for entry in await loop.releases.history(10) if entry.verb == "rollback"] == ["guard"]


async def test_where_the_first_server_hangs_the_next_one_acts(loop: Loop) -> None:
    release = await loop.begin(2)
    await loop.guard("a")  # reports, and never looks
    second = await loop.guard("b")
    for number in range(40):
        await loop.feedback.append(blind(-1, number, release))
    assert (await second.look()).done is None
    await asyncio.sleep(2 * PROMOTING.guard_seconds)
    done = (await second.look()).done
    assert done is not None and done.verb == "rollback"


async def test_an_operator_who_was_quicker_is_not_undone(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release changes between the guard's look and its change: version 1 must not go as well."""
    release = await loop.begin(2)
    guard = await loop.guard()
    for number in range(40):
        await loop.feedback.append(blind(-1, number, release))
    operator = ReleaseStore.connect(loop.url, loop.state)
    replicas = loop.releases.replicas

    async def meanwhile() -> list[ReplicaReport]:
        await operator.change(rollback, verb="rollback", by="ann", reason="I saw it, too")
        return await replicas()

    monkeypatch.setattr(loop.releases, "replicas", meanwhile)
    assert (await guard.look()).done is None
    await operator.close()
    now = await loop.releases.read()
    assert (now.stable, now.canary, now.by) == (1, None, "ann")
