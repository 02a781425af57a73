"""The one place that draws. Every function returns a figure; `save` writes it as PNG and SVG.

Colours are those of Okabe and Ito, told apart with any colour vision; markers and line
styles differ besides, so that a print in black and white can be read.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pruning.checkpoint import replace_file
from pruning.errors import PruningError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "svg.hashsalt": "pruning",
    "svg.fonttype": "none",
}


class Point(NamedTuple):
    """A network in a plot of accuracy (0 to 1) against cost; `spread` is σ over seeds."""

    cost: float
    accuracy: float
    label: str = ""
    spread: float = 0.0


def pareto(
    series: Mapping[str, Sequence[Point]], anchors: Sequence[Point] = (), *, cost: str = "params"
) -> Figure:
    """Accuracy against cost: a line along the front of each series, and anchors to compare with.

    Args:
        series: by name, networks of one origin; those that another of the series beats in
            both accuracy and cost are drawn, but the line leaves them out.
        anchors: results of others. cost: what the x axis counts.
    """
    figure, axes = _new(6.4, 4.4)
    for number, (name, points) in enumerate(series.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        ordered = front(points)
        axes.plot([p.cost for p in ordered], [100 * p.accuracy for p in ordered], color=colour, lw=1.2)
        axes.errorbar(
            [p.cost for p in points],
            [100 * p.accuracy for p in points],
            yerr=[100 * p.spread for p in points],
            fmt=marker,
            color=colour,
            ms=5,
            capsize=3,
            lw=1,
            label=name,
        )
        for point in points:
            _annotate(axes, point, colour)
    if anchors:
        axes.scatter(
            [p.cost for p in anchors],
            [100 * p.accuracy for p in anchors],
            marker="x",
            color="#555555",
            label="published",
            zorder=3,
        )
        for point in anchors:
            _annotate(axes, point, "#555555")
    axes.set_xscale("log")
    axes.set_xlabel(f"{cost} (log scale)")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    return figure


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both cost and accuracy, by cost."""
    best, chosen = float("-inf"), []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            chosen.append(point)
    return chosen


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as PATH.png and PATH.svg, the same bytes for the same figure."""
    import matplotlib

    stem = Path(path).with_suffix("")
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
        target = stem.with_suffix(f".{kind}")
        replace_file(target, buffer.getvalue())
        written.append(target)
    return written


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure with its axes, in the style of all, without touching matplotlib's global state."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as New
    except ImportError as error:
        raise PruningError(f"plots need the package matplotlib: pip install matplotlib ({error})") from error
    with matplotlib.rc_context(_STYLE):
        figure = New(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns)


def _annotate(axes: Any, point: Point, colour: str) -> None:
    if point.label:
        axes.annotate(
            point.label,
            (point.cost, 100 * point.accuracy),
            textcoords="offset points",
            xytext=(5, -9),
            fontsize=8,
            color=colour,
        )
