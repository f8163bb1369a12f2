"""Plots as SVG to stand inside a page: they take its colours, light or dark, and its typeface."""

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

_INK, _FAINT = "#010203", "#010204"
_SERIES = ("#010205", "#010206", "#010207", "#010208", "#010209", "#01020a")
"""Colours that occur nowhere else, and are exchanged for the page's own."""

_PAGE_COLOURS = {
    _INK: "var(--muted)",
    _FAINT: "var(--rule)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "instructloop",
    "text.parse_math": False,  # names of tasks are whatever people call them
    "font.size": 8.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.labelcolor": _INK,
    "legend.frameon": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
}

MOST_LINES = len(_SERIES)
"""That a plot can show in different colours."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Range:
    """A figure with its 95 % interval, by name."""

    name: str
    value: float
    low: float
    high: float


def lines(series: Mapping[str, Points], x_label: str, width: float = 3.5, height: float = 2.1) -> str:
    """One line per series of (x, y) points; points that are not finite are left out.

    Args:
        series: by its name in the legend, which is drawn where there are several.
        x_label: below the axis.
        width: inches, as ``height``.
        height: of the whole plot.
    """
    with _figure(width, height) as (figure, axes):
        for number, (name, points) in enumerate(series.items()):
            finite = [(x, y) for x, y in points if math.isfinite(y)]
            colour = _SERIES[number % len(_SERIES)]
            axes.plot([x for x, _ in finite], [y for _, y in finite], color=colour, linewidth=1.6, label=name)
        axes.set_xlabel(x_label)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.02, y=0.1)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=7.5, handlelength=1.2)
        return _svg(figure)


def ranges(found: Sequence[Range], middle: float) -> str:
    """A row per figure: its value, its interval, and where they lie beside ``middle``, from 0 to 1."""
    with _figure(6.0, 0.5 + 0.34 * len(found)) as (figure, axes):
        for row, one in enumerate(reversed(found)):
            axes.plot([one.low, one.high], [row, row], color=_SERIES[0], linewidth=2.4, solid_capstyle="round")
            axes.plot([one.value], [row], "o", color=_SERIES[0], markersize=6)
        axes.axvline(middle, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(found)), [one.name for one in reversed(found)])
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        return _svg(figure)


def calibration(points: Points) -> str:
    """Predicted against observed shares, from one half to 1, beside the diagonal on which the two agree."""
    with _figure(3.5, 2.1) as (figure, axes):
        axes.plot([0.5, 1], [0.5, 1], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=_SERIES[0], markersize=4, linewidth=1.4)
        axes.set_xlabel("predicted")
        axes.set_ylabel("observed")
        axes.set_xlim(0.5, 1)
        axes.set_ylim(min(0.5, *(y for _, y in points)), 1)
        axes.grid()
        return _svg(figure)


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """The drawing alone: no XML prolog, no metadata, no background."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', text)
    text = text.replace("xlink:href", "href")
    for colour, its_name in _PAGE_COLOURS.items():
        text = text.replace(colour, its_name)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]  # no two drawings of a page may share an id
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", text)
