"""Figures, each with its unit and, where there is one, its goal; and the table and JSON they are shown in."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        at_most: The goal, where less is better.
        at_least: The goal, where more is better.
    """

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def goal(self) -> str:
        """The goal as it is read; empty without one."""
        if self.at_most is not None:
            return f"≤ {_number(self.at_most)}"
        return "" if self.at_least is None else f"≥ {_number(self.at_least)}"


def figures_table(title: str, figures: Sequence[Figure]) -> Table:
    """The figures of one part, a row each."""
    table = Table("what", title=title, title_justify="left")
    for heading in ("measured", "goal"):
        table.add_column(heading, justify="right")
    for heading in ("unit", ""):
        table.add_column(heading)
    for one in figures:
        verdict = "" if one.met is None else "met" if one.met else "[bold red]missed[/]"
        table.add_row(one.what, _number(one.value), one.goal(), one.unit, verdict)
    return table


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The same, and whether each goal is met."""
    return [asdict(one) | {"met": one.met} for one in figures]


def spread(values: Sequence[float], style: str) -> str:
    """Median, least and most of some values, each in a format of ``style``."""
    low, middle, high = (format(value, style) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} … {high})"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
