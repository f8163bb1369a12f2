"""The training worker: waits for comparisons, takes the lease, runs a round, and starts over.

Training runs in a thread; the event loop keeps the lease alive and watches the log. Whatever stops a round short of its
end (SIGTERM, a lost lease, a kill) leaves it to be resumed, by this worker or another on the same state directory. A
round that ended, well or badly, has used up its comparisons as a reason to start one; they stay in the log and are
learnt from in the next. After one that failed the worker waits, longer each time. A reward model that came out of it
says which prompts labelers should see next.

What the log says is erased is taken out of every frozen dataset at the next look, before anything else is done; a
round that is under way with it begins again without it.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from deploy.errors import DeployError, LeaseLost, ReleaseUnavailable
from deploy.operations import start_canary
from deploy.registry import Registry
from deploy.settings import DeploySettings
from deploy.signatures import Signatures
from deploy.versions import Draft, Version, VersionKind
from feedback.errors import FeedbackError
from feedback.records import PooledPrompt, name_digest
from feedback.removal import position
from feedback.store import LogEntry
from train.batches import RankedPrompt
from train.encoding import encoder_of
from train.errors import TrainError
from train.rounds import frozen
from train.rounds.backoff import Backoff
from train.rounds.datasets import Dataset, build
from train.rounds.erasures import Erasures
from train.rounds.frozen import Frozen
from train.rounds.log_watch import LogWatch, log_until
from train.rounds.own_completions import among_held_out
from train.rounds.repeating import meanwhile
from train.rounds.round import Round
from train.rounds.run_progress import RunProgress
from train.rounds.runs import Outcome, Plan, RunDirectory
from train.rounds.stores import Stores
from train.rounds.uncertain_prompts import informative
from train.rounds.worker_metrics import WorkerMetrics
from train.running.board import Board
from train.settings import TrainSettings, WorkerSettings

_LOGGER = logging.getLogger(__name__)
POOL_PROMPTS = 10_000
"""Most stored prompts a round reads beside those of its comparisons."""


class Stopped(Exception):
    """The round has to stop where it is; the message says why. It can be resumed."""


@dataclass(frozen=True)
class _Material:
    """What a dataset is built from: the log's records, and stored prompts."""

    entries: list[LogEntry]
    pool: list[PooledPrompt]


class Worker:
    """Trains whenever there is enough to learn from. ``stop`` may be set from anywhere."""

    def __init__(self, state: Path, stores: Stores, settings: TrainSettings, deploy: DeploySettings) -> None:
        self.stop = threading.Event()
        self.metrics = WorkerMetrics()
        self._state = state
        self._stores = stores
        self._settings = settings
        self._deploy = deploy
        self._registry = Registry(state, Signatures.of(deploy.signing))
        self._watch = LogWatch(stores.feedback)
        self._erasures = Erasures(state, self._watch)
        self._erased = threading.Event()
        self._backoff = Backoff(settings.worker.backoff_seconds, settings.worker.max_backoff_seconds)
        self._backoff.resume(RunDirectory.all(state))
        self.metrics.show(self._backoff)

    async def run(self) -> None:
        """Work until told to stop. Redis gone, or a full disk, is waited out."""
        poll_seconds = self._settings.worker.poll_seconds
        while not self.stop.is_set():
            try:
                await self.step()
            except (DeployError, FeedbackError, OSError) as error:
                wait = max(poll_seconds, self._backoff.seconds_left)
                _LOGGER.warning("the worker cannot work now, and tries again in %.0f s: %s", wait, error)
            await asyncio.to_thread(self.stop.wait, poll_seconds)

    async def step(self) -> Outcome | None:
        """Run a round if one is due and nobody else is training. None where there was none, or it was interrupted.

        Raises:
            DeployError: The registry or the release cannot be used now.
            FeedbackError: The log cannot be read now.
            OSError: The disk cannot be used now.
        """
        due = await self._look()
        if not due and not self._erasures.pending():
            return None
        if not await self._stores.lease.acquire():
            _LOGGER.info("there is work, but another worker holds the lease, or held it until it was killed")
            return None
        self.metrics.lease_held.set(1)
        try:
            async with self._renewing():
                await asyncio.to_thread(self._erasures.apply)
                # Looked at again: whoever held the lease until now may have done this round.
                if not await self._look():
                    return None
                return await self._finish(self._unfinished() or await self._begin())
        finally:
            self.metrics.lease_held.set(0)
            with contextlib.suppress(LeaseLost, ReleaseUnavailable):
                await self._stores.lease.release()

    async def _look(self) -> bool:
        """Read the log on; True where a round is to be finished or due now, and no failure is to be waited out."""
        cursor, since = self._last_round()
        waiting = await self._watch.look(cursor)
        self.metrics.waiting.set(waiting)
        self.metrics.looked.set_to_current_time()
        if self._backoff.seconds_left:
            return False
        if self._unfinished() is not None:
            return True
        release = await self._stores.releases.read()
        return release.stable is not None and is_due(waiting, time.time() - since, self._settings.worker)

    def _unfinished(self) -> RunDirectory | None:
        return next((run for run in RunDirectory.all(self._state) if run.outcome is None), None)

    def _last_round(self) -> tuple[str, float]:
        """The cursor of the newest round, and when it ended (unix seconds); else of the newest version."""
        rounds = [
            (run.plan.cursor, outcome.finished)
            for run in RunDirectory.all(self._state)
            if (outcome := run.outcome) is not None
        ]
        versions = self._registry.list(VersionKind.POLICY)
        rounds += [(version.manifest.feedback_cursor, version.manifest.created.timestamp()) for version in versions]
        cursor = max((cursor for cursor, _ in rounds), key=position, default="0-0")
        return cursor, max((finished for _, finished in rounds), default=0.0)

    async def _begin(self) -> RunDirectory:
        """Plan a round at the log's present end."""
        release = await self._stores.releases.read()
        cursor = await self._stores.feedback.head()
        parent = self._registry.get(VersionKind.POLICY, release.stable or 0)
        reference = parent.manifest.reference_policy or parent.number
        fitted = [
            version.number
            for version in self._registry.list(VersionKind.REWARD_MODEL)
            if version.manifest.reference_policy == reference
        ]
        plan = Plan(
            run=f"round-{cursor}",
            cursor=cursor,
            parent=parent.number,
            reference=reference,
            first_reward_model=fitted[0] if fitted else None,
            previous_reward_model=fitted[-1] if fitted else None,
        )
        for ended in RunDirectory.all(self._state):
            ended.forget()  # of a worker that was killed right after it had written how its round ended
        directory = RunDirectory(self._state / "runs" / plan.run)
        directory.begin(plan)
        _LOGGER.info("%s: begins from policy %d", plan.run, plan.parent)
        return directory

    async def _finish(self, directory: RunDirectory) -> Outcome | None:
        """Run what is left of a round and write down how it ended."""
        plan, ended = directory.plan, None
        self.metrics.begin_round()
        try:
            work = directory.claim(self._stores.lease.token or 0)
            directory.begin_attempt(work)
            async with self._watching(directory):
                loop = asyncio.get_running_loop()
                outcome = await asyncio.to_thread(self._train, directory, work, loop)
            await self._stores.lease.check()
            directory.conclude(outcome, work)
            ended = outcome
        except Stopped as reason:
            _LOGGER.info("%s: stopped, and will be resumed: %s", plan.run, reason)
        except LeaseLost as error:
            _LOGGER.warning("%s: left to whoever holds the lease now: %s", plan.run, error)
        except (DeployError, FeedbackError, OSError) as error:
            self._failed(error)
            directory.end_attempt()
            raise
        finally:
            self.metrics.end_stage(stopped=ended is None)
        directory.end_attempt()  # not after an error nobody foresaw: whoever starts the worker again may meet it again
        if ended is None:
            return None
        self.metrics.ended(ended)
        if ended.status != "failed":
            self._backoff.succeeded()
        _LOGGER.info("%s: %s %s", plan.run, ended.status, "; ".join(ended.reasons))
        await self._canary(ended, plan)
        await self._score_pool(ended, plan)
        return ended

    def _train(self, directory: RunDirectory, work: Path, loop: asyncio.AbstractEventLoop) -> Outcome:
        """In the training thread: the round, and what went wrong in it as its outcome.

        Memory that runs out, or a device that fails, ends the round and not the worker.
        """
        plan, shown = directory.plan, RunProgress(directory.path)
        with Board(directory.path) as board:

            def progress(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
                self._check()
                for show in (shown, self.metrics, board):
                    show(stage, done, total, numbers)

            try:
                progress("dataset", 0, 1, {})
                for version in plan.origins(self._registry):
                    self._registry.verify(version)
                dataset = self._frozen(directory, loop)
                publish = self._publisher(loop)
                return Round(
                    plan,
                    work,
                    dataset,
                    self._registry,
                    self._settings,
                    self._deploy.gate,
                    own=partial(self._own, plan, dataset.dataset, loop),
                    publish=publish,
                    progress=progress,
                ).run()
            except TrainError as error:
                self._failed(error)
                return Outcome(status="failed", reasons=(str(error),))
            except SafetensorError as error:  # of reading, it would be a TrainError
                raise OSError(f"weights could not be written: {error}") from error
            except (MemoryError, RuntimeError) as error:  # PyTorch's own errors, of memory and devices, are the latter
                self._failed(error)
                _LOGGER.exception("%s: failed", plan.run)
                return Outcome(status="failed", reasons=(failure(error),))

    def _failed(self, error: Exception) -> None:
        self.metrics.failures.labels(type(error).__name__).inc()
        self._backoff.failed()

    async def _material(self, plan: Plan) -> _Material:
        """What the round's dataset is built from. Prompts of whom an erasure is not through with yet are left out."""
        erased = await self._stores.feedback.unfinished_erasures() | self._watch.erased_after(plan.cursor)
        pool = await self._stores.feedback.pool_prompts(POOL_PROMPTS)
        left = [one for one in pool if erased.isdisjoint(map(name_digest, (one.principal, one.prompt.asked_by or "")))]
        return _Material(await log_until(self._stores.feedback, plan.cursor), left)

    def _frozen(self, directory: RunDirectory, loop: asyncio.AbstractEventLoop) -> Frozen:
        """The round's dataset: as it was frozen when the round began, or else built, and frozen now."""
        if directory.dataset.exists():
            return frozen.thaw(directory.dataset)
        material = asyncio.run_coroutine_threadsafe(self._material(directory.plan), loop).result()
        encoder = encoder_of(self._registry.get(VersionKind.POLICY, directory.plan.parent), self._settings)
        dataset = build(material.entries, material.pool, encoder, self._settings.worker)
        self._check()
        return frozen.freeze(dataset, directory.dataset)

    def _own(self, plan: Plan, dataset: Dataset, loop: asyncio.AbstractEventLoop) -> list[RankedPrompt]:
        """In the training thread: comparisons of the parent's own completions that nothing learns from."""
        entries = asyncio.run_coroutine_threadsafe(log_until(self._stores.feedback, plan.cursor), loop).result()
        encoder = encoder_of(self._registry.get(VersionKind.POLICY, plan.parent), self._settings)
        return among_held_out(entries, dataset, plan.parent, encoder)

    def _publisher(self, loop: asyncio.AbstractEventLoop) -> Callable[[Draft, Path], Version]:
        """For the training thread: publishes under the lease, and logs it, both through the event loop."""

        def check_fence() -> None:
            asyncio.run_coroutine_threadsafe(self._stores.lease.check(), loop).result()

        def publish(draft: Draft, source: Path) -> Version:
            version = self._registry.publish(draft, source, check_fence=check_fence)
            logged = self._stores.releases.record_publish(version, self._stores.lease.token)
            asyncio.run_coroutine_threadsafe(logged, loop).result()
            return version

        return publish

    async def _canary(self, outcome: Outcome, plan: Plan) -> None:
        """Give a version that passed its share of traffic, where the settings say so."""
        fraction = self._settings.worker.canary_fraction
        if outcome.status != "passed" or outcome.policy is None or not fraction:
            return
        try:
            await self._stores.releases.change(
                start_canary(self._registry, outcome.policy, fraction),
                verb="canary",
                by="worker",
                reason=f"{plan.run} passed its gate",
            )
        except DeployError as error:
            _LOGGER.warning("version %d gets no traffic: %s", outcome.policy, error)

    async def _score_pool(self, outcome: Outcome, plan: Plan) -> None:
        """Have the round's reward model say on which prompts it is unsure; labelers are shown those first."""
        count = self._settings.worker.score_pool_prompts
        if outcome.reward_model is None or count == 0 or self.stop.is_set():
            return
        try:
            asked = await self._stores.feedback.prompts_to_score(count)
            policy = self._registry.get(VersionKind.POLICY, plan.parent)  # the stable one, which labelers are shown
            fitted = self._registry.get(VersionKind.REWARD_MODEL, outcome.reward_model)
            nats = await asyncio.to_thread(informative, asked, policy, fitted, self._settings, plan.seed)
            await self._stores.feedback.score_prompts(nats)
        except (DeployError, FeedbackError, TrainError, MemoryError, RuntimeError) as error:
            _LOGGER.warning("%s: no prompts are scored for labelers: %s", plan.run, error)

    def _check(self) -> None:
        """In the training thread, after each step: may it go on?"""
        if self.stop.is_set():
            raise Stopped("the worker was told to stop")
        if self._erased.is_set():
            raise Stopped("something in its dataset was erased")
        self._stores.lease.check_time()

    def _watching(self, directory: RunDirectory) -> contextlib.AbstractAsyncContextManager[None]:
        """Read the log on inside; where something is erased that the round trains on, ``_check`` ends the training."""
        self._erased.clear()
        cursor, known = directory.plan.cursor, -1

        async def watch() -> bool:
            nonlocal known
            try:
                self.metrics.waiting.set(await self._watch.look(cursor))
                erased = len(self._watch.erased_after(cursor))
                if erased != known and directory.dataset.exists():
                    known = erased
                    if await asyncio.to_thread(self._erasures.concern, directory):
                        self._erased.set()
            except (FeedbackError, TrainError) as error:
                _LOGGER.warning("the log could not be watched for erasures: %s", error)
            return not self._erased.is_set()

        return meanwhile(watch, self._settings.worker.poll_seconds)

    def _renewing(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep the lease inside; where that fails for a whole term, ``_check`` ends the training."""

        async def renew() -> bool:
            try:
                await self._stores.lease.renew()
            except ReleaseUnavailable as error:
                _LOGGER.warning("the training lease could not be renewed: %s", error)
            except LeaseLost as error:
                _LOGGER.warning("%s", error)
                return False
            return True

        return meanwhile(renew, self._settings.worker.lease_seconds / 3)


def is_due(comparisons: int, seconds: float, settings: WorkerSettings) -> bool:
    """Whether so many new comparisons, so long after the last round, are reason for a round."""
    if comparisons >= settings.min_new_comparisons:
        return True
    return comparisons > 0 and seconds >= settings.interval_seconds


def failure(error: MemoryError | RuntimeError) -> str:
    """What an error of the machine is called in a round's outcome."""
    text = str(error).strip().partition("\n")[0]
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return f"out of memory: {text or type(error).__name__}" if out_of_memory else f"{type(error).__name__}: {text}"
