"""What the benchmark of training found, as tables to read; the JSON has every slice."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from figures import spread
from rich.table import Table
from train_inputs import COMPLETION_TOKENS, END_PROBABILITY, PROMPT_TOKENS, SAMPLED_TOKENS, SHORTEST_PROMPT
from train_sections import GOALS, MINIBATCHES, OURS, PPO_GOAL, THEIRS, UNPACKED, WITH_TEXT, Cell
from train_slices import Slice, median_rate, ratios

_PARTS = ("sample", "score", "update")


def reward_model_table(cells: Sequence[Cell]) -> Table:
    """A row for each kind of data."""
    table = Table(
        title=f"Reward model, pairs/s: median of slices; completions of {COMPLETION_TOKENS} tokens on average",
        caption="Ratio: median (least … most) of neighbouring slices. Limit: TRL's tokens over ours, without padding.\n"
        f"{UNPACKED}: every completion behind its own copy of the prompt.",
    )
    table.add_column("K, prompt : completion")
    headings = (OURS, "ours,\nunpacked", THEIRS, "ours : TRL", "by CPU time", "goal", "limit\nby tokens", "")
    for heading in headings:
        table.add_column(heading, justify="right")
    for cell in cells:
        found, goal = cell.slices, GOALS.get((cell.completions, cell.prompt_ratio))
        compared = _compared(found, goal)
        table.add_row(
            f"{cell.completions}, {cell.prompt_ratio} : 1",
            *(f"{median_rate(found[name]):.1f}" if name in found else "–" for name in (OURS, UNPACKED, THEIRS)),
            *compared[:-1],
            f"{cell.token_limit:.1f}",
            compared[-1],
        )
    return table


def ppo_table(found: dict[str, dict[str, list[Slice]]]) -> Table:
    """A row for each trainer and kind of lengths."""
    table = Table(
        title=f"PPO, episodes/s: median of slices; one epoch in {MINIBATCHES} minibatches",
        caption=f"Full: prompts of {PROMPT_TOKENS} tokens, completions of {SAMPLED_TOKENS}. Ragged: prompts of "
        f"{SHORTEST_PROMPT} to {PROMPT_TOKENS}, completions that end\nafter each token with probability "
        f"1/{1 / END_PROBABILITY:.0f}, at {SAMPLED_TOKENS} at the latest.\nSeconds of an iteration; TRL's as its "
        f"functions return. {WITH_TEXT}: PPO-ptx, as many sequences of text as episodes in each minibatch.",
    )
    table.add_column("")
    for heading in ("episodes/s", *_PARTS, "ours : TRL", "by CPU time", "goal", ""):
        table.add_column(heading, justify="right")
    for lengths, by_trainer in found.items():
        for name, slices in by_trainer.items():
            parts = (statistics.median(one.parts[part] for one in slices) for part in _PARTS)
            compared = _compared(by_trainer, PPO_GOAL) if name == OURS else ("", "", "", "")
            rate, times = f"{median_rate(slices):.2f}", (f"{seconds:.1f}" for seconds in parts)
            table.add_row(f"{lengths}: {name}", rate, *times, *compared)
    return table


def _compared(found: dict[str, list[Slice]], goal: float | None) -> tuple[str, str, str, str]:
    """Ratios by the clock and by CPU time, the goal, and whether both are above it; empty without a peer."""
    wanted = f"≥ {goal:g}" if goal else ""
    if THEIRS not in found:
        return "–", "–", wanted, ""
    times = ratios(found[OURS], found[THEIRS])
    lesser = min(map(statistics.median, times.values()))
    verdict = "" if goal is None else "met" if lesser >= goal else "[bold red]missed[/]"
    return spread(times["clock"], ".1f"), spread(times["cpu"], ".1f"), wanted, verdict


def memory_table(found: dict[str, dict[str, float]]) -> Table:
    """A row for each stage."""
    table = Table(
        title="Memory of each stage of ours, MiB, above what imports take",
        caption="rest: activations, and what the allocator keeps",
    )
    table.add_column("")
    for heading in ("weights", "gradients", "optimizer", "rest", "peak", "peak : all but the rest"):
        table.add_column(heading, justify="right")
    for stage, measured in found.items():
        known = measured["weights"] + measured["gradients"] + measured["optimizer"]
        numbers = [measured[name] for name in ("weights", "gradients", "optimizer")]
        numbers += [measured["peak"] - known, measured["peak"]]
        table.add_row(stage, *(f"{number:.0f}" for number in numbers), f"{measured['peak'] / known:.1f}")
    return table


def cells_as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every slice of every cell, and the ratios of neighbours."""
    return [
        asdict(cell) | {"goal": GOALS.get((cell.completions, cell.prompt_ratio)), "ratios": _ratios(cell.slices)}
        for cell in cells
    ]


def ppo_as_json(found: dict[str, dict[str, list[Slice]]]) -> dict[str, Any]:
    """Every slice, and the ratios of neighbours, by lengths."""
    return {
        lengths: {
            "slices": {name: [asdict(one) for one in slices] for name, slices in by_trainer.items()},
            "goal": PPO_GOAL,
            "ratios": _ratios(by_trainer),
        }
        for lengths, by_trainer in found.items()
    }


def _ratios(found: dict[str, list[Slice]]) -> dict[str, list[float]]:
    return ratios(found[OURS], found[THEIRS]) if THEIRS in found else {}
