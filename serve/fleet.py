"""Keeps the running engines in step with the release, blue/green: no engine serves before it has proved itself.

A change of release starts the engines it needs, checks them, flips the arms in one assignment, then drains
what is no longer needed. Until the flip, and for as long as an engine fails to start, the old release serves.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from deploy.errors import DeployError, ReleaseUnavailable
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release, ReplicaReport
from deploy.versions import Version, VersionKind
from serve.engine import Engine
from serve.errors import EngineFailed, ModelNotFound, NotServing
from serve.metrics import Metrics
from serve.recording import Sampled
from serve.settings import ServeSettings
from serve.traffic import pick_version

log = logging.getLogger(__name__)

_RETRY_SECONDS = 15.0
"""Wait before a version whose engine failed is tried again; versions never change, but memory may come free."""

_DRAIN_GRACE_SECONDS = 0.5
"""A request that was given an engine just before the flip counts as running within this time."""


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
    ) -> None:
        self.live: dict[int, Engine] = {}
        self.serving = Release()
        """The release that requests are routed by; its engines are all live."""
        self.wanted = Release()
        """The newest release seen; equal to ``serving`` once converged."""
        self.problem: str | None = None
        self._replica = replica
        self._registry = registry
        self._releases = releases
        self._settings = settings
        self._metrics = metrics
        self._on_sampled = on_sampled
        self._failed: dict[int, tuple[float, str]] = {}
        """When a version whose engine failed may be tried again (monotonic), and why it failed."""
        self._spare: int | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def converged(self) -> bool:
        """True when the newest release seen is the one being served."""
        return self.serving.stable is not None and self.serving.generation == self.wanted.generation

    async def watch(self) -> None:
        """Follow the release until cancelled. With Redis gone, the last release known goes on being served."""
        while True:
            try:
                self.wanted = await self._releases.read()
            except ReleaseUnavailable as error:
                log.warning("the release cannot be read; the last one known is served", extra={"why": str(error)})
                if self.wanted.generation == 0:  # just started: what the state directory remembers
                    with contextlib.suppress(ReleaseUnavailable):
                        self.wanted = self._releases.last_known()
            await self._reconcile(self.wanted)
            try:
                await self._releases.changed(self._settings.release_poll_seconds)
            except ReleaseUnavailable:
                await asyncio.sleep(self._settings.release_poll_seconds)

    async def report(self) -> None:
        """Tell the operator what this server has live, until cancelled; also while an engine takes long to start."""
        while True:
            told = ReplicaReport(
                replica=self._replica,
                generation=self.serving.generation,
                live=tuple(sorted(self.live)),
                detail=self.problem or "",
            )
            with contextlib.suppress(ReleaseUnavailable):  # the watch logs it
                await self._releases.report(told)
            await asyncio.sleep(self._settings.release_poll_seconds)

    def pick(self, model: str | None, principal: str, user: str | None, request_id: str) -> Engine:
        """The engine for a request's ``model``: the released policy, or one live version pinned by its id.

        Raises:
            NotServing: No engine is live yet, or the one asked for has ended.
            ModelNotFound: The id names nothing that is live.
        """
        if self.serving.stable is None:
            raise NotServing(self.problem or "no policy version is being served yet")
        name = self._settings.model_name
        if model is None or model == name:
            return self._running(pick_version(self.serving, principal, user, request_id))
        number = model.removeprefix(f"{name}-v")
        if model != number and number.isdecimal() and int(number) in self.live:
            return self._running(int(number))
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

    async def close(self) -> None:
        """Drain and stop every engine."""
        engines = list(self.live.values())
        self.live.clear()
        self.serving = Release()
        await asyncio.gather(*(self._drain(engine) for engine in engines), *self._retiring)

    async def _reconcile(self, release: Release) -> None:
        self.problem = None
        for number in [number for number, engine in self.live.items() if engine.dead]:
            log.error("engine ended by itself; it is started again", extra={"policy_version": number})
            self._metrics.engine_starts.labels("died").inc()
            self._retire(self.live.pop(number))
        for number in release.live():
            if not await self._ensure(number):
                return
        if release.generation != self.serving.generation or self.serving.stable is None:
            if self.serving.stable not in (None, release.stable, release.previous):
                # Rolled back from: stays warm in the place of a previous version, in case it is promoted again.
                self._spare = self.serving.stable
            self.serving = release
            self._metrics.release_generation.set(release.generation)
            log.info("release converged", extra={"generation": release.generation, "live": list(release.live())})
        if self._settings.keep_previous:
            keep = release.previous if release.previous is not None else self._spare
        else:
            keep = None
        for number in [number for number in self.live if number not in (*release.live(), keep)]:
            self._retire(self.live.pop(number))
        if keep is not None and keep == release.previous:
            await self._ensure(keep)

    async def _ensure(self, number: int) -> bool:
        """True when the version's engine is live, starting it if need be; a failure is kept as ``problem``."""
        if number in self.live:
            return True
        retry_at, why = self._failed.get(number, (0.0, ""))
        if time.monotonic() < retry_at:
            self.problem = why
            return False
        try:
            version = await asyncio.to_thread(self._verified, number)
            self.live[number] = await Engine.start(version, self.model_id(number), self._settings, self._on_sampled)
        except (DeployError, EngineFailed) as error:
            self._metrics.engine_starts.labels("failed").inc()
            self._failed[number] = time.monotonic() + _RETRY_SECONDS, str(error)
            self.problem = str(error)
            log.error("version does not start", extra={"policy_version": number, "why": str(error)})
            return False
        self._metrics.engine_starts.labels("started").inc()
        return True

    def _verified(self, number: int) -> Version:
        version = self._registry.get(VersionKind.POLICY, number)
        self._registry.verify(version)
        return version

    def _retire(self, engine: Engine) -> None:
        task = asyncio.create_task(self._drain(engine))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _drain(self, engine: Engine) -> None:
        await asyncio.sleep(_DRAIN_GRACE_SECONDS)
        deadline = time.monotonic() + self._settings.drain_seconds
        while engine.running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await engine.close()
