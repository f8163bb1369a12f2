"""``make demo``: one whole turn of the loop, lived through over HTTP by simulated people while traffic never stops.

A base model is pretrained and fine-tuned into version 1; people rank its completions; the worker refits the
reward model, runs PPO-ptx, gates and publishes version 2; blind comparisons decide about it; it is promoted,
rolled back and promoted again. What it was worth is then measured by the hidden gold utility on held-out prompts.

Exit 0 only if no request failed, version 2 is released and its win rate's lower bound is above 0.6.
"""

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.errors import DeployError
from deploy.operations import current_verdict
from deploy.registry import Registry, ReleaseStore
from deploy.settings import DeploySettings
from deploy.up import LocalLoop, running
from deploy.verdict import Verdict
from deploy.versions import VersionKind
from feedback.controls import in_force
from feedback.errors import FeedbackError
from feedback.records import Comparison
from feedback.settings import FeedbackSettings, LoopSettings
from feedback.store import FeedbackStore
from train import report
from train.errors import TrainError
from train.tinyworld import evaluation, labelers, tasks
from train.tinyworld.crowd import Crowd
from train.tinyworld.study import SETTINGS_FILE

COMPARISONS = 4000
"""Rankings of K completions that version 2 learns from."""
K = 6
DEMONSTRATIONS = 300
"""Completions people write; they set the zero of the reward model's scale."""
BLIND_BATCH = 50
"""Blind pairs between two looks at the verdict, which is valid however often one looks."""
TEST_PROMPTS = 1000
SAMPLE_SETS = 3
LOWER_BOUND = 0.6
"""The win rate's lower 95 % bound must be above this."""
VISITORS = 3


class DemoFailed(TrainError):
    """A step of the demo did not come about; the message says which and where to look."""


@dataclass
class Outcome:
    """What the demo found, as it is written to ``summary.json``."""

    seed: int
    stage_seconds: dict[str, float] = field(default_factory=dict)
    comparisons: int = 0
    promote_seconds: float = 0.0
    rollback_seconds: float = 0.0
    promote_again_seconds: float = 0.0
    stable_version: int = 0
    win_rate: dict[str, float] = field(default_factory=dict)
    win_rate_by_task: dict[str, float] = field(default_factory=dict)
    rm_accuracy: float = 0.0
    kl: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    requests_total: int = 0
    requests_failed: int = 0
    minutes: float = 0.0
    report: str = ""

    @property
    def passed(self) -> bool:
        """Whether the loop did what it is for."""
        return self.requests_failed == 0 and self.stable_version == 2 and self.win_rate.get("low", 0.0) > LOWER_BOUND


class Demo:
    """One run: a stage a method, in the order in which they happen."""

    def __init__(self, local: LocalLoop, seed: int, console: Console) -> None:
        self.outcome = Outcome(seed)
        self._local = local
        self._seed = seed
        self._console = console
        self._registry = Registry(local.state)
        self._crowd = Crowd(local.url, labelers.population(40, seed))
        self._rng = random.Random(f"demo {seed}")

    async def run(self) -> Outcome:
        """All stages. Raises DemoFailed, or what a process or request raises."""
        began = time.monotonic()
        self._first_policy()
        async with self._crowd, self._visitors():
            await self._compare()
            await self._learn()
            await self._canary()
            await self._promote_roll_back_and_promote_again()
            await self._measure()
        stored = await self._stored_comparisons()
        self.outcome.comparisons = len(stored)
        self.outcome.requests_total = self._crowd.tally.requests
        self.outcome.requests_failed = self._crowd.tally.failed
        self.outcome.minutes = (time.monotonic() - began) / 60
        judged = in_force(stored).ordinary
        self.outcome.report = str(report.write(self._registry, 2, self._local.state / "runs", comparisons=judged))
        return self.outcome

    def _first_policy(self) -> None:
        seed = ("--seed", str(self._seed))
        with self._stage("pretrain"):
            self._local.run("train", "pretrain", *seed)
        with self._stage("fine-tune"):
            self._local.start("serve", "serve", "--port", self._local.url.rpartition(":")[2])
            self._local.run("train", "sft", *seed)
        with self._stage("start serving"):
            self._local.start("worker", "train", "worker")
            self._local.wait_ready()

    @contextlib.asynccontextmanager
    async def _visitors(self) -> AsyncIterator[None]:
        visitors = [asyncio.create_task(self._crowd.visit(number, pause_seconds=0.3)) for number in range(VISITORS)]
        try:
            yield
        finally:
            for visitor in visitors:
                visitor.cancel()
            await asyncio.gather(*visitors, return_exceptions=True)

    async def _compare(self) -> None:
        asked = [tasks.draw(self._rng, test=False) for _ in range(COMPARISONS)]
        with self._stage("compare"), self._bar("people rank completions", COMPARISONS) as bar:
            # Before the comparisons, because the worker starts as soon as there are enough of those.
            await self._crowd.demonstrate(asked[:DEMONSTRATIONS], self._seed, lambda: None)
            await self._crowd.compare(asked, K, bar.advance)

    async def _learn(self) -> None:
        """Wait for the worker to publish version 2."""
        with self._stage("learn"), self._bar("the worker learns", None) as bar:
            while self._registry.numbers(VersionKind.POLICY) == [1]:
                self._local.check()
                bar.say(_worker_progress(self._local.state))
                if refused := _round_outcome(self._local.state):
                    raise DemoFailed(f"the worker published no version 2: {refused}")
                await asyncio.sleep(0.5)
        policy = self._registry.get(VersionKind.POLICY, 2).manifest
        reward_model = self._registry.get(VersionKind.REWARD_MODEL, policy.reward_model or 1).manifest
        self.outcome.kl = policy.metrics["kl_to_reference"]
        self.outcome.rm_accuracy = reward_model.metrics["held_out_accuracy"]

    async def _canary(self) -> None:
        with self._stage("canary"):
            await self._operate("canary", "2", "--fraction", "0.3")
        limit = DeploySettings.load().verdict.max_comparisons
        with self._stage("blind pairs"), self._bar("people judge blind pairs", limit) as bar:
            verdict = Verdict()
            while verdict.decision not in ("better", "worse") and verdict.comparisons < limit:
                asked = [tasks.draw(self._rng, test=False) for _ in range(BLIND_BATCH)]
                await self._crowd.judge_blind(asked, bar.advance)
                verdict = await self._verdict()
                bar.say(verdict.sentence())
        self.outcome.verdict = verdict.model_dump()

    async def _promote_roll_back_and_promote_again(self) -> None:
        """Each timed from the operator's command to the first completion of the version it brings."""
        with self._stage("promote, roll back, promote"):
            self.outcome.promote_seconds = await self._until_served(2, "promote")
            self.outcome.rollback_seconds = await self._until_served(1, "rollback")
            why = "the demo rolled back a version that blind pairs had found better"
            await self._operate("canary", "2", "--fraction", "0.3")
            self.outcome.promote_again_seconds = await self._until_served(2, "promote", "--override", why)
            releases = ReleaseStore.connect(self._local.redis_url, self._local.state)
            self.outcome.stable_version = (await releases.read()).stable or 0
            await releases.close()

    async def _measure(self) -> None:
        asked = evaluation.held_out_tasks(TEST_PROMPTS)
        with self._stage("measure"), self._bar("held-out prompts", 2 * TEST_PROMPTS) as bar:
            before = await self._crowd.sample_sets(asked, "policy-v1", SAMPLE_SETS, bar.advance)
            after = await self._crowd.sample_sets(asked, "policy-v2", SAMPLE_SETS, bar.advance)
            win = evaluation.win_rate(asked, after, before)
        self.outcome.win_rate = {"mean": win.mean, "low": win.low, "high": win.high}
        self.outcome.win_rate_by_task = win.by_task
        self.outcome.before = evaluation.quality(asked, before)
        self.outcome.after = evaluation.quality(asked, after)

    async def _operate(self, *arguments: str) -> None:
        """Run an operator's command, and wait until the server has followed it."""
        command = [sys.executable, "-m", "deploy", *arguments, "--json"]
        process = await asyncio.create_subprocess_exec(
            *command, env=self._local.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        said, complained = await process.communicate()
        if process.returncode:
            raise DemoFailed(f"python -m deploy {' '.join(arguments)}: {(said + complained).decode()}")
        await asyncio.to_thread(self._local.wait_ready, json.loads(said)["generation"])

    async def _until_served(self, version: int, *command: str) -> float:
        began = time.monotonic()
        await self._operate(*command)
        await self._crowd.answered_by(version)
        return time.monotonic() - began

    async def _stored_comparisons(self) -> list[Comparison]:
        """The log's comparisons. Raises DemoFailed where one that was acknowledged is not among them."""
        store = FeedbackStore.connect(self._local.redis_url, FeedbackSettings.load())
        try:
            stored = [entry.record async for entry in store.scan() if isinstance(entry.record, Comparison)]
        finally:
            await store.close()
        if lost := self._crowd.acknowledged - {record.id for record in stored}:
            raise DemoFailed(f"{len(lost)} acknowledged comparisons are not in the log")
        return stored

    async def _verdict(self) -> Verdict:
        store = FeedbackStore.connect(self._local.redis_url, FeedbackSettings.load())
        releases = ReleaseStore.connect(self._local.redis_url, self._local.state)
        try:
            return await current_verdict(store, await releases.read(), DeploySettings.load().verdict)
        finally:
            await store.close()
            await releases.close()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"{name} …")
        yield
        seconds = self.outcome.stage_seconds[name] = time.monotonic() - began
        tally = self._crowd.tally
        self._console.print(f"{name:<28}{seconds:7.1f} s   {tally.requests:6d} requests, {tally.failed} failed")

    @contextlib.contextmanager
    def _bar(self, what: str, total: int | None) -> Iterator["_Bar"]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, TimeElapsedColumn(), console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            yield _Bar(progress, what, total)


class _Bar:
    def __init__(self, progress: Progress, what: str, total: int | None) -> None:
        self._progress = progress
        self._what = what
        self._task = progress.add_task(what, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=f"{self._what}: {text}")


def _worker_progress(state: Path) -> str:
    for written in sorted((state / "runs").glob("*/progress.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            now = json.loads(written.read_text())
            return f"{now['stage']} {now['done']}/{now['total']}"
    return "waiting for enough comparisons"


def _round_outcome(state: Path) -> str | None:
    """What the worker wrote of a round that published nothing."""
    for written in (state / "runs").glob("*/outcome.json"):
        outcome = json.loads(written.read_text())
        if outcome["status"] != "passed":
            return f"{outcome['status']}: {outcome['reasons']}"
    return None


def rows(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The outcome to read: what, version 1, version 2."""
    names = ("gold", "toxic", "false_claims", "answered_known", "refused_unknown", "unfinished", "words")
    return [
        *((name, f"{outcome.before[name]:.3f}", f"{outcome.after[name]:.3f}") for name in names),
        ("reward model accuracy, held out", "", f"{outcome.rm_accuracy:.3f}"),
        ("KL to version 1, nats per completion", "", f"{outcome.kl:.2f}"),
        ("comparisons recorded", "", str(outcome.comparisons)),
        ("requests served / failed", "", f"{outcome.requests_total} / {outcome.requests_failed}"),
        ("promote / roll back, seconds", "", f"{outcome.promote_seconds:.1f} / {outcome.rollback_seconds:.1f}"),
        ("minutes", "", f"{outcome.minutes:.1f}"),
    ]


def title(outcome: Outcome) -> str:
    """The one number."""
    win = outcome.win_rate
    return f"version 2 over version 1: {win['mean']:.3f} [{win['low']:.3f}, {win['high']:.3f}] by gold"


def show(outcome: Outcome, state: Path, console: Console) -> None:
    """Write ``summary.json``, and print the table."""
    (state / "summary.json").write_text(json.dumps(vars(outcome), indent=1))
    header = ("", "version 1", "version 2")
    shown = Table(*header, title=title(outcome))
    for row in rows(outcome):
        shown.add_row(*row)
    console.print(shown)
    console.print(f"written: {state / 'summary.json'}, {outcome.report}")


def demo(
    seed: Annotated[int, typer.Option(help="Of everything drawn, from the base model to the labelers.")] = 0,
    state: Annotated[Path | None, typer.Option(help="Directory of the demo, made anew; default state/demo.")] = None,
    port: Annotated[int, typer.Option(help="Port of the server on loopback.")] = 8765,
) -> None:
    """One whole improvement cycle with simulated labelers."""
    console = Console(highlight=False)
    try:
        state = (state or LoopSettings.load().state / "demo").resolve()
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        with running(LoopSettings(state=state, redis_url=None), port) as local:
            local.environment |= {
                "INSTRUCTLOOP_SETTINGS": str(SETTINGS_FILE),
                "INSTRUCTLOOP_TRAIN__WORKER__MIN_NEW_COMPARISONS": str(COMPARISONS),
                "INSTRUCTLOOP_TRAIN__WORKER__POLL_SECONDS": "1",
            }
            outcome = asyncio.run(Demo(local, seed, console).run())
    except (DeployError, FeedbackError, TrainError) as error:
        console.print(f"demo: {error}", style="red")
        raise typer.Exit(1) from error
    show(outcome, state, console)
    if not outcome.passed:
        console.print("the loop did not do what it is for: see the table", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(demo)
