"""Plot the sensitivity of groups: the accuracy lost when one group alone is narrowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pruning.planning.budget import LABELS
from pruning.report.figures import COLORS, MARKERS, new_figure, short

if TYPE_CHECKING:
    from pruning.planning.curves import Sensitivity
    from pruning.report.figures import Figure


def sensitivity_curves(found: Sensitivity, stage: str = "recalibrated", columns: int | None = None) -> Figure:
    """Plot accuracy against width in one panel per group, all with the same y scale.

    The band is the bootstrap interval; the dashed line is the accuracy of the dense model.

    Args:
        found: the analysis.
        stage: which readings to plot, one of `pruning.planning.curves.STAGES`.
        columns: largest number of panels side by side; by default it grows with the number of groups.

    Returns:
        A matplotlib figure.

    Example:
        >>> from pruning.planning.cost import Cost
        >>> from pruning.planning.curves import Reading, Sensitivity, SensitivityPoint
        >>> from pruning.report.sensitivity_plots import sensitivity_curves
        >>> dense, half = Reading(0.1, 0, 0.2, 0.9, 0.8, 1), Reading(0.3, 0.2, 0.4, 0.7, 0.6, 0.8)
        >>> point = SensitivityPoint("conv", 2, 100, 1000, {"recalibrated": half})
        >>> found = Sensitivity({"conv": 4}, dense, Cost(200, 2000, 0), {"conv": [0, 1, 2, 3]}, {}, [point])
        >>> [axes.get_title() for axes in sensitivity_curves(found).axes]
        ['conv']
    """
    names = list(found.channels)
    columns = min(columns or 5, max(1, round(len(names) ** 0.5 * 1.3)))
    rows = -(-len(names) // columns)
    figure, cells = new_figure(2.3 * columns + 0.6, 1.8 * rows + 0.6, rows, columns, sharey=True)
    for axes, name in zip(cells, names, strict=False):
        curve = found.curve(name, stage)
        widths = [width for width, _ in curve]
        axes.axhline(100 * found.dense.accuracy, color="#888888", ls="--", lw=0.8)
        axes.fill_between(
            widths,
            [100 * reading.accuracy_low for _, reading in curve],
            [100 * reading.accuracy_high for _, reading in curve],
            color=COLORS[5],
            alpha=0.35,
            lw=0,
        )
        axes.plot(widths, [100 * reading.accuracy for _, reading in curve], color=COLORS[0], lw=1.4)
        axes.set_title(short(name), fontsize=9)
        axes.margins(x=0.02)
    for axes in cells[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("channels kept")
    figure.supylabel("accuracy, %")
    return figure


def sensitivity_map(found: Sensitivity, stage: str = "recalibrated") -> Figure:
    """Plot the accuracy lost, in percentage points, by group (rows) and share of channels kept (columns).

    Args:
        found: the analysis.
        stage: which readings to plot, one of `pruning.planning.curves.STAGES`.

    Returns:
        A matplotlib figure.
    """
    names, shares = list(found.channels), np.linspace(0.05, 1.0, 20)
    lost = np.zeros((len(names), len(shares)))
    for row, name in enumerate(names):
        curve = found.curve(name, stage)
        widths = [width for width, _ in curve]
        accuracies = [reading.accuracy for _, reading in curve]
        at = np.maximum(1, shares * found.channels[name])
        lost[row] = 100 * (found.dense.accuracy - np.interp(at, widths, accuracies))
    figure, (axes,) = new_figure(4.8, 0.9 + 0.24 * max(6, len(names)))
    image = axes.imshow(np.maximum(lost, 0), aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=9)
    ticks = range(1, len(shares), 3)
    axes.set_xticks(list(ticks), [f"{shares[i]:.0%}" for i in ticks])
    axes.set_xlabel("share of the channels kept")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="accuracy lost, points")
    return figure


def lost_per_cost(found: Sensitivity, cost: str = "macs", stage: str = "recalibrated") -> Figure:
    """Plot the accuracy lost against the share of the network's cost freed, with one line per group.

    Args:
        found: the analysis.
        cost: `"macs"` or `"params"`.
        stage: which readings to plot, one of `pruning.planning.curves.STAGES`.

    Returns:
        A matplotlib figure.
    """
    figure, (axes,) = new_figure(4.8, 3.6)
    whole = getattr(found.dense_cost, cost)
    for number, name in enumerate(found.channels):
        points = [p for p in found.points if p.group == name and stage in p.readings]
        points.sort(key=lambda p: -getattr(p, cost))
        freed = [0.0, *(100 * (1 - getattr(p, cost) / whole) for p in points)]
        lost = [0.0, *(100 * (found.dense.accuracy - p.readings[stage].accuracy) for p in points)]
        color = COLORS[number % len(COLORS)]
        style = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        axes.plot(freed, lost, style, color=color, marker=MARKERS[number % len(MARKERS)], ms=3, lw=1.2,
                  markevery=max(1, len(freed) // 8), label=short(name))  # fmt: skip
    axes.set_xlabel(f"{LABELS[cost]} freed, % of the whole network")
    axes.set_ylabel("accuracy lost, points")
    axes.set_yscale("symlog", linthresh=1)
    figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside lower center")
    return figure
