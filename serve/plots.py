"""The operator page's plots as SVG: how often people preferred one version to another, with what is certain of it.

A drawing stands by itself, light or dark as the page around it. Nothing here touches matplotlib's global state, so
drawings can be made beside the event loop.
"""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from serve.win_rates import Course, WinRate

_INK, _FAINT, _RATE = "#010203", "#010204", "#010205"
"""Colours that occur nowhere else, and are exchanged for the variables below."""
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)", _RATE: "var(--rate)"}
_COLOURS = """<style>
:root { --ink: #5b606b; --faint: #dad7cf; --rate: #a8500a; }
@media (prefers-color-scheme: dark) { :root { --ink: #a6acb8; --faint: #343944; --rate: #f0b35e; } }
</style>"""
_INCHES = (4.0, 2.4)
_POINTS = 9


def canary_plot(course: Course) -> bytes:
    """The canary's win rate over its comparisons without a tie, and between which bounds the preference surely is."""
    figure, axes = _figure()
    axes.fill_between(course.looks, course.low, course.high, color=_RATE, alpha=0.2, linewidth=0)
    axes.plot(course.looks, course.wins / course.looks, color=_RATE, linewidth=1.6)
    axes.set_xlim(0, max(10, course.looks.max(initial=0)))
    axes.set_xlabel("comparisons without a tie", color=_INK, fontsize=_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _svg(figure)


def released_plot(rates: Sequence[WinRate]) -> bytes:
    """The win rate of each version over the one it replaced or may replace, with its bounds, in order of time."""
    figure, axes = _figure()
    for place, one in enumerate(rates):
        axes.plot([place, place], [one.low, one.high], color=_RATE, linewidth=7, alpha=0.3, solid_capstyle="butt")
        if one.rate is not None:
            axes.plot([place], [one.rate], "o", color=_RATE, markersize=5)
    axes.set_xticks(range(len(rates)), [str(one.version) for one in rates])
    axes.set_xlim(-0.6, max(4.0, len(rates) - 0.4))
    axes.set_xlabel("version", color=_INK, fontsize=_POINTS)
    return _svg(figure)


def _figure() -> tuple[Figure, Axes]:
    """Axes of a win rate, upwards from 0 to 1, with a line where nothing is preferred."""
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0.5, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=_POINTS)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    before, defs, after = text.partition("<defs>")
    return f"{before}{_COLOURS}{defs}{after}".encode()
