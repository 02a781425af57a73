"""The page of a frontier, in a browser: dragging along the curve, what is shown, the plan that is saved."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from browser import needs_browser
from mine import Net, digits
from torch import nn

from pruning import Plan, prune
from pruning.planning.judge import Judgement
from pruning.report import frontier_page
from pruning.stages import frontier

EXAMPLE = digits()[0][0][0][:2]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net(width=8).eval()


@pytest.fixture(scope="module")
def found(net):
    return frontier(net, EXAMPLE, digits()[1], points=5, score="l2")


@pytest.fixture
def opened(chromium, found, tmp_path):
    """Open the page of the frontier, which shows its third point; require that the page reports nothing."""
    path = frontier_page(found, tmp_path / "page.html", "a <net>", classes="abc", chosen=found.points[2])
    chromium.look(400, 900)
    chromium.complaints.clear()
    chromium.open(path)
    yield chromium
    assert chromium.complaints == []


def widths_shown(browser):
    cells = (
        "[...find('widths').tBodies[0].rows].map(row => [row.cells[0], row.cells[2]].map(c => c.textContent))"
    )
    return {name: int(width) for name, width in browser(cells)}


def places(browser):
    """Return the position of each stop in the window, from the narrowest network to the dense one."""
    return browser(
        "(box => places.map(([x, y]) => [x + box.left, y + box.top]))(curve.getBoundingClientRect())"
    )


@needs_browser
def test_mouse_touch_and_keyboard_move_along_the_curve(opened, found):
    shown = [point.plan.widths for point in reversed(found.points)] + [found.widths]
    assert opened("+slider.value") == 2 and widths_shown(opened) == shown[2]
    stops = places(opened)
    xs = [x for x, _ in stops]
    assert xs == sorted(xs) and len(stops) == 6
    opened.mouse("mousePressed", *stops[0])
    for number, place in enumerate(stops):
        opened.mouse("mouseMoved", place[0] + 2, place[1] + 60)
        assert opened.until(f"+slider.value === {number}") and widths_shown(opened) == shown[number]
    opened.mouse("mouseReleased", *stops[-1])
    opened.mouse("mouseMoved", *stops[1])  # without the button
    assert opened("+slider.value") == 5
    assert opened("find('budget').textContent") == "The dense network" and not opened("find('plan').href")
    opened("slider.focus()")
    opened.key("ArrowLeft")
    assert opened.until("+slider.value === 4") and widths_shown(opened) == shown[4]
    assert found.points[0].budget in opened("slider.getAttribute('aria-valuetext')")
    opened.touch("touchStart", stops[4])
    for place in (stops[3], stops[1]):
        opened.touch("touchMove", place)
    opened.touch("touchEnd")
    assert opened.until("+slider.value === 1") and widths_shown(opened) == shown[1]


@needs_browser
def test_the_saved_plan_makes_the_network_that_is_shown(opened, found, net):
    point = found.points[-3]
    saved = json.loads(opened("fetch(find('plan').href).then(answer => answer.text())"))
    assert opened("find('plan').download") == f"plan-{point.budget[:-1]}-percent.json"
    assert saved["frontier"]["refit"] is False and saved["frontier"]["cost"]["macs"] == point.cost.macs
    step = prune(net, EXAMPLE, Plan.from_json(saved))
    assert step.plan == point.plan and step.after == point.cost
    cards = opened("find('cards').textContent")
    assert f"{point.cost.macs:,}" in cards and f"{point.cost.params:,}" in cards
    assert f"{100 * point.judgement.metrics['accuracy'].value:.1f} %" in cards


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_the_window_and_its_text_is_legible(opened, width):
    opened.look(width, 900)
    opened.until(f"curve.viewBox.baseVal.width === curve.clientWidth && innerWidth === {width}")
    for number in range(6):
        opened(f"(slider.value = {number}, show())")
        assert opened("document.documentElement.scrollWidth") <= width
        texts = opened("[...curve.querySelectorAll('text')].map(t => t.getBBox()).map(b => "
                       "[b.x, b.x + b.width, b.height])")  # fmt: skip
        assert all(start >= 0 and end <= width - 32 for start, end, _ in texts), "no label is cut off"
        assert min(height for _, _, height in texts) >= 12
    beside = opened(
        "find('classes').closest('div.columns').children[1].offsetTop < find('widths').offsetTop + 5"
    )
    assert beside == (width == 1200)


@needs_browser
def test_networks_whose_outputs_are_not_finite_are_shown_as_such(chromium, found, tmp_path):
    broken = replace(found.points[-1], judgement=Judgement({}))
    page = frontier_page(replace(found, points=(*found.points[:-1], broken)), tmp_path / "page.html", "net")
    chromium.complaints.clear()
    chromium.open(page)
    chromium("(slider.value = 0, show())")
    assert "not finite" in chromium("find('cards').textContent") and chromium.complaints == []


def test_the_page_is_self_contained_and_says_what_changes(found, tmp_path):
    page = frontier_page(found, tmp_path / "page.html", "a <net>", classes="abc").read_text()
    assert not re.search(r"""(src|action)=["']|href=["'](?!#)""", page) and "url(" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "{{" not in page
    assert "How much can a &lt;net&gt; be pruned?" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    for stop, point in zip(data["stops"], reversed(found.points), strict=False):
        lost = {name: before - now for name, before, now, _ in stop["lost"]}
        right = point.judgement.classes
        expected = {
            "abc"[c]: n - right.get(c, 0) for c, n in found.dense.classes.items() if right.get(c, 0) < n
        }
        assert lost == expected
    values = frontier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 4),
                      [(torch.randn(9, 4), torch.randn(9, 2))], points=2, score="l2")  # fmt: skip
    shown = frontier_page(values, tmp_path / "values.html", "values").read_text()
    assert "squared error of the outputs" in shown and "relative to those of the dense network" in shown
