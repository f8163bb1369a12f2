"""What the benchmark found, as tables to read. The JSON has every slice and every change."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from cells import OURS, PROXIED, VLLM, Cell, recording_share
from changes import Change
from figures import spread
from rich.table import Table
from sections import Changed, Compared

_ROWS = {
    "requests_per_second": ("requests/s", ".1f"),
    "tokens_per_second": ("output tokens/s", ".0f"),
    "latency_p50_ms": ("latency, median, ms", ".1f"),
    "latency_p99_ms": ("latency, p99, ms", ".1f"),
    "first_token_p50_ms": ("first token, median, ms", ".1f"),
    "first_token_p99_ms": ("first token, p99, ms", ".1f"),
    "inter_token_p50_ms": ("inter-token, median, ms", ".2f"),
    "inter_token_p99_ms": ("inter-token, p99, ms", ".2f"),
    "server_cpu_seconds_per_1000": ("server CPU, s/1 000", ".2f"),
    "redis_cpu_seconds_per_1000": ("Redis CPU, s/1 000", ".3f"),
}
_GOALS_MS = {"promote": 100, "rollback": 1000, "in place (wait)": 500, "in place (keep)": 500}
_BUSY_GENERATOR = 0.7


def tables(found: Compared) -> Iterable[Table | str]:
    """Figures of every cell, then what recording and a proxy cost, and whether the measurement was in order."""
    for cell in found.cells:
        yield _figures(cell)
    yield _costs(found.cells)
    idle = ", ".join(f"{name} {share:.1%}" for name, share in found.idle_cpu.items())
    busiest = max(cell.figures(variant)["generator_cpu_share"] for cell in found.cells for variant in cell.slices)
    yield f"Idle servers use of one core: {idle}. The load generator used at most {busiest:.0%} of one core" + (
        "; it held the servers up." if busiest > _BUSY_GENERATOR else "."
    )


def _name(cell: Cell) -> str:
    return f"{'streamed' if cell.stream else 'whole'}, {cell.callers} at once"


def _figures(cell: Cell) -> Table:
    table = Table(title=f"Chat completions {_name(cell)}; slices of {cell.requests} requests")
    table.add_column("")
    for variant in cell.slices:
        table.add_column(variant, justify="right")
    table.add_column(f"{OURS} : {VLLM}\nabove 1: ours is better", justify="right")
    ratios = cell.ratios(OURS, VLLM)
    by_variant = [cell.figures(variant) for variant in cell.slices]
    for name, (title, style) in _ROWS.items():
        if name in by_variant[0]:
            figures = [format(figures[name], style) for figures in by_variant]
            table.add_row(title, *figures, spread(ratios[name], ".2f") if name in ratios else "")
    return table


def _costs(cells: Sequence[Cell]) -> Table:
    table = Table(title="What recording and a proxy cost: median (least … most) over pairs of slices")
    for heading in (
        "",
        "recording:\nserver CPU",
        "recording: server\nand Redis CPU",
        "proxy:\nlatency, ms",
        "proxy:\nCPU, s/1 000",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for cell in cells:
        share = recording_share(cell)
        table.add_row(
            _name(cell),
            spread(share["server"], "+.1%"),
            spread(share["server_and_redis"], "+.1%"),
            spread(_added(cell, "latency_p50_ms"), "+.1f"),
            spread(_added(cell, "server_cpu_seconds_per_1000"), "+.2f"),
        )
    return table


def _added(cell: Cell, name: str) -> list[float]:
    pairs = zip(cell.slices[PROXIED], cell.slices[VLLM], strict=True)
    return [proxied[name] - alone[name] for proxied, alone in pairs]


def changes_table(title: str, found: Changed) -> Table:
    """How long each kind of change took, without load and under it, and how the streams fared."""
    loaded = found.loaded
    table = Table(title=title, caption=_fared(found))
    table.add_column("ms from accepting a change\nto, median (… most)")
    for what in (
        "changes",
        "first request\non it sent",
        "its first\nbyte",
        "goal",
        "accepting\nitself",
        "a usual\nanswer",
    ):
        table.add_column(what, justify="right")
    for where, changes in (("", found.idle), (f", {loaded.streams} streams", loaded.changes)):
        kinds = dict.fromkeys((one.verb, one.warm) for one in changes)
        for verb, warm in kinds:
            same = [one for one in changes if (one.verb, one.warm) == (verb, warm)]
            _add_change(table, f"{verb}{'' if warm else ', cold engine'}{where}", _GOALS_MS.get(verb), same)
    return table


def _add_change(table: Table, name: str, goal: int | None, changes: list[Change]) -> None:
    sent = [milliseconds for one in changes for milliseconds in one.sent_ms]
    first = [milliseconds for one in changes for milliseconds in one.first_ms]
    table.add_row(
        name,
        str(len(changes)),
        f"{statistics.median(sent):.0f} (… {max(sent):.0f})",
        f"{statistics.median(first):.0f} (… {max(first):.0f})",
        f"≤ {goal}" if goal else "",
        f"{statistics.median(one.accepted_ms for one in changes):.1f}",
        f"{statistics.median(one.usual_ms for one in changes):.1f}",
    )


def _fared(found: Changed) -> str:
    loaded = found.loaded
    probes = [why for one in (*found.idle, *loaded.changes) for why in one.failed]
    versions = ", ".join(f"version {number}: {count}" for number, count in loaded.completions.items())
    return (
        f"{len(loaded.changes)} changes under {loaded.streams} streams: {len(loaded.failed)} failed and {loaded.mixed} "
        f"mixed-version completions of {sum(loaded.completions.values())}\n({versions}); {len(probes)} of the requests "
        f"that looked for the change failed"
        + "".join(f"\n{count} × {why[:200]}" for why, count in Counter(probes + loaded.failed).most_common(3))
    )
