"""Keeps the running engines in step with the release, blue/green: no engine serves before it has proved itself.

A change of release starts the engines it needs, checks them, flips the arms in one assignment, then drains
what is no longer needed. Until the flip, and for as long as an engine fails to start, the old release serves.
Where memory holds one engine (``max_engines = 1``) its weights are exchanged in place instead. ``supervision``
tells of engines that must be replaced.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from deploy.errors import DeployError, ReleaseUnavailable
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release, ReplicaReport
from deploy.versions import Version, VersionKind
from serve.engine import Engine
from serve.errors import EngineFailed, EngineRefused, ModelNotFound, NotServing
from serve.guard import ArmCounter
from serve.metrics import Metrics
from serve.recording import Sampled
from serve.settings import ServeSettings
from serve.traffic import pick_version

log = logging.getLogger(__name__)

_RETRY_SECONDS = 15.0
"""Wait before a version whose engine failed is tried again; versions never change, but memory may come free."""

_PROGRESS_SECONDS = 5.0
"""How often an engine that is being loaded says so."""


@dataclass(frozen=True)
class Asker:
    """Who asks for a completion, and of which model; None is the released one."""

    principal: str
    user: str | None = None
    model: str | None = None


class Fleet:
    """The live engines and the release they serve."""

    def __init__(
        self,
        replica: str,
        registry: Registry,
        releases: ReleaseStore,
        settings: ServeSettings,
        metrics: Metrics,
        on_sampled: Callable[[Sampled], None],
        arms: ArmCounter,
    ) -> None:
        self.live: dict[int, Engine] = {}
        self.serving = Release()
        """The release that requests are routed by; its engines are all live."""
        self.wanted = Release()
        """The newest release seen; equal to ``serving`` once converged."""
        self._replica = replica
        self._registry = registry
        self._releases = releases
        self._settings = settings
        self._metrics = metrics
        self._on_sampled = on_sampled
        self._arms = arms
        self._loading: dict[int, float] = {}
        """Versions whose engines are being started or whose weights are being exchanged, since when (monotonic)."""
        self._failed: dict[int, tuple[float, str]] = {}
        """When a version whose engine failed may be tried again (monotonic), and why it failed."""
        self._spare: int | None = None
        self._ending = 0
        """Engines that no longer serve but still hold memory."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        """Cleared while weights are exchanged in place: requests wait, so that each is sampled by one version."""
        self._open.set()
        self._waiting = 0

    @property
    def converged(self) -> bool:
        """True when the newest release seen is the one being served."""
        return self.serving.stable is not None and self.serving.generation == self.wanted.generation

    @property
    def problem(self) -> str | None:
        """Why the newest release is not served yet, or what of it cannot be; None where all is well."""
        for number in self._needed(self.wanted):
            if number in self._loading:
                return f"version {number} is being loaded ({time.monotonic() - self._loading[number]:.0f} s)"
            if number not in self.live and number in self._failed:
                return self._failed[number][1]
        if self.wanted.canary is not None and self._settings.max_engines == 1:
            return f"canary {self.wanted.canary} takes no traffic here: max_engines is 1"
        return None

    async def watch(self) -> None:
        """Follow the release until cancelled. With Redis gone, the last release known goes on being served."""
        while True:
            try:
                self._want(await self._releases.read())
            except ReleaseUnavailable as error:
                log.warning("the release cannot be read; the last one known is served", extra={"why": str(error)})
                if self.wanted.generation == 0:  # just started: what the state directory remembers
                    with contextlib.suppress(ReleaseUnavailable):
                        self.wanted = self._releases.last_known()
            self._reconcile()
            try:
                await self._releases.changed(self._settings.release_poll_seconds)
            except ReleaseUnavailable:
                await asyncio.sleep(self._settings.release_poll_seconds)

    async def report(self) -> None:
        """Tell the operator and the guard what this server has live and how it runs, until cancelled."""
        while True:
            told = ReplicaReport(
                replica=self._replica,
                generation=self.serving.generation,
                wanted=self.wanted.generation,
                live=tuple(sorted(self.live)),
                loading=tuple(sorted(number for number in self._loading if number not in self._failed)),
                failed={number: why for number, (_, why) in self._failed.items()},
                arms=self._arms.figures(),
                detail=self.problem or "",
            )
            with contextlib.suppress(ReleaseUnavailable):  # the watch logs it
                await self._releases.report(told)
            await asyncio.sleep(self._settings.release_poll_seconds)

    @contextlib.asynccontextmanager
    async def engine_for(self, asker: Asker, request_id: str) -> AsyncIterator[Engine]:
        """The engine for one request, held for as long as the request runs: the released policy, or a pinned version.

        Raises:
            NotServing: No engine is live yet, or the one asked for has ended.
            ModelNotFound: The model's id names nothing that is live.
            EngineRefused: Too many requests wait for an in-place change.
        """
        await self._opened()
        version, pinned = self._pick(asker, request_id)
        unwatched = contextlib.nullcontext()
        with unwatched if pinned else self._arms.counted(version, asker.principal, asker.user, request_id):
            engine = self._running(version)
            with _hold(engine):
                yield engine

    @contextlib.asynccontextmanager
    async def arms(self) -> AsyncIterator[list[Engine]]:
        """The engine of each arm, held likewise; what is asked of them is no traffic, and the guard does not count it.

        Raises:
            NotServing: No engine is live yet, or none any more.
            EngineRefused: Too many requests wait for an in-place change.
        """
        await self._opened()
        arms = [self.live[version] for version in self.serving.live() if version in self.live]
        if not arms:
            raise NotServing(self.problem or "no policy version is being served yet")
        with contextlib.ExitStack() as held:
            for engine in arms:
                held.enter_context(_hold(engine))
            yield arms

    async def _opened(self) -> None:
        """Wait while weights are exchanged in place."""
        while not self._open.is_set():
            if self._waiting >= self._settings.max_pending_completions:
                raise EngineRefused(503, "the engine is changing versions and its queue is full; try again")
            self._waiting += 1
            try:
                await self._open.wait()
            finally:
                self._waiting -= 1

    def _pick(self, asker: Asker, request_id: str) -> tuple[int, bool]:
        """The version for a request, and whether the request named it."""
        if self.serving.stable is None:
            raise NotServing(self.problem or "no policy version is being served yet")
        name = self._settings.model_name
        if asker.model is None or asker.model == name:
            return pick_version(self.serving, asker.principal, asker.user, request_id), False
        number = asker.model.removeprefix(f"{name}-v")
        if asker.model != number and number.isdecimal() and int(number) in self.live:
            return int(number), True
        live = ", ".join([name, *(self.model_id(version) for version in sorted(self.live))])
        raise ModelNotFound(f"that model is not live; live are: {live}")

    def _running(self, version: int) -> Engine:
        if version not in self.live or self.live[version].dead:
            raise NotServing(f"the engine of version {version} has ended and is being started again")
        return self.live[version]

    def model_id(self, version: int) -> str:
        """The id that pins a version."""
        return f"{self._settings.model_name}-v{version}"

    def roles(self) -> dict[int, str]:
        """Release role of each live version."""
        named = {self.serving.previous: "previous", self.serving.canary: "canary", self.serving.stable: "stable"}
        return {version: named.get(version, "previous") for version in sorted(self.live)}

    @property
    def changing(self) -> bool:
        """True while a version is being loaded or exchanged."""
        return bool(self._loading)

    def replace(self, number: int, reason: str) -> None:
        """End an engine that died, hung or gives garbage, and start the version again."""
        log.error("engine is replaced", extra={"policy_version": number, "why": reason})
        self._metrics.engine_restarts.labels(reason).inc()
        self._retire(number, drain_seconds=0.0)
        self._reconcile()

    async def close(self) -> None:
        """Drain and stop every engine."""
        self.serving = self.wanted = Release()
        self._spare = None
        self._open.set()
        self._reconcile()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _want(self, release: Release) -> None:
        if release.generation != self.wanted.generation:
            self._failed.clear()  # whoever asks for a version again means it to be tried again
        self.wanted = release

    def _needed(self, release: Release) -> tuple[int, ...]:
        """The versions that must be live for a release to be served here."""
        return release.live()[: self._settings.max_engines]

    def _kept(self) -> int | None:
        if not self._settings.keep_previous or self._settings.max_engines == 1:
            return None
        return self.wanted.previous if self.wanted.previous is not None else self._spare

    def _reconcile(self) -> None:
        """Take what steps can be taken now towards the release; called again whenever one has ended."""
        needed = self._needed(self.wanted)
        missing = [number for number in needed if number not in self.live]
        if not missing and needed:
            self._flip()
        kept = self._kept()
        for number in [number for number in self.live if number not in (*needed, *self.serving.live(), kept)]:
            self._retire(number, self._settings.drain_seconds)
        if not missing and kept is not None and kept not in self.live:
            missing = [kept]
        for number in missing:
            if number not in self._loading and time.monotonic() >= self._failed.get(number, (0.0, ""))[0]:
                self._bring(number, needed)

    def _flip(self) -> None:
        if self.converged:
            return
        if self.serving.stable not in (None, self.wanted.stable, self.wanted.previous):
            # Rolled back from: stays warm in the place of a previous version, in case it is promoted again.
            self._spare = self.serving.stable
        self.serving = self.wanted
        if self._settings.max_engines == 1:
            self.serving = self.wanted.model_copy(update={"canary": None, "canary_fraction": 0.0})
        self._arms.begin(self.serving.generation)
        self._metrics.release_generation.set(self.serving.generation)
        log.info("release converged", extra={"generation": self.serving.generation, "live": sorted(self.live)})

    def _bring(self, number: int, needed: tuple[int, ...]) -> None:
        """Begin to make a version live, if there is room for it; else make room."""
        if self._settings.max_engines == 1 and self.live:
            if not self._loading:  # one at a time: the next begins from what this one ends with
                self._loading[number] = time.monotonic()
                self._spawn(self._swap(number))
        elif len(self.live) + len(self._loading) + self._ending < self._settings.max_engines:
            self._loading[number] = time.monotonic()
            self._spawn(self._start(number))
        elif number in needed and not self._ending:
            spare = [n for n in self.live if n not in (*needed, *self.serving.live())]
            if not spare and (canary := self.serving.canary) is not None and canary not in needed:
                # No room for the next canary beside this one: its share goes back to the stable version first.
                spare = [canary]
                self.serving = self.serving.model_copy(update={"canary": None, "canary_fraction": 0.0})
            for out in spare[:1]:
                self._retire(out, self._settings.drain_seconds)

    async def _start(self, number: int) -> None:
        async def load() -> None:
            version = await asyncio.to_thread(self._verified, number)
            self.live[number] = await Engine.start(version, self.model_id(number), self._settings, self._on_sampled)

        await self._load(number, load())

    async def _swap(self, number: int) -> None:
        async def load() -> None:
            (old,) = self.live
            engine = self.live[old]
            version = await asyncio.to_thread(self._verified, number)
            self._open.clear()
            if self._settings.swap == "wait":
                await self._drained(engine)
            await engine.swap(version, self.model_id(number))
            self.live = {number: engine}
            self.serving = Release(stable=number, generation=self.serving.generation)

        try:
            await self._load(number, load())
        finally:
            self._open.set()

    async def _drained(self, engine: Engine) -> None:
        """Wait until an engine has no requests. Raises EngineFailed: it hangs, or a client does not read its answer."""
        deadline = time.monotonic() + self._settings.drain_seconds
        while engine.running:
            if time.monotonic() >= deadline:
                raise EngineFailed(
                    f"{engine.running} requests of version {engine.version} did not end within "
                    f"{self._settings.drain_seconds:g} s: it goes on being served, and the exchange is tried again"
                )
            await asyncio.sleep(0.005)

    async def _load(self, number: int, loading: Coroutine[Any, Any, None]) -> None:
        """Run what makes a version live, saying how it goes; a failure is kept and tried again later."""
        task = asyncio.ensure_future(loading)
        began = time.monotonic()
        try:
            while not (await asyncio.wait({task}, timeout=_PROGRESS_SECONDS))[0]:
                seconds = round(time.monotonic() - began)
                log.info("version is being loaded", extra={"policy_version": number, "seconds": seconds})
            await task
        except Exception as error:  # whatever vLLM raises, the old release goes on being served
            self._metrics.engine_starts.labels("failed").inc()
            self._failed[number] = time.monotonic() + _RETRY_SECONDS, str(error)
            unexpected = None if isinstance(error, DeployError | EngineFailed) else error
            log.error("version is not live", extra={"policy_version": number, "why": str(error)}, exc_info=unexpected)
        else:
            self._failed.pop(number, None)
            self._metrics.engine_starts.labels("started").inc()
            log.info("version is live", extra={"policy_version": number, "seconds": round(time.monotonic() - began, 2)})
        finally:
            del self._loading[number]
        self._reconcile()

    def _verified(self, number: int) -> Version:
        version = self._registry.get(VersionKind.POLICY, number)
        self._registry.verify(version)
        return version

    def _retire(self, number: int, drain_seconds: float) -> None:
        self._ending += 1
        self._spawn(self._end(self.live.pop(number), drain_seconds))

    async def _end(self, engine: Engine, drain_seconds: float) -> None:
        deadline = time.monotonic() + drain_seconds
        while engine.running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await (engine.kill() if engine.running or drain_seconds == 0 else engine.close())
        self._ending -= 1
        self._reconcile()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@contextlib.contextmanager
def _hold(engine: Engine) -> Iterator[None]:
    """Count a request as running on an engine, so that it is not ended under it."""
    engine.running += 1
    try:
        yield
    finally:
        engine.running -= 1
