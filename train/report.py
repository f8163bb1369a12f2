"""One picture of a training run: its numbers against the iteration, and a table of what came out, as PNG."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.errors import DatasetUnusable

PANELS: Mapping[str, str] = {
    "score": "reward model score",
    "gold": "gold utility (never seen in training)",
    "kl_to_reference": "KL to reference, nats per completion",
    "completion_tokens": "tokens per completion",
    "eos_share": "share of completions that end",
    "entropy": "entropy, nats per token",
    "ptx_loss": "pretraining loss, nats per token",
    "explained_variance": "explained variance of the value model",
}
"""What is drawn, where a history has it, and its axis label. Score and gold side by side show over-optimisation."""

_COLUMNS = 4
_PANEL_INCHES = (3.6, 2.6)
_ROW_INCHES = 0.28

History = Sequence[Mapping[str, float]]
"""The numbers of each iteration, as ``ppo.run`` keeps them."""


@dataclass(frozen=True)
class Table:
    """A table of text; every row is as long as the header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def read_history(path: Path) -> list[dict[str, float]]:
    """The history ``ppo.run`` wrote. Raises DatasetUnusable where the file is not one."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DatasetUnusable(f"{path} holds no history of a PPO run: {error}") from error


def draw(path: Path, title: str, histories: Mapping[str, History], table: Table) -> None:
    """Write ``path`` (PNG): one panel per number in PANELS that a history has, one line per history, then the table.

    Args:
        path: the file to write.
        title: above everything.
        histories: by the name of the run, say one per seed.
        table: below the panels.

    Raises:
        DatasetUnusable: where a row of the table is not as long as its header.
    """
    if ragged := [row for row in table.rows if len(row) != len(table.header)]:
        raise DatasetUnusable(f"{len(table.header)} columns, but the table has a row {list(ragged[0])}")
    names = [name for name in PANELS if any(name in numbers for history in histories.values() for numbers in history)]
    lines = math.ceil(len(names) / _COLUMNS)
    heights = [_PANEL_INCHES[1]] * lines + [_ROW_INCHES * (len(table.rows) + 2)]
    figure = Figure(figsize=(_PANEL_INCHES[0] * _COLUMNS, sum(heights)), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
    for number, name in enumerate(names):
        _panel(figure.add_subplot(grid[number // _COLUMNS, number % _COLUMNS]), name, histories, legend=number == 0)
    _draw_table(figure.add_subplot(grid[len(heights) - 1, :]), table)
    figure.savefig(path, format="png", dpi=110)


def _panel(axes: Axes, name: str, histories: Mapping[str, History], *, legend: bool) -> None:
    for run, history in histories.items():
        points = [(numbers["iteration"], numbers[name]) for numbers in history if name in numbers]
        axes.plot([x for x, _ in points], [y for _, y in points], label=run, linewidth=1.2)
    axes.set_title(PANELS[name], fontsize=8)
    axes.set_xlabel("iteration", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if legend and len(histories) > 1:
        axes.legend(fontsize=7)


def _draw_table(axes: Axes, table: Table) -> None:
    axes.axis("off")
    if table.rows:
        drawn = axes.table(
            cellText=[list(row) for row in table.rows], colLabels=list(table.header), loc="center", cellLoc="right"
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)
        drawn.auto_set_column_width(range(len(table.header)))
