"""Room for one engine, here a stub that takes its time: what may happen while weights are exchanged, and what not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
from prometheus_client import CollectorRegistry

from deploy import release as transitions
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release
from deploy.versions import Draft, Version, VersionKind
from serve.metrics import Metrics
from serve.settings import ServeSettings

# vLLM's own; it is imported inside a test (by serve.fleet), where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


class SlowEngine:
    """Serves a version, and exchanges it when ``go_on`` is set."""

    running = 0
    dead = suspect = False

    def __init__(self, version: Version) -> None:
        self.version = version.number
        self.metrics = CollectorRegistry()
        self.go_on = asyncio.Event()
        self.exchanged: list[int] = []
        self.exchanging = self.overlapped = False

    @classmethod
    async def start(cls, version: Version, *_: object) -> Self:
        """As ``Engine.start``, at once."""
        return cls(version)

    async def swap(self, version: Version, model_id: str) -> None:
        """As ``Engine.swap``."""
        self.overlapped |= self.exchanging
        self.exchanging = True
        await self.go_on.wait()
        self.version = version.number
        self.exchanged.append(version.number)
        self.exchanging = False

    async def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
async def releases(redis_url: str, state_dir: Path, tmp_path: Path) -> AsyncIterator[ReleaseStore]:
    """Three versions, of which the first is stable."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    registry = Registry(state_dir)
    for _ in range(3):
        registry.publish(Draft(kind=VersionKind.POLICY), model)
    store = ReleaseStore.connect(redis_url, state_dir)
    await store.change(partial(transitions.first, number=1), verb="first", by="test", reason="")
    yield store
    await store.close()


@pytest.fixture
async def fleet(
    releases: ReleaseStore, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:  # a Fleet; its module imports vLLM
    from serve import fleet as module
    from serve.guard import ArmCounter

    monkeypatch.setattr(module, "Engine", SlowEngine)
    settings = ServeSettings(max_engines=1, release_poll_seconds=0.05, drain_seconds=0.5)
    made = module.Fleet("here", Registry(state_dir), releases, settings, Metrics(), lambda sampled: None, ArmCounter())
    watching = asyncio.create_task(made.watch())
    await until(lambda: made.serving.stable == 1)
    yield made
    while not watching.done():  # a wait that is just timing out swallows a cancellation
        watching.cancel()
        await asyncio.wait([watching], timeout=1.0)
    await made.close()


async def test_a_client_who_does_not_read_holds_no_server_up(fleet: Any, releases: ReleaseStore) -> None:
    async with fleet.arms():  # as long as its answer is not sent
        await release(releases, 2)
        await until(lambda: "did not end within 0.5 s" in (fleet.problem or ""))
        assert fleet.serving.stable == 1
        async with asyncio.timeout(0.4), fleet.arms() as [engine]:
            assert engine.version == 1 and not engine.exchanging


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def release(releases: ReleaseStore, number: int) -> None:
    def stable(now: Release) -> Release:
        return now.model_copy(update={"stable": number, "previous": now.stable})

    await releases.change(stable, verb="promote", by="test", reason="")


async def test_a_release_that_changes_again_waits_for_the_exchange_under_way(
    fleet: Any, releases: ReleaseStore
) -> None:
    engine = fleet.live[1]
    await release(releases, 2)
    await until(lambda: bool(engine.exchanging))
    await release(releases, 3)
    await until(lambda: fleet.wanted.stable == 3)
    await asyncio.sleep(0.2)  # several looks at the release
    assert fleet.serving.stable == 1
    engine.go_on.set()
    await until(lambda: fleet.serving.stable == 3)
    assert (engine.exchanged, engine.version, list(fleet.live)) == ([2, 3], 3, [3])
    assert not engine.overlapped


async def test_neither_a_completion_nor_a_task_begins_during_an_exchange(fleet: Any, releases: ReleaseStore) -> None:
    from serve.fleet import Asker

    engine = fleet.live[1]
    await release(releases, 2)
    await until(lambda: bool(engine.exchanging))

    async def completion() -> int:
        async with fleet.engine_for(Asker("alice"), "id") as one:
            return int(one.version)

    async def task() -> list[int]:
        async with fleet.arms() as arms:
            return [one.version for one in arms]

    both = asyncio.gather(completion(), task())
    await asyncio.sleep(0.1)
    assert not both.done()
    engine.go_on.set()
    assert list(await asyncio.wait_for(both, 10)) == [2, [2]]


async def test_an_exchange_waits_for_a_tasks_candidates(fleet: Any, releases: ReleaseStore) -> None:
    async with fleet.arms() as [engine]:
        assert engine.running == 1
        await release(releases, 2)
        await until(lambda: fleet.changing)
        await asyncio.sleep(0.1)
        assert not engine.exchanging
    engine.go_on.set()
    await until(lambda: fleet.serving.stable == 2)
