"""Plot a run and its result; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pruning.report.figures import COLORS, MARKERS, new_figure, short

if TYPE_CHECKING:
    from pruning.report.figures import Figure

#: One line of a run's `history.jsonl`, as read from JSON.
Event: TypeAlias = Mapping[str, Any]


def scale_histograms(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Figure:
    """Plot histograms of |γ| for each group before and after stage 1, with the number of zeros.

    Args:
        before: one scale γ per channel before stage 1, by group.
        after: one scale γ per channel after stage 1, by group.

    Returns:
        A matplotlib figure.

    Example:
        >>> from pruning.report.plots import scale_histograms
        >>> figure = scale_histograms({"bn1": [1.0, 1.0]}, {"bn1": [0.0, 0.5]})
        >>> figure.axes[0].get_title()
        'bn1: 1 of 2 are 0'
    """
    names = list(after)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, cells = new_figure(2.7 * columns + 0.4, 2.0 * rows + 0.6, rows, columns)
    for axes, name in zip(cells, names, strict=False):
        values = {"before": np.abs(before[name]), "after": np.abs(after[name])}
        top = max(float(v.max(initial=0)) for v in values.values()) or 1.0
        for (label, sizes), color, filled in zip(
            values.items(), (COLORS[1], COLORS[0]), (False, True), strict=True
        ):
            axes.hist(
                sizes,
                bins=np.linspace(0, top, 21).tolist(),
                histtype="stepfilled" if filled else "step",
                color=color,
                alpha=0.7 if filled else 1.0,
                label=label,
            )
        zeros = int((values["after"] == 0).sum())
        axes.set_title(f"{short(name)}: {zeros} of {len(values['after'])} are 0", fontsize=9)
    for axes in cells[len(names) :]:
        axes.set_visible(False)
    cells[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("|γ|")
    figure.supylabel("channels")
    return figure


def widths(before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    """Plot the width of each group before and after pruning.

    Args:
        before: number of channels before pruning, by group.
        after: number of channels after pruning, by group; a missing group was removed with its layer.

    Returns:
        A matplotlib figure.

    Example:
        >>> from pruning.report.plots import widths
        >>> [text.get_text() for text in widths({"conv": 16, "fc": 84}, {"conv": 5}).axes[0].texts]
        ['5 of 16', '0 of 84']
    """
    names = list(before)
    figure, (axes,) = new_figure(4.8, 0.9 + 0.26 * max(4, len(names)))
    places = np.arange(len(names))
    axes.barh(places, [before[n] for n in names], color="#dddddd", edgecolor="#888888", label="before")
    axes.barh(places, [after.get(n, 0) for n in names], height=0.5, color=COLORS[0], label="after")
    for place, name in zip(places, names, strict=True):
        left = after.get(name, 0)
        axes.annotate(
            f"{left} of {before[name]}", (before[name], place), xytext=(4, 0), va="center",
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(places, [short(n) for n in names], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("channels")
    axes.grid(axis="y", visible=False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return figure


def history(events: Sequence[Event]) -> Figure:
    """Plot the validation accuracy and the costs over a run.

    Args:
        events: the lines of the run's history. Without events that hold costs, there is only one panel.

    Returns:
        A matplotlib figure.

    Example:
        >>> from pruning.report.plots import history
        >>> len(history([{"stage": "fine-tune", "epoch": 1, "validation": 0.9}]).axes)
        1
    """
    epochs = [e for e in events if "epoch" in e and e.get("validation") is not None]
    costs = [e for e in events if "params" in e and "macs" in e]
    figure, panels = new_figure(4.8, 5.0, 2, 1) if costs else new_figure(4.8, 2.6)
    upper = panels[0]
    upper.plot(range(1, len(epochs) + 1), [100 * e["validation"] for e in epochs], color=COLORS[0], lw=1.2)
    upper.set_ylabel("validation, %")
    if epochs:  # leave out the low scores right after a pruning step, which would flatten the others
        seen = np.array([100 * e["validation"] for e in epochs])
        low, high = np.quantile(seen, 0.15), seen.max()
        room = 0.25 * (high - low) + 0.1
        upper.set_ylim(max(0.0, low - 2 * room), high + room)
    stages = list(dict.fromkeys(e["stage"] for e in epochs))
    for stage in stages[1:]:
        start = next(i for i, e in enumerate(epochs) if e["stage"] == stage) + 0.5
        upper.axvline(start, color="#bbbbbb", lw=0.8, ls=":")
    upper.set_xlabel("epoch (dotted: a stage or pruning step starts)")
    if not costs:
        return figure
    lower = panels[1]
    for (key, label), color, marker in zip(
        (("params", "params"), ("macs", "MACs")), COLORS, MARKERS, strict=False
    ):
        values = [e[key] for e in costs]
        if values and values[0]:
            lower.plot([100 * v / values[0] for v in values], color=color, marker=marker, ms=4, label=label)
    lower.set_yscale("log")
    lower.set_ylabel("% of the dense cost")
    lower.set_xlabel("dense, after stage 1, after each pruning step")
    lower.legend(frameon=False)
    return figure


def latency(samples: Mapping[str, tuple[float, float, float, float]]) -> Figure:
    """Plot the time per image of each network.

    Args:
        samples: first quartile, median, third quartile and 90th percentile in ms, by network.

    Returns:
        A matplotlib figure.

    Example:
        >>> from pruning.report.plots import latency
        >>> latency({"dense": (0.9, 1.0, 1.2, 1.5)}).axes[0].texts[0].get_text()
        'dense: 1.0000 ms'
    """
    figure, (axes,) = new_figure(4.8, 0.9 + 0.4 * len(samples))
    for place, (name, (low, median, high, p90)) in enumerate(samples.items()):
        axes.barh(place, median, color=COLORS[place % len(COLORS)], alpha=0.75)
        axes.errorbar(median, place, xerr=[[median - low], [high - median]], color="black", capsize=4, lw=1)
        axes.plot(p90, place, "|", color="black", ms=12)
        axes.annotate(f"{name}: {median:.4f} ms", (0, place), xytext=(4, 0), va="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("ms per image: median, quartiles, 90th percentile (tick)")
    return figure
