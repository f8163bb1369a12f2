"""The three parts of the benchmark, each with its own servers, Redis and state directory, gone when it ends."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cells import CALLERS, OURS, PROXIED, UNRECORDED, VLLM, Cell, Variant, idle_cpu, measure_cell, warm_up
from changes import Change, Streams, canary, change, promote, straight_to
from running_server import build_policy, publish_policy
from servers import Server, ours, proxy, redis_pid, vllms_own
from steps import Step
from transformers.utils import logging as transformers_logging

from deploy.registry import Registry, ReleaseStore
from deploy.release import first, rollback
from feedback.embedded import start_or_join
from serve.settings import ServeSettings

REPLICAS = 2
STREAMS = 32
IN_PLACE_STREAMS = 8
SWAPS = ("wait", "keep")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: Of one slice of a cell, about.
        rounds: Of each cell; a round is two slices of each variant.
        idle_cycles: Canary, promote, rollback without other load.
        loaded_cycles: The same under streams, with engines that are live already.
        cold_canary: Whether a version whose engine is not live is released under streams too.
        swaps: In-place changes without other load, and as many under streams, for each way to swap.
    """

    seconds: float
    rounds: int
    idle_cycles: int
    loaded_cycles: int
    cold_canary: bool
    swaps: int


FULL = Effort(seconds=2.2, rounds=3, idle_cycles=5, loaded_cycles=6, cold_canary=True, swaps=6)
QUICK = Effort(seconds=0.6, rounds=1, idle_cycles=1, loaded_cycles=1, cold_canary=False, swaps=2)


@dataclass(frozen=True)
class Compared:
    """What ``compare_completions`` found: cells, and each server's idle share of a core."""

    cells: list[Cell]
    idle_cpu: dict[str, float]


@dataclass
class UnderLoad:
    """Changes made while ``streams`` callers streamed, and how those fared."""

    streams: int
    changes: list[Change] = field(default_factory=list)
    completions: dict[int, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    mixed: int = 0

    def note(self, streams: Streams) -> None:
        """Take over what the streams saw."""
        self.completions, self.failed, self.mixed = streams.versions(), streams.failures, streams.mixed()


@dataclass(frozen=True)
class Changed:
    """Changes of version on servers of which nothing else was asked, and on servers under load."""

    idle: list[Change]
    loaded: UnderLoad


@dataclass(frozen=True)
class _Place:
    """A state directory with published versions, the first of them released, and its Redis."""

    state: Path
    redis_url: str
    registry: Registry
    policies: tuple[Path, ...]


@contextmanager
def _place(versions: int) -> Iterator[_Place]:
    state = Path(tempfile.mkdtemp(prefix="il-"))
    transformers_logging.disable_progress_bar()
    try:
        policies = tuple(build_policy(state / f"policy-{seed}", seed) for seed in range(1, versions + 1))
        registry = Registry(state)
        for policy in policies:
            publish_policy(registry, policy)
        with start_or_join(state) as redis:
            yield _Place(state, redis.url, registry, policies)
    finally:
        shutil.rmtree(state)


async def _releases(place: _Place) -> ReleaseStore:
    releases = ReleaseStore.connect(place.redis_url, place.state)
    await releases.change(lambda now: first(now, 1), verb="first", by="bench", reason="")
    return releases


async def compare_completions(effort: Effort, step: Step) -> Compared:
    """Ours, with and without recording, against vLLM's own server, alone and behind a proxy."""
    with ExitStack() as stack:
        place = stack.enter_context(_place(versions=1))
        await (await _releases(place)).close()
        step("starting our server, vLLM's own and a proxy", 0, 1)
        our = stack.enter_context(ours(place.state, place.redis_url))
        vllm = stack.enter_context(vllms_own(place.policies[0], place.state / "vllm.log"))
        proxied = stack.enter_context(proxy(vllm, place.state / "proxy.log"))
        for server in (our, vllm, proxied):
            server.wait_ready()
        redis = redis_pid(place.redis_url)
        variants = [
            Variant(OURS, our.port, (our.pid,), redis),
            Variant(VLLM, vllm.port, (vllm.pid,)),
            Variant(UNRECORDED, our.port, (our.pid,), redis, {"store": False}),
            Variant(PROXIED, proxied.port, (proxied.pid, vllm.pid)),
        ]
        for variant in variants:
            await warm_up(variant)
        step("idling", 0, 1)
        idle = {variant.name: await idle_cpu(variant, 2.0) for variant in variants[:2]}
        cells = []
        for stream in (True, False):
            for callers in CALLERS:
                cells.append(await _cell(variants, effort, step, stream=stream, callers=callers))
        return Compared(cells, idle)


async def _cell(variants: Sequence[Variant], effort: Effort, step: Step, *, stream: bool, callers: int) -> Cell:
    name, slices, done = f"{'streamed' if stream else 'whole'}, {callers} at once", 2 * effort.rounds * len(variants), 0

    def tick() -> None:
        nonlocal done
        done += 1
        step(name, done, slices)

    return await measure_cell(
        variants, stream=stream, callers=callers, seconds=effort.seconds, rounds=effort.rounds, tick=tick
    )


async def change_versions(effort: Effort, step: Step) -> Changed:
    """Canary, promote and rollback on replicas that keep their engines warm."""
    with ExitStack() as stack:
        place = stack.enter_context(_place(versions=3))
        releases = await _releases(place)
        step(f"starting {REPLICAS} replicas", 0, 1)
        replicas = [stack.enter_context(ours(place.state, place.redis_url)) for _ in range(REPLICAS)]
        ports = _ready(replicas)

        async def cycle(*, number: int = 2, warm: bool = True) -> list[Change]:
            return [
                await change(releases, ports, "canary", canary(place.registry, number), warm=warm),
                await change(releases, ports, "promote", promote()),
                await change(releases, ports, "rollback", rollback),
            ]

        try:
            step("starting a canary's engines", 0, 1)
            idle = await cycle(warm=False)
            for done in range(effort.idle_cycles):
                step("changes without load", done, effort.idle_cycles)
                idle += await cycle()
            loaded = UnderLoad(STREAMS)
            async with Streams(ports, STREAMS) as streams:
                for done in range(effort.loaded_cycles):
                    step(f"changes under {STREAMS} streams", done, effort.loaded_cycles)
                    loaded.changes += await cycle()
                if effort.cold_canary:
                    step(f"a cold canary under {STREAMS} streams", 0, 1)
                    loaded.changes.append(
                        await change(releases, ports, "canary", canary(place.registry, 3), warm=False)
                    )
                    loaded.changes.append(await change(releases, ports, "promote", promote()))
                await asyncio.sleep(1.0)
            loaded.note(streams)
            return Changed(idle, loaded)
        finally:
            await releases.close()


def _ready(servers: Sequence[Server]) -> list[int]:
    for server in servers:
        server.wait_ready()
    return [server.port for server in servers]


def swaps_in_place() -> bool:
    """Whether this server can exchange the weights of its one engine."""
    return {"max_engines", "swap"} <= ServeSettings.model_fields.keys()


async def change_in_place(effort: Effort, step: Step) -> dict[str, Changed]:
    """The stable version exchanged within the only engine, once for each way to treat running completions."""
    found = {}
    for swap in SWAPS:
        with ExitStack() as stack:
            place = stack.enter_context(_place(versions=2))
            releases = await _releases(place)
            step(f"in place, {swap}: starting", 0, 1)
            environment = {"INSTRUCTLOOP_SERVE__MAX_ENGINES": "1", "INSTRUCTLOOP_SERVE__SWAP": swap}
            ports = _ready([stack.enter_context(ours(place.state, place.redis_url, **environment))])
            turns = [2 - turn % 2 for turn in range(effort.swaps)]
            try:
                idle, loaded = [], UnderLoad(IN_PLACE_STREAMS)
                for done, number in enumerate(turns):
                    step(f"in place, {swap}: without load", done, effort.swaps)
                    idle.append(await change(releases, ports, f"in place ({swap})", straight_to(number)))
                async with Streams(ports, IN_PLACE_STREAMS) as streams:
                    for done, number in enumerate(turns):
                        step(f"in place, {swap}: under {IN_PLACE_STREAMS} streams", done, effort.swaps)
                        loaded.changes.append(await change(releases, ports, f"in place ({swap})", straight_to(number)))
                        await asyncio.sleep(0.5)
                loaded.note(streams)
                found[swap] = Changed(idle, loaded)
            finally:
                await releases.close()
    return found


def as_json(found: Compared | Changed | dict[str, Changed]) -> Any:
    """What a part found, as JSON takes it: all but the single samples."""
    if isinstance(found, dict):
        return {name: asdict(part) for name, part in found.items()}
    record = asdict(found)
    for cell in record.get("cells", ()):
        del cell["samples"]
    return record
