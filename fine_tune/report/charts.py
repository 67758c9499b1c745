"""Curves as SVG for the page: small, without text of the user's, in colours that follow light and dark.

Long curves are drawn by the smallest and the largest value of each stretch, so that no spike is lost.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter, StrMethodFormatter

from fine_tune.report.record import Curve

MOST_STRETCHES = 300
MOST_MARKS = 60  # of one kind
SIZE_INCHES = (5.2, 2.9)
# Colours no other part of a drawing has; the page gives each of them its own in light and dark.
INK = {"#010101": "ink", "#020202": "faint", "#030303": "one", "#040404": "two", "#050505": "three"}
INK |= {"#060606": "bad", "#070707": "warn", "#080808": "good"}
COLOUR = {name: colour for colour, name in INK.items()}
SERIES = ("one", "two", "three", "good", "bad", "warn")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fine_tune",
    "font.size": 11,
    "axes.edgecolor": COLOUR["faint"],
    "axes.labelcolor": COLOUR["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": COLOUR["faint"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": COLOUR["ink"],
    "ytick.color": COLOUR["ink"],
    "text.color": COLOUR["ink"],
    "legend.frameon": False,
    "legend.fontsize": 10,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Args:
        name: In the legend; ours, never the user's. Empty: one of many, behind those that have one.
        curve: What is drawn.
        points: With a mark at each value: few values, each of them measured.
        faint: Behind its smoothed form.
        colour: Of ``SERIES``.
    """

    name: str
    curve: Curve
    points: bool = False
    faint: bool = False
    colour: str = "one"


@dataclass(frozen=True)
class Mark:
    """Something that happened at some steps, drawn as upright lines."""

    name: str
    steps: list[int]
    colour: str
    style: str = "--"


@dataclass(frozen=True)
class Drawing:
    """What a chart shows; ``localized`` writes the numbers of its axes in the page's language."""

    lines: list[Line]
    x_name: str
    marks: list[Mark] = field(default_factory=list)
    logarithmic: bool = False
    legend: bool = True
    localized: Callable[[str], str] = str


def thinned(curve: Curve, most: int = MOST_STRETCHES) -> Curve:
    """Keep the smallest and the largest value of each of ``most`` stretches, in their order.

    With one stretch, the values 3, 1, 2, 9, 4 become 1, 9.
    """
    curve = curve.finite()
    if len(curve) <= 2 * most:
        return curve
    kept = set()
    for stretch in np.array_split(np.arange(len(curve)), most):
        values = curve.values[stretch]
        kept |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
    index = np.array(sorted(kept))
    return Curve(curve.steps[index], curve.values[index])


def smoothed(curve: Curve, width: int) -> Curve:
    """Average each value with those around it, ``width`` in all, fewer at the ends."""
    curve = curve.finite()
    if width < 2 or len(curve) < 3:
        return curve
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    index = np.arange(len(curve))
    low = np.maximum(0, index - width // 2)
    high = np.minimum(len(curve), index + width // 2 + 1)
    return Curve(curve.steps, (sums[high] - sums[low]) / (high - low))


def draw(drawing: Drawing) -> str:
    """Draw a chart as an ``<svg>`` element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES)
        axes = figure.add_subplot()
        for mark in drawing.marks:
            _mark(axes, mark)
        for line in drawing.lines:
            _line(axes, line)
        positive = all((line.curve.finite().values > 0).all() for line in drawing.lines)
        if drawing.logarithmic and positive and any(len(line.curve) for line in drawing.lines):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(_values(drawing.localized))
        axes.xaxis.set_major_formatter(_Steps(drawing.localized))
        axes.set_xlabel(drawing.x_name)
        axes.margins(x=0.01)
        handles, names = axes.get_legend_handles_labels()
        with_legend = drawing.legend and len(names) > 1
        if with_legend:
            figure.legend(handles, names, loc="upper left", ncols=3, handlelength=1.4)
        rows = -(-len(names) // 3) if with_legend else 0
        figure.subplots_adjust(left=0.15, right=0.98, bottom=0.18, top=0.96 - 0.085 * rows)
        written = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", metadata=nothing, transparent=True)
    return _for_page(written.getvalue())


class _Steps(ScalarFormatter):
    """As matplotlib numbers an axis, millions by their power of ten, in the page's language."""

    def __init__(self, localized: Callable[[str], str]) -> None:
        super().__init__()
        self._localized = localized

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self._localized(super().__call__(x, pos))


def _values(localized: Callable[[str], str]) -> Callable[[float, float], str]:
    write = StrMethodFormatter("{x:.6g}")
    return lambda value, _: localized(write(value))


def _line(axes: Axes, line: Line) -> None:
    curve = thinned(line.curve)
    marked: dict[str, Any] = (
        {"marker": "o", "markersize": 4} if line.points or len(curve) == 1 else {}
    )
    axes.plot(
        curve.steps,
        curve.values,
        color=COLOUR[line.colour],
        label=line.name or None,  # without a name: not in the legend
        linewidth=0.9 if line.faint else 1.7,
        alpha=0.4 if line.faint else 1.0,
        **marked,
    )


def _mark(axes: Axes, mark: Mark) -> None:
    index = np.linspace(0, len(mark.steps) - 1, min(len(mark.steps), MOST_MARKS)).round()
    for i, step in enumerate(
        mark.steps[int(at)] for at in index
    ):  # the first and the last among them
        axes.axvline(
            step,
            color=COLOUR[mark.colour],
            linestyle=mark.style,
            linewidth=1.1,
            label=mark.name if i == 0 else None,
        )


def _for_page(svg: str) -> str:
    """Keep the drawing alone: no prologue, ids of groups or fixed size; colours and font are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg [^>]*?)\bheight="[^"]*" ', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*" ', r"\1", svg)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    for colour, name in INK.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg)
