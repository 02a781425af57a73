"""The page of a frontier: a curve to drag along, and what each budget keeps, costs and changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pruning.planning.bootstrap import INTERVAL
from pruning.planning.budget import LABELS
from pruning.planning.judge import Judgement
from pruning.stages.frontier_result import Frontier, FrontierPoint
from pruning.utils.files import replace_file
from pruning.utils.html import render

#: Most classes that are listed for a budget.
MOST_CLASSES = 12

#: What each metric is, in a sentence.
_METRICS = {
    "accuracy": "accuracy",
    "agreement": "share of predictions that are those of the dense network",
    "score": "score",
    "error": "squared error of the outputs, relative to those of the dense network",
}


def frontier_page(
    found: Frontier,
    path: str | Path,
    name: str,
    *,
    classes: Sequence[str] = (),
    chosen: FrontierPoint | None = None,
) -> Path:
    """Write a frontier as one HTML file, which opens without a network connection.

    Args:
        found: the frontier. path: the file to write.
        name: name of the model.
        classes: names of the classes, in their order; by default their numbers.
        chosen: the point that is shown first, such as `found.smallest(0.05)`; by default the widest.

    Returns:
        The path of the page. Its button saves the plan of a point as JSON, for `prune --plan`.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from pruning.report import frontier_page
        >>> from pruning.stages import frontier
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = frontier(net, torch.zeros(1, 3), [(torch.randn(64, 3), None)], points=3, score="l2")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frontier_page(found, f"{folder}/net.html", "net").name
        'net.html'
    """
    path = Path(path)
    points = _distinct(found)
    plans = [point.plan for point in points]
    start = len(points) - 1 if chosen is None else plans.index(chosen.plan)
    values = {
        "title": f"{name}: how much can be pruned",
        "name": name,
        "metric": found.metric,
        "answer": _answer(found, chosen),
        "caption": f"Vertical: {_METRICS[found.metric]}, with {INTERVAL:.0%} bootstrap intervals, on "
        f"{found.examples:,} validation examples, before any training.",
        "stops": len(points) + 1,
        "start": start,
        "heads": ("dense", "pruned") if found.metric == "accuracy" else ("predicted", "agrees"),
        "columns": ["budget", "MACs", "parameters", *(["ms"] if _is_timed(found) else []), found.metric],
        "rows": [_row(found, point) for point in reversed(points)],
        "notes": _notes(found),
        "data": _data(found, points, classes),
    }
    replace_file(path, render(Path(__file__).with_name("frontier.html"), values).encode())
    return path


def _data(found: Frontier, points: Sequence[FrontierPoint], classes: Sequence[str]) -> dict[str, object]:
    """Return what the script of the page reads."""
    return {
        "metric": found.metric,
        "what": LABELS.get(found.limit, found.limit),
        "made": {
            "limit": found.limit,
            "score": found.score,
            "refit": found.refit,
            "examples": found.examples,
        },
        "reference": found.dense.metrics[found.metric].value if found.dense.change is not None else None,
        "widths": found.widths,
        "stops": [*(_stop(found, point, classes) for point in points), _dense_stop(found)],
    }


def _distinct(found: Frontier) -> list[FrontierPoint]:
    """Return the points from the narrowest to the widest; of several with one plan, the least budget."""
    narrowest = {point.plan: point for point in found.points}
    return sorted(narrowest.values(), key=found.share)


def _is_timed(found: Frontier) -> bool:
    return any(point.latency is not None for point in found.points)


def _answer(found: Frontier, chosen: FrontierPoint | None) -> str:
    """Return the sentence at the top of the page."""
    what = LABELS.get(found.limit, found.limit)
    if chosen is None:
        return "No network on the curve loses as little as was asked for; refit, or train after pruning."
    lost = found.drop(chosen)
    assert lost is not None
    if found.metric == "error":
        loses = f"its outputs have a relative squared error of {lost.value:.3g}"
    else:
        loses = f"it loses {_difference(found, max(0.0, lost.value))} of {found.metric}"
    return (
        f"Pruned to {found.share(chosen):.1%} of its {what} without training, {loses}. This network was "
        "chosen on the validation examples; report what it reaches on others."
    )


def _row(found: Frontier, point: FrontierPoint) -> list[str]:
    """Return the cells of a point in the table of all points."""
    estimate = point.judgement.metrics.get(found.metric)
    cells = [point.budget, f"{point.cost.macs:,}", f"{point.cost.params:,}"]
    if _is_timed(found):
        cells.append("" if point.latency is None else f"{point.latency.pruned:.4g}")
    shown = "not finite"
    if estimate is not None:
        value, low, high = (_number(found, end) for end in estimate)
        shown = f"{value} ({low} to {high})"
    return [*cells, shown]


def _number(found: Frontier, value: float) -> str:
    """Format a value of the metric."""
    return f"{value:.1%}" if found.metric in ("accuracy", "agreement") else f"{value:.3g}"


def _difference(found: Frontier, value: float) -> str:
    """Format a difference of the metric, in percentage points where it is a share."""
    text = f"{100 * value:.1f} points" if found.metric in ("accuracy", "agreement") else f"{value:.3g}"
    return text.replace("-", "−")


def _notes(found: Frontier) -> list[str]:
    notes = [
        f"{budget} cannot be reached: the least is {found.least:.1%} of the dense network."
        for budget in found.unreachable
    ]
    left_out = {name: why for point in found.points for name, why in point.left_out.items()}
    return notes + [f"{name} keeps all channels: {why}" for name, why in left_out.items()]


def _stop(found: Frontier, point: FrontierPoint, classes: Sequence[str]) -> dict[str, object]:
    """Return a point as the page shows it."""
    return {
        "budget": point.budget,
        "share": found.share(point),
        "cost": asdict(point.cost),
        "latency": None if point.latency is None else asdict(point.latency),
        **_measured(found, point.judgement),
        "keep": {name: list(kept) for name, kept in point.plan.keep.items()},
        "removed": list(point.plan.removed),
        "changes": _changes(found, point),
        "lost": _lost(found, point, classes),
    }


def _dense_stop(found: Frontier) -> dict[str, object]:
    return {
        "budget": "",
        "share": 1.0,
        "cost": asdict(found.dense_cost),
        "latency": None,
        **_measured(found, found.dense),
        "keep": None,
        "removed": [],
        "changes": "Nothing: this is the dense network.",
        "lost": [],
    }


def _measured(found: Frontier, judgement: Judgement) -> dict[str, object]:
    estimate, divergence = (judgement.metrics.get(name) for name in (found.metric, "divergence"))
    return {
        "estimate": None if estimate is None else list(estimate),
        "divergence": None if divergence is None else divergence.value,
    }


def _by_loss(found: Frontier, point: FrontierPoint) -> list[tuple[int, int, int, int]]:
    """Return (class, right before, right now, all) of the classes that lose, the largest loss first."""
    before, now = found.dense.classes, point.judgement.classes
    lost = [(c, n, now.get(c, 0), found.totals[c]) for c, n in before.items() if now.get(c, 0) < n]
    return sorted(lost, key=lambda each: each[2] - each[1])


def _lost(found: Frontier, point: FrontierPoint, classes: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Return the classes that lose most, by name."""
    named = _by_loss(found, point)[:MOST_CLASSES]
    return [(classes[c] if c < len(classes) else str(c), *counts) for c, *counts in named]  # type: ignore[misc]


def _changes(found: Frontier, point: FrontierPoint) -> str:
    """Return what changes against the dense network, in words."""
    parts, drop = [], found.drop(point)
    if drop is None:
        return "The outputs are not finite."
    if found.metric == "error":
        parts.append(
            f"The outputs differ by a squared error of {drop.value:.3g}, relative to the dense ones."
        )
    else:
        value, high, low = (_difference(found, -end) for end in drop)
        interval = f"({low.removesuffix(' points')} to {high.removesuffix(' points')})"
        parts.append(f"{found.metric.capitalize()} changes by {value} {interval}.")
    agreement = point.judgement.metrics.get("agreement")
    if found.metric == "accuracy" and agreement is not None:
        parts.append(f"{agreement.value:.1%} of the predictions stay as they were.")
    if lost := _by_loss(found, point):
        gone, of = sum(now == 0 for _, _, now, _ in lost), f"{len(lost)} of {len(found.totals)} classes"
        if found.metric == "accuracy":
            parts.append(f"{of} are recognized less often" + (f", {gone} of them never." if gone else "."))
        else:
            parts.append(f"Predictions change in {of}" + (f", in {gone} of them always." if gone else "."))
    return " ".join(parts)
