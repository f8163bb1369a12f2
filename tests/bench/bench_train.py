"""Training against TRL: reward models by pairs/s, PPO by episodes/s, on the same model and data, one CPU thread each.

``make bench-train``. Takes about fifteen minutes of a machine that does nothing else. ``--quick`` shows in three that
it works; its figures are noise. Peers are installed with pip into environments of their own, which ``--peers`` keeps
for the next time; where they cannot be had, ours is measured alone.
"""

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import machine
from rich.console import Console
from servers import BenchFailed
from steps import Step, steps_shown
from train_inputs import HEADS, INNER, LAYERS, VOCABULARY, WIDTH, Inputs
from train_peers import PPO_PEER, REWARD_MODEL_PEER
from train_sections import FULL, QUICK, Effort, Place, compare_ppo, compare_reward_models, measure_memory
from train_tables import cells_as_json, memory_table, ppo_as_json, ppo_table, reward_model_table
from transformers.utils import logging as transformers_logging

app = typer.Typer(add_completion=False)

_PROMPTS = 1024


class Part(StrEnum):
    """A part of the benchmark that can be run by itself."""

    REWARD_MODEL = "reward-model"
    PPO = "ppo"
    MEMORY = "memory"


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Few cells and slices: shows that it works.")] = False,
    only: Annotated[list[Part] | None, typer.Option(help="Run this part; repeat for more. All without it.")] = None,
    peers: Annotated[Path | None, typer.Option(help="Keep the peers' environments here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every slice here.")] = None,
) -> None:
    """Measure training against TRL, and the memory of each stage."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainers are ended then, too
    transformers_logging.disable_progress_bar()
    console, began = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    found: dict[str, Any] = {"machine": machine("torch", "transformers"), "quick": quick}
    found |= {"peers": [REWARD_MODEL_PEER, PPO_PEER], "load_average_before": os.getloadavg()}
    try:
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="il-")))
            inputs = Inputs(home)
            inputs.write(_PROMPTS)
            console.print(_model(inputs))
            step = stack.enter_context(steps_shown())
            place = Place(inputs, peers.absolute() if peers else home / "peers", console.print)
            for part in dict.fromkeys(only or Part):
                found[part] = _measure(part, QUICK if quick else FULL, place, step, console)
    except BenchFailed as error:
        typer.echo(f"bench: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        found["load_average_after"] = os.getloadavg()
        if json_path is not None:  # the parts that were measured before one failed, too
            json_path.write_text(json.dumps(found, indent=1) + "\n")
    loads = " and ".join(f"{found[f'load_average_{when}'][0]:.1f}" for when in ("before", "after"))
    console.print(f"{found['machine']['cores']} cores; load average before and after: {loads}")
    console.print(f"{time.monotonic() - began:.0f} s in all")


def _measure(part: Part, effort: Effort, place: Place, step: Step, console: Console) -> Any:
    if part is Part.REWARD_MODEL:
        cells = compare_reward_models(effort, place, step)
        console.print(reward_model_table(cells))
        return cells_as_json(cells)
    if part is Part.PPO:
        slices = compare_ppo(effort, place, step)
        console.print(ppo_table(slices))
        return ppo_as_json(slices)
    if part is Part.MEMORY:
        memory = measure_memory(place, step)
        console.print(memory_table(memory))
        return memory
    return None


def _model(inputs: Inputs) -> str:
    return (
        f"A random Llama of {inputs.parameters / 1e6:.1f}M parameters ({LAYERS} layers, {WIDTH} wide, {INNER} inside, "
        f"{HEADS} heads, {VOCABULARY} tokens, untied), fp32, one thread each, no checkpointing, fused AdamW"
    )


if __name__ == "__main__":
    app()
