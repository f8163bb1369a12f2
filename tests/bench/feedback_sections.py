"""The parts of the benchmark: load over HTTP, appends without it, and a long log; each with its own Redis."""

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from feedback_appends import NaiveStore, append_many
from feedback_comparisons import comparison
from feedback_load import ANSWER_SECONDS, NO_ANSWER, Posted, closed_loop, health_beside, open_loop, slowest_health_ms
from feedback_places import (
    Size,
    connected,
    count_lost,
    free_memory,
    kill_redis,
    naive_server,
    place,
    require_durable,
    size,
)
from figures import Figure
from servers import BenchFailed, cpu_seconds, ours, redis_pid
from steps import Step

from feedback.records import encode
from feedback.store import FeedbackStore

CALLERS = 64
HELD_PER_SECOND = 200
FLOODS_PER_SECOND = (2000, 6000)
"""The load that is to be survived, and one beyond what any machine so far has taken."""
SIZED_RECORDS = 10_000
"""Records that the bytes per comparison are of."""
_FILLERS = 256
_HEALTH_PROBES = 5
_CALM_SECONDS = 1.0
"""After the overload: all connections that it opened are closed at once, which is work for the server, too."""
_WARM_UP_SECONDS = 2.0
_MEMORY_HEADROOM = 1.5
"""Redis's memory grows while it rewrites its file."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        held_seconds: Of the open loop that the server is to hold.
        capacity_seconds: Of each of the closed loops.
        overload_seconds: For which each flood is offered.
        rounds: Of closed loops, and of slices of appends; in each, both ways take two turns.
        slice_appends: Records of one slice.
        records: Of the long log.
    """

    held_seconds: float
    capacity_seconds: float
    overload_seconds: float
    rounds: int
    slice_appends: int
    records: int


FULL = Effort(
    held_seconds=60.0, capacity_seconds=5.0, overload_seconds=10.0, rounds=3, slice_appends=4000, records=100_000
)
QUICK = Effort(held_seconds=5.0, capacity_seconds=2.0, overload_seconds=3.0, rounds=1, slice_appends=600, records=5_000)


@dataclass(frozen=True)
class _Flood:
    """A flood, and what else was asked of the server meanwhile and then.

    Attributes:
        per_second: Comparisons offered.
        posted: What became of them.
        health_ms: Of GET /health beside it.
        at_once_ms: Of GET /health right after the last answer.
        later_ms: Of the slowest GET /health, when the server is calm again.
        after: One caller's comparisons then.
    """

    per_second: int
    posted: Posted
    health_ms: list[float]
    at_once_ms: float
    later_ms: float
    after: Posted


async def _flooded(port: int, numbers: Iterator[int], per_second: int, seconds: float) -> _Flood:
    posted, health = await asyncio.gather(open_loop(port, numbers, per_second, seconds), health_beside(port, seconds))
    at_once = await slowest_health_ms(port, 1)
    await asyncio.sleep(_CALM_SECONDS)
    later = await slowest_health_ms(port, _HEALTH_PROBES)
    return _Flood(per_second, posted, health, at_once, later, await closed_loop(port, numbers, 1, 1.0))


async def post_over_http(effort: Effort, step: Step) -> list[Figure]:
    """A load that is to be held, the most that 64 callers get, and more than that; then what the log has of it."""
    numbers, steps = itertools.count(), 4 * effort.rounds + 3 + len(FLOODS_PER_SECOND)
    with place() as at:
        async with connected(FeedbackStore, at.url) as store:
            await require_durable(store)
        step("starting two servers", 0, steps)
        environment = {"INSTRUCTLOOP_SERVE__ACCESS_LOG": "false"}
        with ours(at.state, at.url, **environment) as server, naive_server(at, CALLERS) as naive:
            # Without a release they are never ready to complete, which nobody asks of them.
            servers = [replace(one, ready_path="/health") for one in (server, naive)]
            for one in servers:
                await asyncio.to_thread(one.wait_ready)  # so that Ctrl-C need not wait for it
            warmed = [await closed_loop(one.port, numbers, CALLERS, _WARM_UP_SECONDS) for one in servers]
            step(f"{HELD_PER_SECOND} comparisons/s", 1, steps)
            held = await open_loop(server.port, numbers, HELD_PER_SECOND, effort.held_seconds)
            closed: dict[str, list[Posted]] = {"ours": [], "naive": []}
            turns = [("ours", server), ("naive", naive), ("naive", naive), ("ours", server)] * effort.rounds
            for done, (name, one) in enumerate(turns):
                step(f"{CALLERS} callers, {name}", 2 + done, steps)
                closed[name].append(await closed_loop(one.port, numbers, CALLERS, effort.capacity_seconds))
            floods = []
            for done, per_second in enumerate(FLOODS_PER_SECOND, 2 + len(turns)):
                step(f"{per_second} comparisons/s", done, steps)
                floods.append(await _flooded(server.port, numbers, per_second, effort.overload_seconds))
        step("killing Redis and counting its log", steps - 1, steps)
        await kill_redis(at.url)
        flooding = [posted for flood in floods for posted in (flood.posted, flood.after)]
        all_posted = (*warmed, held, *closed["ours"], *closed["naive"], *flooding)
        lost, more = await count_lost(at.url, itertools.chain(*(one.acknowledged for one in all_posted)))
        held_lost, _ = await count_lost(at.url, held.acknowledged)
        floods_lost = [(await count_lost(at.url, flood.posted.acknowledged))[0] for flood in floods]
    return [
        *_held(held, held_lost),
        *_capacity(f"{CALLERS} callers", closed["ours"], at_least=1300),
        *_capacity(f"{CALLERS} callers, an EVALSHA a request", closed["naive"], at_least=None),
        _gain(closed["ours"], closed["naive"]),
        *itertools.chain(*map(_overload, floods, floods_lost)),
        Figure("all: acknowledged", sum(len(one.acknowledged) for one in all_posted), "comparisons"),
        Figure("all: acknowledged, but not in the log after kill -9 of Redis", lost, "comparisons", at_most=0),
        Figure("all: in the log, but answered otherwise", more, "comparisons"),
    ]


def _held(posted: Posted, lost: int) -> list[Figure]:
    name = f"{HELD_PER_SECOND}/s offered"
    offered = posted.statuses().total()
    median, late = np.percentile([one for times in posted.milliseconds.values() for one in times], (50, 99))
    return [
        Figure(f"{name}: for", posted.seconds, "s"),
        Figure(f"{name}: share acknowledged", 100 * len(posted.acknowledged) / offered, "%", at_least=100),
        Figure(f"{name}: latency of all answers, p50", float(median), "ms", at_most=10),
        Figure(f"{name}: latency of all answers, p99", float(late), "ms", at_most=100),
        Figure(f"{name}: latency of all answers, most", max(map(max, posted.milliseconds.values())), "ms"),
        Figure(f"{name}: acknowledged and lost", lost, "comparisons", at_most=0),
        *_generator(name, posted),
    ]


def _capacity(name: str, closed: list[Posted], at_least: float | None) -> list[Figure]:
    rates = [_rate(posted) for posted in closed]
    times = [one for posted in closed for one in posted.milliseconds.get(201, [])]
    median, late = np.percentile(times, (50, 99)) if times else (float("nan"), float("nan"))
    busy = statistics.median(posted.generator_cpu_seconds / posted.seconds for posted in closed)
    return [
        Figure(f"{name}: median of runs", statistics.median(rates), "comparisons/s", at_least=at_least),
        Figure(f"{name}: slowest run", min(rates), "comparisons/s"),
        Figure(f"{name}: fastest run", max(rates), "comparisons/s"),
        Figure(f"{name}: latency, p50", float(median), "ms"),
        Figure(f"{name}: latency, p99", float(late), "ms"),
        Figure(f"{name}: not acknowledged", sum(map(_not_acknowledged, closed)), "comparisons", at_most=0),
        Figure(f"{name}: load generator", 100 * busy, "% of a core"),
    ]


def _gain(ours: list[Posted], naive: list[Posted]) -> Figure:
    ratios = [_rate(one) / _rate(other) for one, other in zip(ours, naive, strict=True)]
    what = f"group commit over an EVALSHA a request: median of {len(ratios)} neighbouring runs"
    return Figure(what, statistics.median(ratios), "×")


def _rate(posted: Posted) -> float:
    return len(posted.acknowledged) / posted.seconds


def _overload(flood: _Flood, lost: int) -> list[Figure]:
    name, posted = f"{flood.per_second}/s offered", flood.posted
    statuses = posted.statuses()
    others = statuses.total() - sum(statuses[status] for status in (201, 429, 503, NO_ANSWER))
    soon = sum(milliseconds <= 1000 for milliseconds in posted.milliseconds.get(201, []))
    figures = [
        Figure(f"{name}: goodput until the last answer", statuses[201] / posted.seconds, "comparisons/s", at_least=600),
        Figure(f"{name}: until the last answer", posted.seconds, "s"),
        Figure(f"{name}: acknowledged, 201", statuses[201], "answers"),
        Figure(f"{name}: acknowledged within 1 s", soon, "answers"),
        Figure(f"{name}: shed, 429", statuses[429], "answers"),
        Figure(f"{name}: shed, 503", statuses[503], "answers"),
        Figure(f"{name}: no answer within {ANSWER_SECONDS:.0f} s", statuses[NO_ANSWER], "comparisons", at_most=0),
        Figure(f"{name}: anything else", others, "answers", at_most=0),
        Figure(f"{name}: shed without Retry-After", posted.sheds_without_retry_after, "answers", at_most=0),
    ]
    for status in (201, 429, 503):
        if times := posted.milliseconds.get(status):
            figures += _latency(f"{name}: latency of {status}", times, late_at_most=1000 if status == 429 else None)
    return [
        *figures,
        Figure(f"{name}: acknowledged and lost", lost, "comparisons", at_most=0),
        *_latency(f"{name}: GET /health on a new connection", flood.health_ms, late_at_most=1000),
        Figure(f"{name}: GET /health, just after the last answer", flood.at_once_ms, "ms", at_most=100),
        Figure(
            f"{name}: GET /health, slowest of {_HEALTH_PROBES} after {_CALM_SECONDS:g} s more",
            flood.later_ms,
            "ms",
            at_most=100,
        ),
        Figure(f"{name}: one caller then: not acknowledged", _not_acknowledged(flood.after), "comparisons", at_most=0),
        *_generator(name, posted),
    ]


def _latency(name: str, milliseconds: list[float], late_at_most: float | None) -> list[Figure]:
    median, late = np.percentile(milliseconds, (50, 99))
    return [
        Figure(f"{name}, p50", float(median), "ms"),
        Figure(f"{name}, p99", float(late), "ms", at_most=late_at_most),
    ]


def _not_acknowledged(posted: Posted) -> int:
    return posted.statuses().total() - len(posted.acknowledged)


def _generator(name: str, posted: Posted) -> list[Figure]:
    """Whether the generator kept its schedule: where it did not, the latencies are the machine's more than ours."""
    late = float(np.percentile(posted.late_ms, 99)) if posted.late_ms else 0.0
    busy = 100 * posted.generator_cpu_seconds / posted.seconds
    return [
        Figure(f"{name}: the generator behind its schedule, p99", late, "ms"),
        Figure(f"{name}: load generator", busy, "% of a core"),
    ]


async def append_in_process(effort: Effort, step: Step) -> list[Figure]:
    """Group commit beside one EVALSHA a record: 64 callers each, slices A B B A on one Redis."""
    numbers, count = itertools.count(), effort.slice_appends
    slices: dict[str, list[_Slice]] = {"group commit": [], "an EVALSHA a record": []}
    with place() as at:
        redis = redis_pid(at.url)
        async with connected(FeedbackStore, at.url) as grouped, connected(NaiveStore, at.url, CALLERS) as naive:
            await require_durable(grouped)
            one, other = zip(slices, (grouped, naive), strict=True)
            turns = [one, other, other, one] * effort.rounds
            for _, store in turns[:2]:
                await append_many(store, numbers, count // 4, CALLERS)
            for done, (name, store) in enumerate(turns):
                step("appends in this process", done, len(turns))
                cpu, redis_cpu = time.process_time(), cpu_seconds(redis)
                seconds = await append_many(store, numbers, count, CALLERS)
                cpu, redis_cpu = time.process_time() - cpu, cpu_seconds(redis) - redis_cpu
                slices[name].append(_Slice(count / seconds, 1000 * cpu / count, 1000 * redis_cpu / count))
    ratios = [fast.per_second / slow.per_second for fast, slow in zip(*slices.values(), strict=True)]
    return [
        *(figure for name, measured in slices.items() for figure in _appends(name, measured)),
        Figure("group commit over an EVALSHA a record: median of neighbouring slices", statistics.median(ratios), "×"),
        Figure("slices of each", len(ratios), f"slices of {count} comparisons"),
    ]


@dataclass(frozen=True)
class _Slice:
    """Appends a second, and seconds of CPU for a thousand: of this process, and of redis-server."""

    per_second: float
    cpu: float
    redis_cpu: float


def _appends(name: str, slices: list[_Slice]) -> list[Figure]:
    rates = [one.per_second for one in slices]
    return [
        Figure(f"{name}, {CALLERS} callers: median", statistics.median(rates), "comparisons/s"),
        Figure(f"{name}: slowest slice", min(rates), "comparisons/s"),
        Figure(f"{name}: fastest slice", max(rates), "comparisons/s"),
        Figure(f"{name}: CPU of this process", statistics.median(one.cpu for one in slices), "s/1 000"),
        Figure(f"{name}: CPU of Redis", statistics.median(one.redis_cpu for one in slices), "s/1 000"),
    ]


async def keep_a_long_log(effort: Effort, step: Step) -> list[Figure]:
    """What a comparison takes in memory and on disk, and how long the whole log takes to come back and be read."""
    numbers, first, records = itertools.count(), _FILLERS, effort.records
    sized = min(SIZED_RECORDS, records - first)
    with place() as at:
        async with connected(FeedbackStore, at.url) as store:
            await require_durable(store)
            await append_many(store, numbers, first, _FILLERS)  # what the first of all appends costs once
            empty = await size(at.url)
            seconds = await append_many(store, numbers, sized, _FILLERS)
            each = _each(empty, await size(at.url), sized)
            rest = records - first - sized
            if (needed := rest * each.memory * _MEMORY_HEADROOM) > (free := free_memory()):
                raise BenchFailed(
                    f"{records} records may take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free;"
                    " give fewer with --records"
                )
            if rest > 0:
                seconds += await append_many(
                    store, numbers, rest, _FILLERS, lambda done: step("filling the log", done, rest)
                )
            written = await store.length()
            full = await size(at.url)
            step("killing Redis", 0, 1)
            recovery = await kill_redis(at.url)
            back = await store.length()
        step("exporting", 0, 1)
        exported = await _export(at.url, at.state / "export.jsonl", back)
        step("counting", 0, 1)
        counted = await _stats(at.url, back)
    return [
        Figure("JSON of one comparison", len(encode(comparison(0))[0]), "bytes"),
        Figure(f"memory of one, over {sized} appended", each.memory, "bytes"),
        Figure(f"disk of one as it is appended, over {sized}", each.disk, "bytes"),
        Figure("records in the log", written, "comparisons"),
        Figure(f"appending, {_FILLERS} callers in this process", (written - first) / seconds, "comparisons/s"),
        Figure("Redis's memory in all", full.memory / 2**20, "MiB"),
        Figure("Redis's file in all, as rewritten and appended to", full.disk / 2**20, "MiB"),
        Figure("recovery: kill -9 of Redis to its answer, 0.5 s of it the keeper's pause", recovery, "s"),
        Figure("recovery: records missing", written - back, "comparisons", at_most=0),
        Figure("export to JSON lines, with the command's start", exported, "s"),
        Figure("export rate", back / exported, "comparisons/s"),
        Figure("stats --json, with the command's start", counted, "s"),
    ]


def _each(before: Size, after: Size, records: int) -> Size:
    return Size((after.memory - before.memory) // records, (after.disk - before.disk) // records)


async def _export(url: str, file: Path, expected: int) -> float:
    seconds, _ = await _command("export", "--redis-url", url, "--output", str(file))
    with file.open("rb") as lines:
        written = sum(1 for _ in lines)
    if written != expected:
        raise BenchFailed(f"the export has {written} lines of {expected} records")
    return seconds


async def _stats(url: str, expected: int) -> float:
    seconds, printed = await _command("stats", "--redis-url", url, "--json")
    if (counted := json.loads(printed)["comparisons"]) != expected:
        raise BenchFailed(f"stats counts {counted} comparisons of {expected}")
    return seconds


async def _command(*arguments: str) -> tuple[float, bytes]:
    """Run ``python -m feedback arguments``; returns its seconds and what it printed."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "feedback", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        printed, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise BenchFailed(f"feedback {arguments[0]} failed: {complained.decode(errors='replace')[-1000:]}")
    return time.perf_counter() - began, printed
