"""Plot accuracy against cost, with the Pareto front of pruned networks and published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from pruning.report.figures import COLORS, MARKERS, new_figure

if TYPE_CHECKING:
    from pruning.report.figures import Axes, Figure, Line2D

#: Candidate offsets of a label from its data point, in typographic points.
Offsets: TypeAlias = tuple[tuple[int, int], ...]

#: Candidate offsets to the left and to the right of the data point.
_LEFT: Offsets = ((-5, 4), (-7, 0), (-5, -9))
_RIGHT: Offsets = ((5, -9), (7, 0), (5, 4))


class Point(NamedTuple):
    """A data point, a network in a plot of accuracy against cost.

    Attributes:
        cost: params, MACs or milliseconds.
        accuracy: from 0 to 1.
        label: text next to the data point; may be empty.
        spread: standard deviation of the accuracy over seeds.
    """

    cost: float
    accuracy: float
    label: str = ""
    spread: float = 0.0


def pareto(
    series: Mapping[str, Sequence[Point]], anchors: Sequence[Point] = (), *, cost: str = "params"
) -> Figure:
    """Plot accuracy against cost, with a line along the Pareto front of each series.

    Args:
        series: lists of networks, by name. All are plotted; a line connects those returned by `front`.
        anchors: published results to compare with.
        cost: label of the x axis.

    Returns:
        A matplotlib figure.

    Raises:
        PruningError: If matplotlib is not installed.

    Example:
        >>> from pruning.report.pareto import Point, pareto
        >>> figure = pareto({"ours": [Point(1000, 0.97), Point(2000, 0.98)]}, cost="MACs")
        >>> figure.axes[0].get_xlabel()
        'MACs (log scale)'
    """
    figure, (axes,) = new_figure(6.4, 4.4)
    labeled: list[tuple[Point, str, Offsets]] = []
    lines: list[Line2D] = []
    for number, (name, points) in enumerate(series.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        ordered = front(points)
        lines += axes.plot(
            [p.cost for p in ordered], [100 * p.accuracy for p in ordered], color=color, lw=1.2
        )
        axes.errorbar(
            [p.cost for p in points],
            [100 * p.accuracy for p in points],
            yerr=[100 * p.spread for p in points],
            fmt=marker,
            color=color,
            ms=5,
            capsize=3,
            lw=1,
            label=name,
        )
        labeled += [(point, color, _LEFT + _RIGHT) for point in points]
    if anchors:
        axes.scatter([p.cost for p in anchors], [100 * p.accuracy for p in anchors], marker="x",
                     color="#555555", label="published", zorder=3)  # fmt: skip
        labeled += [(point, "#555555", _RIGHT + _LEFT) for point in anchors]
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel(f"{cost} (log scale)")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    _label(figure, axes, labeled, lines)
    return figure


def front(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto front by cost: each point is more accurate than all others of at most its cost.

    Example:
        >>> from pruning.report.pareto import Point, front
        >>> [point.cost for point in front([Point(30, 0.9), Point(10, 0.8), Point(20, 0.7)])]
        [10, 30]
    """
    best, chosen = float("-inf"), []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            chosen.append(point)
    return chosen


def _label(
    figure: Figure, axes: Axes, points: Sequence[tuple[Point, str, Offsets]], lines: Sequence[Line2D]
) -> None:
    """Label points in their colors, each at the first of the offsets where the label covers the least."""
    figure.draw_without_rendering()  # positions in pixels are known only after this
    spreads = [
        (point.cost, 100 * (point.accuracy + share * point.spread))
        for point, _, _ in points
        for share in np.linspace(-1, 1, 41)
    ]
    marks = np.concatenate([axes.transData.transform(spreads), *(_pixels(axes, line) for line in lines)])
    legend = axes.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    for point, color, offsets in points:
        if not point.label:
            continue
        places = []
        for x, y in offsets:
            text = axes.annotate(
                point.label,
                (point.cost, 100 * point.accuracy),
                textcoords="offset points",
                xytext=(x, y),
                ha="right" if x < 0 else "left",
                va="center_baseline" if y == 0 else "baseline",
                fontsize=8,
                color=color,
            )
            box = text.get_window_extent()
            outside = not axes.bbox.contains(box.x0, box.y0) or not axes.bbox.contains(box.x1, box.y1)
            # Another label weighs more than the edge of the figure, which weighs more than a line.
            covered = 10 * box.count_overlaps(taken) + box.count_contains(marks) + 3 * outside
            places.append((covered, text, box))
        _, chosen, box = min(places, key=lambda place: place[0])
        taken.append(box)
        for _, text, _ in places:
            if text is not chosen:
                text.remove()


def _pixels(axes: Axes, line: Line2D) -> np.ndarray:
    """Return points along a line, in pixels of the figure: (points, 2)."""
    ends = axes.transData.transform(line.get_xydata())
    steps = np.linspace(0, len(ends) - 1, 100 * len(ends))
    return np.stack([np.interp(steps, np.arange(len(ends)), ends[:, i]) for i in range(2)], axis=1)
