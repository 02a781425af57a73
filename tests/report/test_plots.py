"""Figures show the right numbers, and the same figure gives the same bytes."""

from __future__ import annotations

import warnings

import pytest

from pruning.planning.cost import Cost
from pruning.planning.curves import Reading, Sensitivity, SensitivityPoint
from pruning.report import plots
from pruning.report.figures import save
from pruning.report.pareto import Point, front, pareto
from pruning.report.sensitivity_plots import lost_per_cost, sensitivity_curves, sensitivity_map


def test_the_pareto_front_excludes_dominated_points():
    points = [Point(10, 0.9), Point(20, 0.95), Point(30, 0.93), Point(10, 0.8), Point(40, 0.96)]
    assert front(points) == [Point(10, 0.9), Point(20, 0.95), Point(40, 0.96)]
    assert front([]) == []


def test_pareto_figure_shows_every_point_and_is_reproducible(tmp_path):
    series = {"ours": [Point(1000, 0.97, "a", 0.01), Point(2000, 0.98, "b", 0.01), Point(3000, 0.96, "c")]}
    figure = pareto(series, [Point(1500, 0.975, "theirs")], cost="MACs")
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c", "theirs"}
    assert "MACs" in axes.get_xlabel() and "%" in axes.get_ylabel()
    assert list(axes.lines[0].get_xdata()) == [1000, 2000], "the line connects the points of the front"
    first = [path.read_bytes() for path in save(figure, tmp_path / "one")]
    again = [path.read_bytes() for path in save(pareto(series, [Point(1500, 0.975, "theirs")], cost="MACs"),
                                                tmp_path / "two.png")]  # fmt: skip
    assert first == again and {path.name for path in tmp_path.iterdir()} == {
        "one.png", "one.svg", "two.png", "two.svg",
    }  # fmt: skip


def test_labels_of_close_points_do_not_overlap():
    ours = [Point(1000 + i, 0.97 + i / 2000, f"network {i}") for i in range(4)]
    axes = pareto({"ours": ours}, [Point(1010, 0.9706, "of others")]).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def curves(groups=4, width=6):
    """A sensitivity analysis whose accuracy falls once fewer than half of a group's channels are kept."""
    names = {f"block{i}.conv": width for i in range(groups)}

    def reading(kept):
        accuracy = min(1.0, 2 * kept / width) * 0.9
        return Reading(1 - accuracy, 0, 1, accuracy, accuracy - 0.05, accuracy + 0.05)

    points = [
        SensitivityPoint(name, kept, 100 * kept, 1000 * kept, {"recalibrated": reading(kept)})
        for name in names
        for kept in range(1, width)
    ]
    cost = Cost(100 * width, 1000 * width, 0)
    return Sensitivity(names, reading(width), cost, {n: list(range(width)) for n in names}, {}, points)


@pytest.mark.parametrize("groups", [1, 4, 20])
def test_every_group_has_its_sensitivity_curve(groups, tmp_path):
    found = curves(groups)
    figure = sensitivity_curves(found)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(found.channels)
    line = shown[0].lines[-1]
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(line.get_ydata()) == pytest.approx([30, 60, 90, 90, 90, 90])
    assert all(path.stat().st_size > 1000 for path in save(figure, tmp_path / "curves"))
    heat = sensitivity_map(found)
    assert len(heat.axes[0].get_yticklabels()) == groups
    values = heat.axes[0].images[0].get_array()
    assert values[0, -1] == 0 and values[0, 0] == pytest.approx(60, abs=0.1)
    lost = lost_per_cost(found, "params")
    assert len(lost.axes[0].lines) == groups and "params freed" in lost.axes[0].get_xlabel()


def test_scale_histograms_count_zeros():
    figure = plots.scale_histograms({"bn1": [1.0, 1.0, 1.0]}, {"bn1": [0.0, 0.0, -0.5]})
    assert "2 of 3 are 0" in figure.axes[0].get_title()


def test_widths_show_kept_and_removed_groups():
    figure = plots.widths({"conv": 16, "fc": 84}, {"conv": 5})
    assert {text.get_text() for text in figure.axes[0].texts} == {"5 of 16", "0 of 84"}


def test_history_shows_every_epoch_and_every_pruning_step():
    events = [
        {"stage": "a", "epoch": 1, "validation": 0.9},
        {"stage": "a", "params": 100, "macs": 1000, "validation": 0.9},
        {"stage": "b", "params": 50, "macs": 250, "validation": 0.8},
        {"stage": "b", "epoch": 1, "validation": 0.95},
    ]
    upper, lower = plots.history(events).axes
    assert list(upper.lines[0].get_ydata()) == pytest.approx([90, 95])
    assert [list(line.get_ydata()) for line in lower.lines] == [[100, 50], [100, 25]]


def test_history_without_pruning_steps_has_one_panel():
    events = [{"stage": "fine-tune", "epoch": n, "validation": 0.9} for n in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(plots.history(events).axes) == 1


def test_latency_shows_the_median_of_every_network():
    figure = plots.latency({"dense": (0.9, 1.0, 1.2, 1.5), "pruned": (0.4, 0.5, 0.6, 0.7)})
    assert [text.get_text() for text in figure.axes[0].texts] == ["dense: 1.0000 ms", "pruned: 0.5000 ms"]
