"""Completions, ours against vLLM's own server: interleaved slices of the same load, cell by cell.

A cell is a kind of request and a number of callers. In each round its variants take turns forwards and then
backwards (A B … B A), so that a machine that grows slower is no variant's fault; a ratio is always of two slices
of the same half round.
"""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from load import Measured, chat_request, closed_loop
from servers import BenchFailed, cpu_seconds

MAX_TOKENS = 32
CALLERS = (1, 8, 32)
OURS, UNRECORDED, VLLM, PROXIED = "ours", "ours, store: false", "vLLM", "proxy + vLLM"

_PROMPTS = tuple(
    f"{ask} the {adjective} {noun}"
    for ask in ("tell me about", "what eats", "draw", "where lives")
    for adjective in ("green", "sleepy", "very old", "other")
    for noun in ("frog", "lighthouse keeper", "sea", "clock")
)
_HIGHER_IS_BETTER = ("requests_per_second", "tokens_per_second")
_NOT_COMPARED = ("generator_cpu_share", "redis_cpu_seconds_per_1000", "events_per_request")
_SETTLE_SECONDS = 0.1
"""After a slice: what was left to record is written, and counted as the slice's."""

Figures = dict[str, float]
"""Figures of one slice, or of all slices together. Each name ends in its unit."""

Samples = dict[str, list[float]]
"""Every single ``latency``, ``first_token`` and ``inter_token`` seen, in ms."""


@dataclass(frozen=True)
class Variant:
    """One way to be served.

    Attributes:
        pids: Roots of the process trees that serve it.
        redis: Process id of its redis-server, counted apart.
        fields: What its requests have besides what all have.
    """

    name: str
    port: int
    pids: tuple[int, ...]
    redis: int | None = None
    fields: dict[str, object] = field(default_factory=dict)

    def requests(self, *, stream: bool) -> list[bytes]:
        """Its requests, one for each prompt."""
        return [chat_request(prompt, MAX_TOKENS, stream=stream, **self.fields) for prompt in _PROMPTS]


@dataclass(frozen=True)
class Cell:
    """One kind of load, and what each variant did under it.

    Attributes:
        requests: Of each slice.
        slices: For each variant the figures of its slices, in the order of the rounds.
        samples: For each variant those of all its slices.
    """

    stream: bool
    callers: int
    requests: int
    slices: dict[str, list[Figures]]
    samples: dict[str, Samples]

    def figures(self, variant: str) -> Figures:
        """A variant's figures: percentiles of all its samples, and the medians over its slices of all else."""
        slices = self.slices[variant]
        medians = {name: statistics.median(figures[name] for figures in slices) for name in slices[0]}
        return medians | _percentiles(self.samples[variant])

    def ratios(self, variant: str, against: str) -> dict[str, list[float]]:
        """For each figure the ratio of each pair of slices, turned so that above 1 ``variant`` is the better one."""
        pairs = list(zip(self.slices[variant], self.slices[against], strict=True))
        return {
            name: [_better(name, figures[name], other[name]) for figures, other in pairs]
            for name in pairs[0][0]
            if name not in _NOT_COMPARED
        }


def _better(name: str, figure: float, other: float) -> float:
    above, below = (figure, other) if name in _HIGHER_IS_BETTER else (other, figure)
    return above / below if below else float("nan")


def recording_share(cell: Cell) -> dict[str, list[float]]:
    """CPU that recording costs, as a share of the same request's unrecorded: in the server, and with Redis'."""
    pairs = list(zip(cell.slices[OURS], cell.slices[UNRECORDED], strict=True))
    server, redis = "server_cpu_seconds_per_1000", "redis_cpu_seconds_per_1000"
    return {
        "server": [on[server] / off[server] - 1 for on, off in pairs],
        "server_and_redis": [(on[server] + on[redis]) / (off[server] + off[redis]) - 1 for on, off in pairs],
    }


async def measure_cell(
    variants: Sequence[Variant], *, stream: bool, callers: int, seconds: float, rounds: int, tick: Callable[[], None]
) -> Cell:
    """Measure one cell.

    Args:
        variants: Those that take turns, in order.
        stream: Whether the answers are streamed.
        callers: Requests under way at once.
        seconds: How long a slice shall take about; all slices of a cell have the same number of requests.
        rounds: How often all variants take two turns.
        tick: Called after each slice.
    """
    trial = await closed_loop(variants[0].port, variants[0].requests(stream=stream), 16 * callers, callers)
    count = max(16 * callers, round(seconds * len(trial.answers) / trial.seconds))
    slices: dict[str, list[Figures]] = {variant.name: [] for variant in variants}
    samples: dict[str, Samples] = {variant.name: {} for variant in variants}
    for _ in range(rounds):
        for variant in (*variants, *reversed(variants)):
            figures, seen = await _slice(variant, stream=stream, count=count, callers=callers)
            slices[variant.name].append(figures)
            for name, milliseconds in seen.items():
                samples[variant.name].setdefault(name, []).extend(milliseconds)
            tick()
    return Cell(stream, callers, count, slices, samples)


async def _slice(variant: Variant, *, stream: bool, count: int, callers: int) -> tuple[Figures, Samples]:
    redis_pids = () if variant.redis is None else (variant.redis,)
    served, redis = cpu_seconds(*variant.pids), cpu_seconds(*redis_pids)
    measured = await closed_loop(variant.port, variant.requests(stream=stream), count, callers)
    await asyncio.sleep(_SETTLE_SECONDS)
    figures = {
        "requests_per_second": count / measured.seconds,
        "tokens_per_second": count * MAX_TOKENS / measured.seconds,
        "server_cpu_seconds_per_1000": (cpu_seconds(*variant.pids) - served) * 1000 / count,
        "redis_cpu_seconds_per_1000": (cpu_seconds(*redis_pids) - redis) * 1000 / count,
        "generator_cpu_share": measured.generator_cpu_seconds / measured.seconds,
    }
    samples = _samples(measured, stream=stream)
    if stream:
        figures["events_per_request"] = len(samples["inter_token"]) / count + 1
    return figures | _percentiles(samples), samples


def _samples(measured: Measured, *, stream: bool) -> Samples:
    answers = measured.answers
    samples = {"latency": [(answer.ended - answer.sent) * 1000 for answer in answers]}
    if stream:
        # A chat's first event only names the role; its second carries the first token, its last is [DONE].
        tokens = [answer.events[1:-1] for answer in answers]
        first = [(times[0] - answer.sent) * 1000 for answer, times in zip(answers, tokens, strict=True)]
        between = [(late - early) * 1000 for times in tokens for early, late in pairwise(times)]
        samples |= {"first_token": first, "inter_token": between}
    return samples


def _percentiles(samples: Samples) -> Figures:
    figures: Figures = {}
    for name, milliseconds in samples.items():
        median, late = np.percentile(milliseconds, (50, 99))
        figures |= {f"{name}_p50_ms": float(median), f"{name}_p99_ms": float(late)}
    return figures


async def warm_up(variant: Variant) -> None:
    """Have a variant do all it will be measured on, and check that it samples as many tokens as the others.

    Raises:
        BenchFailed: It does not: figures per request would not compare.
    """
    for stream in (False, True):
        await closed_loop(variant.port, variant.requests(stream=stream), 4 * max(CALLERS), max(CALLERS))
    for fields in ({"stream": False}, {"stream": True, "stream_options": {"include_usage": True}}):
        request = chat_request(_PROMPTS[0], MAX_TOKENS, **fields, **variant.fields)
        (answer,) = (await closed_loop(variant.port, [request], 1, 1)).answers
        if b'"completion_tokens":%d' % MAX_TOKENS not in answer.body:
            raise BenchFailed(f"{variant.name} did not sample {MAX_TOKENS} tokens: {answer.body[-300:]!r}")


async def idle_cpu(variant: Variant, seconds: float) -> float:
    """Share of a core that a variant's servers use while nobody asks."""
    before = cpu_seconds(*variant.pids)
    await asyncio.sleep(seconds)
    return (cpu_seconds(*variant.pids) - before) / seconds
