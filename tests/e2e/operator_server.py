"""A server to operate: its own app over a real registry and a real Redis, where stub engines stand in for vLLM's."""

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from labeling_server import LabelingServer, serving
from prometheus_client import CollectorRegistry

from deploy import release as transitions
from deploy.gate import GateCheck, GateFigure, GateReport
from deploy.registry import Registry, ReleaseStore
from deploy.release import Attempt, Release, ReplicaReport
from deploy.versions import Draft, VersionKind
from feedback.principals import Scope
from feedback.records import Candidate, Comparison, Prompt, new_id
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

Result = TypeVar("Result")

GATE = {
    "kl_to_reference": (1.2, 6.0),
    "eos_share": (0.98, 0.95),
    "distinct_2": (0.61, 0.3),
    "pretraining_loss": (2.31, 2.4),
}
"""Numbers and limits of a good version."""


class StubEngine:
    """What a fleet asks of an engine, without one: it samples nothing."""

    running = 0
    dead = suspect = False
    silent_seconds = 0.0

    def __init__(self) -> None:
        self.metrics = CollectorRegistry()

    @classmethod
    async def start(cls, *_: object) -> Self:
        """As ``Engine.start``, at once."""
        return cls()

    async def probe(self, seconds: float) -> None:
        """It answers."""

    async def check_canary_prompts(self) -> None:
        """It agrees."""

    async def close(self) -> None:
        """Nothing to end."""

    async def kill(self) -> None:
        """Nothing to end."""


@dataclass
class OperatedServer:
    """A running one: version 1 is stable, 2 passed its gate, 3 did not."""

    server: LabelingServer
    state: Path

    @property
    def url(self) -> str:
        """Of the operator's page."""
        return f"{self.server.url}/operator"

    def on_release(self, act: Callable[[ReleaseStore], Awaitable[Result]]) -> Result:
        """Do something with the release as another process would."""

        async def connected() -> Result:
            releases = ReleaseStore.connect(self.server.redis_url, self.state)
            try:
                return await act(releases)
            finally:
                await releases.close()

        return self.server.run(connected())

    def change(self, transition: Callable[[Release], Release], verb: str, by: str, reason: str = "") -> Release:
        """Move the release as somebody else."""
        return self.on_release(lambda releases: releases.change(transition, verb=verb, by=by, reason=reason))

    def start_canary(self, number: int = 2, fraction: float = 0.1, reason: str = "") -> Release:
        """Let a version serve a share, without asking its gate."""
        return self.change(partial(transitions.canary, number=number, fraction=fraction), "canary", "carl", reason)

    def log(self) -> list[Attempt]:
        """The audit log, newest first."""
        return self.on_release(lambda releases: releases.history())

    def report(self, *reports: ReplicaReport) -> None:
        """What other servers say of themselves; forgotten after a minute."""

        async def tell(releases: ReleaseStore) -> None:
            for one in reports:
                await releases.report(one, ttl_seconds=60)

        self.on_release(tell)

    def compare(self, version: int, over: int, outcomes: Sequence[int], task: str | None = None) -> None:
        """Blind comparisons of two versions: 1 the first won, -1 it lost, 0 a tie."""

        async def append() -> None:
            store = FeedbackStore.connect(self.server.redis_url, FeedbackSettings())
            try:
                for place, outcome in enumerate(outcomes):
                    await store.append(_comparison(version, over, outcome, f"question {place}", task))
            finally:
                await store.close()

        self.server.run(append())

    def make_key(self, *scopes: Scope) -> str:
        """The text of a new key, which the server asks for from now on."""
        key = self.server.make_key(*scopes)
        self.server.run(self.server.app.state.services.access.refresh())
        return key


def _comparison(version: int, over: int, outcome: int, prompt: str, task: str | None) -> Comparison:
    both = (
        Candidate(completion_id=new_id("cmpl-"), policy_version=version, text="ours"),
        Candidate(completion_id=new_id("cmpl-"), policy_version=over, text="theirs"),
    )
    return Comparison(
        id=new_id("cmp_"),
        created=1.5,
        principal="alice",
        labeler="L-1",
        prompt=Prompt(text=prompt),
        source="task",
        task_id=new_id("task_"),
        candidates=both,
        ranking={1: ((0,), (1,)), -1: ((1,), (0,)), 0: ((0, 1),)}[outcome],
        metadata={"task": task} if task else {},
    )


def outcomes(wins: int, losses: int, ties: int = 0) -> list[int]:
    """So many of each, in an order that is the same every time."""
    drawn = [1] * wins + [-1] * losses + [0] * ties
    random.Random(7).shuffle(drawn)
    return drawn


def gate(**failed: float) -> GateReport:
    """A report on which only the checks named fail, with these numbers."""
    checks = [
        GateCheck(
            name=name,
            passed=name not in failed,
            value=failed.get(name, value),
            limit=limit,
            sentence=f"{name} is {failed.get(name, value)}; the limit is {limit}",
        )
        for name, (value, limit) in GATE.items()
    ]
    told = GateFigure(name="win_rate_reward_model", value=0.55, sentence="win_rate_reward_model is 0.55")
    return GateReport.of([*checks, told])


def publish(state: Path, model: Path, **draft: Any) -> None:
    """Publish a version that no engine could load."""
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    Registry(state).publish(Draft(kind=VersionKind.POLICY, **draft), model)


@contextmanager
def operated(redis_url: str, state: Path, model: Path) -> Iterator[OperatedServer]:
    """The app in a thread of its own, whose fleet starts stub engines."""
    publish(state, model)
    publish(state, model, parent=1, comparisons=1200, gate=gate())
    publish(state, model, parent=2, comparisons=2400, gate=gate(kl_to_reference=19.2))
    with pytest.MonkeyPatch.context() as patch, serving(redis_url, state) as server:
        from serve import fleet  # imports vLLM; ``serving`` has, too

        patch.setattr(fleet, "Engine", StubEngine)
        operated = OperatedServer(server, state)
        operated.change(partial(transitions.first, number=1), "first", "carl", "the first")
        yield operated
