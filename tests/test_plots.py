"""Figures: what they show, and that the same figure gives the same bytes."""

from __future__ import annotations

from pruning.plots import Point, front, pareto, save


def test_the_front_leaves_out_what_another_beats():
    points = [Point(10, 0.9), Point(20, 0.95), Point(30, 0.93), Point(10, 0.8), Point(40, 0.96)]
    assert front(points) == [Point(10, 0.9), Point(20, 0.95), Point(40, 0.96)]
    assert front([]) == []


def test_a_pareto_figure_shows_every_point_and_its_spread(tmp_path):
    series = {"ours": [Point(1000, 0.97, "a", 0.01), Point(2000, 0.98, "b", 0.01), Point(3000, 0.96, "c")]}
    figure = pareto(series, [Point(1500, 0.975, "theirs")], cost="MACs")
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c", "theirs"}
    assert "MACs" in axes.get_xlabel() and "%" in axes.get_ylabel()
    assert list(axes.lines[0].get_xdata()) == [1000, 2000], "the line follows the front"
    first = [path.read_bytes() for path in save(figure, tmp_path / "one")]
    again = [path.read_bytes() for path in save(pareto(series, [Point(1500, 0.975, "theirs")], cost="MACs"),
                                                tmp_path / "two.png")]  # fmt: skip
    assert first == again and {path.name for path in tmp_path.iterdir()} == {
        "one.png", "one.svg", "two.png", "two.svg",
    }  # fmt: skip
