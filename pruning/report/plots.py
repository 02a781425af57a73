"""The one place that draws. Every function returns a figure; `save` writes it as PNG and SVG.

Colours are those of Okabe and Ito, told apart with any colour vision; markers and line
styles differ besides, so that a print in black and white can be read.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pruning.errors import PruningError
from pruning.utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pruning.planning.curves import Sensitivity


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


#: Where the label of a point may be, in points of type: on its left, or on its right.
_LEFT, _RIGHT = ((-5, 4), (-7, 0), (-5, -9)), ((5, -9), (7, 0), (5, 4))

#: What a `Cost` counts, as it is printed.
_COSTS = {"params": "params", "macs": "MACs"}


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
    labelled: list[tuple[Point, str, tuple[tuple[int, int], ...]]] = []
    lines: list[Any] = []
    for number, (name, points) in enumerate(series.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        ordered = front(points)
        lines += axes.plot(
            [p.cost for p in ordered], [100 * p.accuracy for p in ordered], color=colour, lw=1.2
        )
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
        labelled += [(point, colour, _LEFT + _RIGHT) for point in points]
    if anchors:
        axes.scatter(
            [p.cost for p in anchors],
            [100 * p.accuracy for p in anchors],
            marker="x",
            color="#555555",
            label="published",
            zorder=3,
        )
        labelled += [(point, "#555555", _RIGHT + _LEFT) for point in anchors]
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel(f"{cost} (log scale)")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    _label(axes, labelled, lines)
    return figure


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both cost and accuracy, by cost."""
    best, chosen = float("-inf"), []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            chosen.append(point)
    return chosen


def sensitivity_curves(found: Sensitivity, stage: str = "recalibrated") -> Figure:
    """Accuracy against width, a small plot for each group, all on one scale.

    The band is the bootstrap interval; the dashed line is the whole model.
    """
    names = list(found.channels)
    columns = min(5, max(1, round(len(names) ** 0.5 * 1.3)))
    rows = -(-len(names) // columns)
    figure, grid = _new(2.3 * columns + 0.6, 1.8 * rows + 0.6, rows, columns, sharey=True)
    cells = np.atleast_1d(grid).ravel()
    for axes, name in zip(cells, names, strict=False):
        curve = found.curve(name, stage)
        widths = [width for width, _ in curve]
        axes.axhline(100 * found.dense.accuracy, color="#888888", ls="--", lw=0.8)
        axes.fill_between(
            widths,
            [100 * reading.accuracy_low for _, reading in curve],
            [100 * reading.accuracy_high for _, reading in curve],
            color=COLOURS[5],
            alpha=0.35,
            lw=0,
        )
        axes.plot(widths, [100 * reading.accuracy for _, reading in curve], color=COLOURS[0], lw=1.4)
        axes.set_title(_short(name), fontsize=9)
        axes.margins(x=0.02)
    for axes in cells[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("channels kept")
    figure.supylabel("accuracy, %")
    return figure


def sensitivity_map(found: Sensitivity, stage: str = "recalibrated") -> Figure:
    """Accuracy lost, in points, of every group (rows) at every share of its channels (columns)."""
    names, shares = list(found.channels), np.linspace(0.05, 1.0, 20)
    lost = np.zeros((len(names), len(shares)))
    for row, name in enumerate(names):
        curve = found.curve(name, stage)
        widths = [width for width, _ in curve]
        accuracies = [reading.accuracy for _, reading in curve]
        at = np.maximum(1, shares * found.channels[name])
        lost[row] = 100 * (found.dense.accuracy - np.interp(at, widths, accuracies))
    figure, axes = _new(6.4, 0.9 + 0.22 * max(6, len(names)))
    image = axes.imshow(np.maximum(lost, 0), aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8 if len(names) < 40 else 5)
    ticks = range(1, len(shares), 3)
    axes.set_xticks(list(ticks), [f"{shares[i]:.0%}" for i in ticks])
    axes.set_xlabel("share of the channels kept")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="accuracy lost, points")
    return figure


def lost_per_cost(found: Sensitivity, cost: str = "macs", stage: str = "recalibrated") -> Figure:
    """Accuracy lost against the share of all MACs (or params) freed, one line a group."""
    figure, axes = _new(6.4, 4.2)
    whole = getattr(found.dense_cost, cost)
    for number, name in enumerate(found.channels):
        points = [p for p in found.points if p.group == name and stage in p.readings]
        points.sort(key=lambda p: -getattr(p, cost))
        freed = [0.0, *(100 * (1 - getattr(p, cost) / whole) for p in points)]
        lost = [0.0, *(100 * (found.dense.accuracy - p.readings[stage].accuracy) for p in points)]
        colour = COLOURS[number % len(COLOURS)]
        style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        axes.plot(freed, lost, style, color=colour, marker=MARKERS[number % len(MARKERS)], ms=3, lw=1.2,
                  markevery=max(1, len(freed) // 8), label=_short(name))  # fmt: skip
    axes.set_xlabel(f"{_COSTS[cost]} freed, % of the whole network")
    axes.set_ylabel("accuracy lost, points")
    axes.set_yscale("symlog", linthresh=1)
    columns = -(-len(found.channels) // 25)
    figure.legend(frameon=False, fontsize=7, ncols=columns, loc="outside right upper")
    return figure


def scale_histograms(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Figure:
    """|γ| of each norm before and after stage 1, with the zeros counted."""
    names = list(after)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, grid = _new(2.5 * columns + 0.4, 1.9 * rows + 0.6, rows, columns)
    for axes, name in zip(np.atleast_1d(grid).ravel(), names, strict=False):
        values = {"before": np.abs(before[name]), "after": np.abs(after[name])}
        top = max(float(v.max(initial=0)) for v in values.values()) or 1.0
        for (label, sizes), colour, filled in zip(
            values.items(), (COLOURS[1], COLOURS[0]), (False, True), strict=True
        ):
            axes.hist(
                sizes,
                bins=np.linspace(0, top, 21),
                histtype="stepfilled" if filled else "step",
                color=colour,
                alpha=0.7 if filled else 1.0,
                label=label,
            )
        zeros = int((values["after"] == 0).sum())
        axes.set_title(f"{_short(name)}: {zeros} of {len(values['after'])} are 0", fontsize=8)
    for axes in np.atleast_1d(grid).ravel()[len(names) :]:
        axes.set_visible(False)
    np.atleast_1d(grid).ravel()[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("|γ|")
    figure.supylabel("channels")
    return figure


def widths(before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    """Channels of each group before and after; a group that went with its layer has none."""
    names = list(before)
    figure, axes = _new(6.4, 0.9 + 0.26 * max(4, len(names)))
    places = np.arange(len(names))
    axes.barh(places, [before[n] for n in names], color="#dddddd", edgecolor="#888888", label="before")
    axes.barh(places, [after.get(n, 0) for n in names], height=0.5, color=COLOURS[0], label="after")
    for place, name in zip(places, names, strict=True):
        left = after.get(name, 0)
        axes.annotate(
            f"{left} of {before[name]}", (before[name], place), xytext=(4, 0), va="center",
            textcoords="offset points", fontsize=8 if len(names) < 40 else 5,
        )  # fmt: skip
    axes.set_yticks(places, [_short(n) for n in names], fontsize=8 if len(names) < 40 else 5)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("channels")
    axes.grid(axis="y", visible=False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return figure


def history(events: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy on the validation split and costs over a run, from the lines of its history.

    A run without pruning steps has one panel.
    """
    epochs = [e for e in events if "epoch" in e and e.get("validation") is not None]
    costs = [e for e in events if "params" in e and "macs" in e]
    figure, panels = _new(6.8, 5.0, 2, 1) if costs else _new(6.8, 2.6)
    upper = np.atleast_1d(panels)[0]
    upper.plot(range(1, len(epochs) + 1), [100 * e["validation"] for e in epochs], color=COLOURS[0], lw=1.2)
    upper.set_ylabel("validation, %")
    if epochs:  # what falls far below right after a cut would flatten all the rest
        seen = np.array([100 * e["validation"] for e in epochs])
        low, high = np.quantile(seen, 0.15), seen.max()
        room = 0.25 * (high - low) + 0.1
        upper.set_ylim(max(0.0, low - 2 * room), high + room)
    stages = list(dict.fromkeys(e["stage"] for e in epochs))
    for stage in stages[1:]:
        start = next(i for i, e in enumerate(epochs) if e["stage"] == stage) + 0.5
        upper.axvline(start, color="#bbbbbb", lw=0.8, ls=":")
    upper.set_xlabel("epoch (dotted: a stage or a pruning step begins)")
    if not costs:
        return figure
    lower = panels[1]
    for (key, label), colour, marker in zip(_COSTS.items(), COLOURS, MARKERS, strict=False):
        values = [e[key] for e in costs]
        if values and values[0]:
            lower.plot([100 * v / values[0] for v in values], color=colour, marker=marker, ms=4, label=label)
    lower.set_yscale("log")
    lower.set_ylabel("% of the first")
    lower.set_xlabel("dense, after stage 1 and after every pruning step")
    lower.legend(frameon=False)
    return figure


def latency(samples: Mapping[str, tuple[float, float, float, float]]) -> Figure:
    """Time per image of each network: the median, the quartiles and the 90th percentile, in ms."""
    figure, axes = _new(6.4, 0.9 + 0.4 * len(samples))
    for place, (name, (low, median, high, p90)) in enumerate(samples.items()):
        axes.barh(place, median, color=COLOURS[place % len(COLOURS)], alpha=0.75)
        axes.errorbar(median, place, xerr=[[median - low], [high - median]], color="black", capsize=4, lw=1)
        axes.plot(p90, place, "|", color="black", ms=12)
        axes.annotate(f"{name}: {median:.4f} ms", (0, place), xytext=(4, 0), va="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("ms per image (bar: median, whiskers: quartiles, tick: 90th percentile)")
    return figure


def confusion(counts: Any, classes: Sequence[str]) -> Figure:
    """A confusion matrix, (classes, classes) counts with the truth in rows; right answers left pale."""
    counts = np.asarray(counts)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    size = 1.4 + 0.34 * len(classes)
    figure, axes = _new(size + 0.6, size)
    axes.imshow(wrong, cmap="Blues", interpolation="nearest")
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                dark = wrong[row, column] > 0.5 * max(1, wrong.max())
                axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.grid(False)
    return figure


def examples(images: Any, captions: Sequence[str], columns: int = 10) -> Figure:
    """Images (N, H, W) or (N, C, H, W) in a grid, each with a caption."""
    images = np.asarray(images, dtype=float)
    if images.ndim == 4:
        images = images.transpose(0, 2, 3, 1)
        images = images[..., 0] if images.shape[-1] == 1 else images
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure, grid = _new(0.85 * columns + 0.2, 1.05 * rows + 0.2, rows, columns)
    cells = np.atleast_1d(grid).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, image, caption in zip(cells, images, captions, strict=False):
        axes.imshow((image - image.min()) / max(1e-9, image.max() - image.min()), cmap="gray_r")
        axes.set_title(caption, fontsize=8)
    return figure


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as PATH.png and PATH.svg, the same bytes for the same figure."""
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".svg") else stem
    written = []
    for kind in ("png", "svg"):
        target = stem.with_name(f"{stem.name}.{kind}")
        replace_file(target, _rendered(figure, kind))
        written.append(target)
    return written


def svg(figure: Figure) -> bytes:
    """A figure as SVG."""
    return _rendered(figure, "svg")


def _rendered(figure: Figure, kind: str) -> bytes:
    import matplotlib

    metadata = {"svg": {"Date": None}, "png": {"Software": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
    return buffer.getvalue()


def _new(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharey: bool = False
) -> tuple[Figure, Any]:
    """A figure with its axes, in the style of all, without touching matplotlib's global state."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as New
    except ImportError as error:
        raise PruningError(f"plots need the package matplotlib: pip install matplotlib ({error})") from error
    with matplotlib.rc_context(_STYLE):
        figure = New(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, sharey=sharey)


def _short(name: str) -> str:
    """A layer's name, its end where it is long."""
    return name if len(name) <= 28 else f"…{name[-27:]}"


def _label(axes: Any, points: Sequence[tuple[Point, str, Any]], lines: Sequence[Any]) -> None:
    """The labels of points in their colours, each at the first place where it covers the least."""
    axes.figure.draw_without_rendering()  # what is measured below has its place only now
    spreads = [
        (point.cost, 100 * (point.accuracy + share * point.spread))
        for point, _, _ in points
        for share in np.linspace(-1, 1, 41)
    ]
    marks = np.concatenate([axes.transData.transform(spreads), *(_pixels(axes, line) for line in lines)])
    taken = [axes.get_legend().get_window_extent()]
    for point, colour, offsets in points:
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
                color=colour,
            )
            box = text.get_window_extent()
            outside = not axes.bbox.contains(box.x0, box.y0) or not axes.bbox.contains(box.x1, box.y1)
            # Another label weighs more than the edge of the figure, and that more than a stretch of line.
            covered = 10 * box.count_overlaps(taken) + box.count_contains(marks) + 3 * outside
            places.append((covered, text, box))
        _, chosen, box = min(places, key=lambda place: place[0])
        taken.append(box)
        for _, text, _ in places:
            if text is not chosen:
                text.remove()


def _pixels(axes: Any, line: Any) -> np.ndarray:
    """Points along a line, in pixels of the figure."""
    ends = axes.transData.transform(line.get_xydata())
    steps = np.linspace(0, len(ends) - 1, 100 * len(ends))
    return np.stack([np.interp(steps, np.arange(len(ends)), ends[:, i]) for i in range(2)], axis=1)
