"""The training worker: waits for comparisons, takes the lease, runs a round, and starts over.

Training runs in a thread; the event loop keeps the lease alive. Whatever stops a round short of its end
(SIGTERM, a lost lease, a kill) leaves it to be resumed, by this worker or another on the same state
directory. A round that ended, well or badly, has used up its comparisons as a reason to start one; they stay
in the log and are learnt from in the next. A reward model that came out of it says which prompts labelers
should see next.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deploy.errors import DeployError, LeaseLost, ReleaseUnavailable
from deploy.files import replace_atomically
from deploy.operations import start_canary
from deploy.registry import Lease, Registry, ReleaseStore
from deploy.settings import DeploySettings
from deploy.versions import Draft, Version, VersionKind
from feedback.erasure import surviving
from feedback.errors import FeedbackError
from feedback.records import Comparison, PooledPrompt, Prompt
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore, LogEntry
from train import informativeness
from train.datasets import Dataset, Encoder, Unencodable, build, position
from train.errors import TrainError
from train.models import load_policy, load_tokenizer
from train.round import Outcome, Plan, Round, RunDirectory
from train.settings import TrainSettings, WorkerSettings

_LOGGER = logging.getLogger(__name__)
_SHOW_SECONDS, _LOG_SECONDS = 1.0, 15.0
POOL_PROMPTS = 10_000
"""Most stored prompts a round reads beside those of its comparisons."""


class Stopped(Exception):
    """The worker was told to stop; the round can be resumed."""


@dataclass(frozen=True)
class Stores:
    """The worker's connections."""

    feedback: FeedbackStore
    releases: ReleaseStore
    lease: Lease

    @classmethod
    def connect(cls, url: str, state: Path, worker: WorkerSettings, feedback: FeedbackSettings) -> Self:
        """Connections to the Redis at ``url``; made when first used."""
        return cls(
            FeedbackStore.connect(url, feedback),
            ReleaseStore.connect(url, state),
            Lease.connect(url, worker.lease_seconds),
        )

    async def close(self) -> None:
        """Close them."""
        await self.feedback.close()
        await self.releases.close()
        await self.lease.close()


@dataclass
class _Seen:
    """How many comparisons the log holds between two stream ids, so that a look reads only what is new."""

    since: str
    until: str
    comparisons: int = 0


class Worker:
    """Trains whenever there is enough to learn from. ``stop`` may be set from anywhere."""

    def __init__(self, state: Path, stores: Stores, settings: TrainSettings, deploy: DeploySettings) -> None:
        self.stop = threading.Event()
        self._state = state
        self._stores = stores
        self._settings = settings
        self._deploy = deploy
        self._registry = Registry(state)
        self._seen = _Seen("0-0", "0-0")

    async def run(self) -> None:
        """Work until told to stop. Redis gone, or a full disk, is waited out."""
        poll_seconds = self._settings.worker.poll_seconds
        while not self.stop.is_set():
            try:
                await self.step()
            except (DeployError, FeedbackError, OSError) as error:
                _LOGGER.warning("the worker cannot work now, and tries again in %.0f s: %s", poll_seconds, error)
            await asyncio.to_thread(self.stop.wait, poll_seconds)

    async def step(self) -> Outcome | None:
        """Run a round if one is due and nobody else is training. None where there was none, or it was interrupted.

        Raises:
            DeployError: The registry or the release cannot be used now.
            FeedbackError: The log cannot be read now.
        """
        if self._unfinished() is None and not await self._is_due():
            return None
        if not await self._stores.lease.acquire():
            _LOGGER.info("a round is due, but another worker holds the lease, or held it until it was killed")
            return None
        try:
            async with self._renewing():
                # Looked at again: whoever held the lease until now may have done this round.
                directory = self._unfinished()
                if directory is None and await self._is_due():
                    directory = await self._begin()
                return await self._finish(directory) if directory else None
        finally:
            with contextlib.suppress(LeaseLost, ReleaseUnavailable):
                await self._stores.lease.release()

    def _unfinished(self) -> RunDirectory | None:
        return next((run for run in RunDirectory.all(self._state) if run.outcome is None), None)

    async def _is_due(self) -> bool:
        release = await self._stores.releases.read()
        if release.stable is None:
            return False
        cursor, since = self._last_round()
        if self._seen.since != cursor:
            self._seen = _Seen(since=cursor, until=cursor)
        async for entry in self._stores.feedback.scan(after=self._seen.until):
            self._seen.until = entry.stream_id
            self._seen.comparisons += isinstance(entry.record, Comparison)
        return is_due(self._seen.comparisons, time.time() - since, self._settings.worker)

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
        pool = await self._stores.feedback.pool_prompts(POOL_PROMPTS)
        directory = RunDirectory(self._state / "runs" / plan.run)
        directory.begin(plan, [prompt.model_dump(mode="json") for prompt in pool])
        _LOGGER.info("%s: begins from policy %d", plan.run, plan.parent)
        return directory

    async def _finish(self, directory: RunDirectory) -> Outcome | None:
        """Run what is left of a round and write down how it ended."""
        plan, work = directory.plan, directory.claim(self._stores.lease.token or 0)
        entries = await log_until(self._stores.feedback, plan.cursor)
        progress = RunProgress(directory.path, self._check)
        loop = asyncio.get_running_loop()

        def publish(draft: Draft, source: Path) -> Version:
            """In the training thread: publish under the lease, and log it, both through the event loop."""

            def check_fence() -> None:
                asyncio.run_coroutine_threadsafe(self._stores.lease.check(), loop).result()

            version = self._registry.publish(draft, source, check_fence=check_fence)
            logged = self._stores.releases.record_publish(version, self._stores.lease.token)
            asyncio.run_coroutine_threadsafe(logged, loop).result()
            return version

        def train() -> Outcome:
            try:
                return Round(
                    plan,
                    work,
                    self._dataset(directory, entries),
                    self._registry,
                    self._settings,
                    self._deploy.gate,
                    publish=publish,
                    progress=progress,
                ).run()
            except TrainError as error:
                return Outcome(status="failed", reasons=(str(error),))

        try:
            outcome = await asyncio.to_thread(train)
            await self._stores.lease.check()
        except Stopped:
            _LOGGER.info("%s: stopped; it will be resumed", plan.run)
            return None
        except LeaseLost as error:
            _LOGGER.warning("%s: left to whoever holds the lease now: %s", plan.run, error)
            return None
        directory.conclude(outcome, work)
        _LOGGER.info("%s: %s %s", plan.run, outcome.status, "; ".join(outcome.reasons))
        await self._canary(outcome, plan)
        await self._score_pool(outcome, plan)
        return outcome

    def _dataset(self, directory: RunDirectory, entries: list[LogEntry]) -> Dataset:
        parent = self._registry.get(VersionKind.POLICY, directory.plan.parent)
        self._registry.verify(parent)
        pool = [PooledPrompt.model_validate(prompt) for prompt in directory.pool()]
        return dataset_for(parent, entries, pool, self._settings)

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
        except (DeployError, FeedbackError, TrainError) as error:
            _LOGGER.warning("%s: no prompts are scored for labelers: %s", plan.run, error)

    def _check(self) -> None:
        """In the training thread, after each step: may it go on?"""
        if self.stop.is_set():
            raise Stopped
        self._stores.lease.check_time()

    @contextlib.asynccontextmanager
    async def _renewing(self) -> AsyncIterator[None]:
        """Keep the lease inside; where that fails for a whole term, ``_check`` ends the training."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self._settings.worker.lease_seconds / 3)
                try:
                    await self._stores.lease.renew()
                except ReleaseUnavailable as error:
                    _LOGGER.warning("the training lease could not be renewed: %s", error)
                except LeaseLost as error:
                    _LOGGER.warning("%s", error)
                    return

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def log_until(feedback: FeedbackStore, cursor: str) -> list[LogEntry]:
    """The log up to and including ``cursor``, without what was erased by now. Raises StoreUnavailable."""
    entries = surviving([entry async for entry in feedback.scan()])
    return [entry for entry in entries if position(entry.stream_id) <= position(cursor)]


def dataset_for(policy: Version, entries: list[LogEntry], pool: list[PooledPrompt], settings: TrainSettings) -> Dataset:
    """The dataset of these records for the tokenizer and window of ``policy``.

    Raises:
        DatasetUnusable: They hold too little to learn from.
        ModelUnusable: The policy's files cannot be loaded.
    """
    return build(entries, pool, _encoder(policy, settings), settings.worker)


def informative(
    asked: Mapping[str, Sequence[Prompt]],
    policy: Version,
    reward_model: Version,
    settings: TrainSettings,
    seed: int,
) -> dict[str, float]:
    """How informative comparisons of ``policy``'s completions would be, in nats, by whatever names the prompts.

    A name's figure is that of its most informative prompt; one without a prompt that can be completed is left out.

    Raises:
        ModelUnusable: The versions' files cannot be loaded.
    """
    encoder = _encoder(policy, settings)
    ids_of: dict[str, list[tuple[int, ...]]] = {name: [] for name in asked}
    for name, prompts in asked.items():
        for prompt in prompts:
            with contextlib.suppress(Unencodable):
                ids_of[name].append(encoder.prompt(prompt))
    distinct = list(dict.fromkeys(ids for each in ids_of.values() for ids in each if ids and encoder.leaves_room(ids)))
    nats = dict(
        zip(
            distinct,
            informativeness.run(settings.evaluate, policy.path, reward_model.path, distinct, seed=seed),
            strict=True,
        )
    )
    found = {name: [nats[ids] for ids in each if ids in nats] for name, each in ids_of.items()}
    return {name: max(each) for name, each in found.items() if each}


def _encoder(policy: Version, settings: TrainSettings) -> Encoder:
    tokenizer_file = policy.manifest.files.get("tokenizer.json")
    return Encoder(
        load_tokenizer(policy.path),
        tokenizer_file.sha256 if tokenizer_file else "",
        int(load_policy(policy.path).config.max_position_embeddings),
        max(settings.ppo.max_completion_tokens, settings.evaluate.max_completion_tokens),
    )


def is_due(comparisons: int, seconds: float, settings: WorkerSettings) -> bool:
    """Whether so many new comparisons, so long after the last round, are reason for a round."""
    if comparisons >= settings.min_new_comparisons:
        return True
    return comparisons > 0 and seconds >= settings.interval_seconds


class RunProgress:
    """Shows a round's progress in ``progress.json`` and in the log, and asks after each step whether to go on."""

    def __init__(self, directory: Path, check: Callable[[], None]) -> None:
        self._path = directory / "progress.json"
        self._run = directory.name
        self._check = check
        self._stage = ""
        self._done_before: int | None = None
        self._began = self._shown = self._logged = 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        """Take in one step; raises what ``check`` raises."""
        self._check()
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._shown, self._logged = stage, now, 0.0, now
            self._done_before = None
            _LOGGER.info("%s: %s begins", self._run, stage)
        if self._done_before is None and done:  # a stage that is resumed does not begin at its first step
            self._done_before, self._began = (0, self._began) if done == 1 else (done, now)
        steps = done - (self._done_before or 0)
        left = (now - self._began) / steps * (total - done) if steps else None
        if now - self._shown >= _SHOW_SECONDS or done == total:
            self._shown = now
            shown = {"run": self._run, "stage": stage, "done": done, "total": total, "seconds_left": left}
            replace_atomically(self._path, json.dumps(shown | {"numbers": numbers}).encode())
        if now - self._logged >= _LOG_SECONDS or done == total:
            self._logged = now
            said = " ".join(f"{name} {numbers[name]:.4g}" for name in _SAID if name in numbers)
            _LOGGER.info("%s: %s %d/%d %s, %.0f s left", self._run, stage, done, total, said, left or 0.0)


_SAID = ("loss", "score", "kl_to_reference", "eos_share", "ptx_loss")
"""Numbers worth a place in a log line."""
