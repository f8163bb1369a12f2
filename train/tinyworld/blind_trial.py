"""Simulated labelers compare two policies blindly, as they do over HTTP, until the verdict decides.

Completions are sampled beforehand, so that many crowds can judge them; what a crowd makes of them goes to
``deploy.verdict`` by itself, or through the feedback log to a server's guard.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from deploy import operations
from deploy import release as transitions
from deploy.arms import ArmFigures
from deploy.guard import Guard
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release, ReplicaReport
from deploy.settings import DeploySettings, VerdictSettings
from deploy.verdict import judge, tasks_down
from deploy.versions import Version
from feedback.records import Candidate, Comparison, Prompt, new_id
from feedback.store import FeedbackStore
from train.tinyworld.evaluation import SampleSet
from train.tinyworld.labelers import Labeler, Ranking
from train.tinyworld.tasks import Task

BATCH = 10
"""Comparisons between two looks of the guard."""


@dataclass(frozen=True)
class Judged:
    """One blind comparison.

    Attributes:
        task: what was asked.
        texts: the two completions in the order shown.
        canary: the place of the canary's, 0 or 1.
        ranking: what the labeler said of them.
        labeler: who that was.
    """

    task: Task
    texts: tuple[str, str]
    canary: int
    ranking: Ranking
    labeler: str

    @property
    def outcome(self) -> int:
        """1 where the canary was preferred, −1 where the stable version was, 0 for a tie."""
        if len(self.ranking) == 1:
            return 0
        return 1 if self.ranking[0] == (self.canary,) else -1


def comparisons(
    asked: Sequence[Task], ours: Sequence[SampleSet], theirs: Sequence[SampleSet], people: Sequence[Labeler], seed: int
) -> Iterator[Judged]:
    """Every completion of the canary once against one of the stable version, in random order by random labelers.

    Args:
        asked: N tasks.
        ours: the canary's completions of them, [sets][N].
        theirs: the stable version's, as many.
        people: who judge.
        seed: of the order of tasks, of places and of labelers.
    """
    rng = random.Random(f"blind trial {seed}")
    shown = [
        (task, one, other)
        for our_set, their_set in zip(ours, theirs, strict=True)
        for task, one, other in zip(asked, our_set, their_set, strict=True)
    ]
    rng.shuffle(shown)
    for task, one, other in shown:
        labeler, canary = rng.choice(people), rng.randrange(2)
        texts = (one.text, other.text) if canary == 0 else (other.text, one.text)
        # Who judges a blind task is not told how a completion ended.
        yield Judged(task, texts, canary, labeler.rank(task.instruction, texts, (True, True)), labeler.name)


def decide(judged: Sequence[Judged], settings: VerdictSettings) -> tuple[str, int]:
    """What the verdict is at the first look at which it is better or worse, and after how many comparisons that was.

    Without such a look it is the one after all of them; one that is not worse says which kinds of task it has lost,
    for which it would be held. Better and worse are final, so that look is searched by halves.
    """
    outcomes = [one.outcome for one in judged]
    decision = judge(outcomes, settings).decision
    if decision == "not_worse":
        down = tasks_down(outcomes, [one.task.name for one in judged], settings)
        return f"not_worse, down on {', '.join(one.task for one in down)}" if down else decision, len(judged)
    if decision == "undecided":
        return decision, len(judged)
    low, high = 1, len(outcomes)
    while low < high:
        middle = (low + high) // 2
        if judge(outcomes[:middle], settings).decision in ("better", "worse"):
            high = middle
        else:
            low = middle + 1
    return decision, low


async def guarded(
    releases: ReleaseStore,
    feedback: FeedbackStore,
    registry: Registry,
    version: Version,
    judged: Sequence[Judged],
    settings: DeploySettings,
) -> str:
    """What the guard does about a canary while people compare it, and after how many comparisons.

    A gate that refuses is overridden, as an operator might.

    Args:
        releases: empty; the release begins with version 1. Closed afterwards.
        feedback: the log; closed afterwards.
        registry: where the versions are.
        version: the canary.
        judged: what people say, in order.
        settings: limits, and what may happen without an operator.

    Raises:
        DeployError: the version cannot be a canary, whatever its gate says.
    """
    try:
        await releases.change(partial(transitions.first, number=1), verb="first", by="trials", reason="the demo's")
        start = operations.start_canary(registry, version.number, 0.3, override="a trial of what people would say")
        release = await releases.change(start, verb="canary", by="trials", reason="a trial")
        guard = Guard("trials", releases, feedback, settings)
        for place in range(0, len(judged), BATCH):
            batch = judged[place : place + BATCH]
            await asyncio.gather(*(feedback.append(_record(one, version.number)) for one in batch))
            await _report(releases, release)
            if (done := (await guard.look()).done) is not None:
                return f"guard after {place + len(batch)}: {done.verb}"
        return f"guard after {len(judged)}: nothing"
    finally:
        await feedback.close()
        await releases.close()


async def _report(releases: ReleaseStore, release: Release) -> None:
    """As a server that serves both versions well."""
    arms = dict.fromkeys(release.live(), ArmFigures())
    generation = release.generation
    await releases.report(
        ReplicaReport(replica="trials", generation=generation, wanted=generation, live=release.live(), arms=arms)
    )


def _record(one: Judged, canary: int) -> Comparison:
    candidates = tuple(
        Candidate(completion_id=new_id("cmpl_"), policy_version=canary if place == one.canary else 1, text=text)
        for place, text in enumerate(one.texts)
    )
    return Comparison(
        id=new_id("cmp_"),
        created=time.time(),
        principal="trials",
        labeler=one.labeler,
        prompt=Prompt(text=one.task.instruction),
        metadata={"task": one.task.name},
        source="task",
        task_id=new_id("task_"),
        candidates=candidates,
        ranking=one.ranking,
    )
