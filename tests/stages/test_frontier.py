"""The frontier: each point is the network of `prune`, nothing is computed twice, what is refused."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from mine import Divides, Net, digits
from torch import nn

from pruning import Budget, LatencyBudget, PruningError, prune
from pruning.planning import PlanOptions, side_by_side
from pruning.planning.options import MOST
from pruning.stages import Frontier, frontier, frontier_networks
from pruning.training import accuracy

pytestmark = pytest.mark.numerics


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(width=8).eval()


@pytest.mark.parametrize("refit", [False, True])
def test_each_point_is_the_network_that_prune_makes_within_its_budget(net, refit):
    train, validation, _ = digits()
    example = train[0][0][:2]
    found = frontier(net, example, validation, points=4, calibration=train, refit=refit)
    assert len(found.points) == 4 and found.metric == "accuracy"
    assert found.dense.metrics["accuracy"].value == pytest.approx(accuracy(net, validation))
    for point in found.points:
        step = prune(net, example, Budget(macs=point.budget), calibration=train, refit=refit)
        again = prune(net, example, point.plan, calibration=train, refit=refit)
        assert step.plan == again.plan == point.plan and again.asked == point.plan
        assert step.after == again.after == point.cost
        for name, value in step.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name])
        assert point.judgement.metrics["accuracy"].value == pytest.approx(accuracy(again.model, validation))
    shares = [found.share(point) for point in found.points]
    assert shares == sorted(shares, reverse=True)
    assert Frontier.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_least_budget_is_found_and_points_beyond_it_are_not_invented(net):
    example = digits()[0][0][0][:2]
    options = PlanOptions(most=MOST, floor={"features.0": 3}, multiple=1)
    found = frontier(net, example, digits()[1], points=3, score="l2", options=options)
    lowest = {"features.0": 3, "features.4": 1}
    step = prune(net, example, Budget(macs="100%"), score="l2", widths=lowest, most=1.0)
    assert found.least == pytest.approx(step.after.macs / step.before.macs)
    assert found.points[-1].plan.widths == lowest
    asked = frontier(
        net, example, digits()[1], score="l2", options=options, budgets=["90%", "50%", "50.0%", "2%"]
    )
    assert [point.budget for point in asked.points] == ["90%", "50.0%"] and asked.unreachable == ("2%",)
    assert all(asked.share(point) <= float(point.budget[:-1]) / 100 for point in asked.points)


def test_an_interrupted_frontier_goes_on_and_computes_no_point_twice(net, tmp_path, monkeypatch):
    train, validation, _ = digits()
    scored, cuts = [], []
    given = {"score": "taylor", "calibration": train, "points": 4}
    whole = frontier(net, train[0][0][:2], validation, folder=tmp_path / "whole", **given)

    original, score_channels = frontier_networks.cut, frontier_networks.score_channels

    def cut(*args, **options):
        if len(cuts) == 2:
            raise KeyboardInterrupt
        cuts.append(args)
        return original(*args, **options)

    monkeypatch.setattr(frontier_networks, "cut", cut)
    monkeypatch.setattr(
        frontier_networks, "score_channels", lambda *args: scored.append(1) or score_channels(*args)
    )
    with pytest.raises(KeyboardInterrupt):
        frontier(net, train[0][0][:2], validation, folder=tmp_path / "cut", **given)
    stored = json.loads((tmp_path / "cut" / "frontier.json").read_text())["frontier"]["points"]
    assert len(stored) == 2
    cuts.clear()
    again = frontier(net, train[0][0][:2], validation, folder=tmp_path / "cut", **given)
    assert len(cuts) == 2 and len(scored) == 1, "two more points, from the stored scores"
    assert again.points == whole.points
    before = (tmp_path / "cut" / "frontier.json").read_bytes()
    cuts[:] = [1, 1]  # any cut would raise
    assert frontier(net, train[0][0][:2], validation, folder=tmp_path / "cut", **given) == again
    assert (tmp_path / "cut" / "frontier.json").read_bytes() == before

    with pytest.raises(PruningError, match=r'score "taylor", now "l2"'):
        frontier(net, train[0][0][:2], validation, folder=tmp_path / "cut", **{**given, "score": "l2"})
    with pytest.raises(PruningError, match="other settings: another model"):
        frontier(Net(width=8), train[0][0][:2], validation, folder=tmp_path / "cut", **given)
    with pytest.raises(PruningError, match="another validation inputs; give the same, or choose another"):
        frontier(net, train[0][0][:2], train[1:2], folder=tmp_path / "cut", **given)
    (tmp_path / "cut" / "frontier.json").write_text("{}")
    with pytest.raises(PruningError, match="holds no frontier"):
        frontier(net, train[0][0][:2], validation, folder=tmp_path / "cut", **given)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(PruningError, match="holds another run: choose another folder"):
        frontier(net, train[0][0][:2], validation, folder=tmp_path / "run", **given)


def test_groups_that_fail_the_check_are_left_out_of_all_points(tmp_path):
    net, (train, validation, _) = Divides().eval(), digits()
    options = PlanOptions(most=MOST, widths={"features.0": 6})  # which is not asked of what is left out
    given = {"score": "l2", "calibration": train, "folder": tmp_path, "options": options}
    found = frontier(net, train[0][0][:2], validation, budgets=["90%", "80%"], **given)
    assert all(point.left_out.keys() == {"features.0"} for point in found.points)
    assert all("features.0" not in point.plan.keep for point in found.points)
    more = frontier(net, train[0][0][:2], validation, budgets=["80%", "85%", "90%"], **given)
    assert len(more.points) == 3 and all(point in more.points for point in found.points)
    assert more.least > 0.5, "the least is that of the other groups"


def test_latency_budgets_are_met_by_measured_times(net, monkeypatch):
    def time_forward(networks, inputs, **_):
        size = lambda model: sum(p.numel() for p in model.parameters()) / 1000  # noqa: E731
        return {name: type("Time", (), {"median": size(model)}) for name, model in networks.items()}

    monkeypatch.setattr(side_by_side, "time_forward", time_forward)
    example = digits()[0][0][0][:2]
    timing = LatencyBudget("1x", batch_size=2, seconds=0.01)
    found = frontier(net, example, digits()[1], limit="latency", points=3, score="l2", timing=timing)
    assert len(found.points) >= 2
    for point in found.points:
        assert found.share(point) <= float(point.budget[:-1]) + 1e-9
        assert point.latency.pruned == pytest.approx(point.cost.params / 1000)
    timed = frontier(net, example, digits()[1], budgets=["80%", "40%"], score="l2", timing=timing)
    assert [p.latency.pruned for p in timed.points] == [p.cost.params / 1000 for p in timed.points]
    with pytest.raises(PruningError, match="give at most 1x, the time of the dense"):
        frontier(net, example, digits()[1], limit="latency", budgets=["1.5x", "0.5x"], score="l2")


def test_the_smallest_network_is_chosen_by_the_whole_interval(net):
    train, validation, _ = digits()
    found = frontier(net, train[0][0][:2], validation, points=6, score="l2")
    for drop in (0.0, 0.1, 0.3, 1.0):
        enough = [p for p in found.points if found.drop(p).high <= drop]
        chosen = found.smallest(drop)
        assert chosen == min(enough, key=lambda p: p.cost.macs, default=None)
    assert chosen == found.points[-1]
    unlabeled = frontier(net, train[0][0][:2], [(x, None) for x, _ in validation], points=2, score="l2")
    point = unlabeled.points[0]
    assert unlabeled.drop(point).value == pytest.approx(1 - point.judgement.metrics["agreement"].value)


def test_forecasts_lie_between_the_nearest_networks_and_none_is_given_beyond_them(net):
    train, validation, _ = digits()
    found = frontier(net, train[0][0][:2], validation, points=4, score="l2")
    known = [(1.0, found.dense), *((found.share(point), point.judgement) for point in found.points)]
    for metric in ("accuracy", "loss", "divergence"):
        for (high, wide), (low, narrow) in itertools.pairwise(known):
            ends = wide.metrics[metric], narrow.metrics[metric]
            assert found.forecast(low, metric) == pytest.approx(ends[1])
            forecast = found.forecast(low + (high - low) / 4, metric)
            assert forecast.value == pytest.approx(0.25 * ends[0].value + 0.75 * ends[1].value)
            assert (forecast.low, forecast.high) == (min(e.low for e in ends), max(e.high for e in ends))
    assert found.forecast(found.share(found.points[-1]) - 0.001) is None and found.forecast(1.01) is None


def test_what_cannot_be_a_frontier_is_refused(net):
    train, validation, _ = digits()
    x = train[0][0][:2]

    def refused(match, model=net, validation=validation, **options):
        with pytest.raises(PruningError, match=match):
            frontier(model, x, validation, **{"score": "l2", **options})

    refused("expected one of params, macs", limit="flops")
    refused("at least two budgets", points=1)
    refused("at least two budgets", budgets=["50%"])
    refused("at least two budgets", budgets=["50%", "50%"])
    refused("no validation inputs", validation=[])
    refused("score 'l3' is unknown", score="l3")
    refused("the dense network has 6,936 MACs", budgets=["50%", "1M"])
    refused("expected a percentage above 0 and at most 100", budgets=["50%", "120%"])
    refused("fewer than two of the budgets can be reached: the least is 8", budgets=["1%", "2%", "50%"])
    refused("refit=True needs calibration", refit=True)
    refused("no network of these options has fewer MACs", options=PlanOptions(most=0.0))
    broken = Net()
    nn.init.constant_(broken.head.weight, math.nan)
    refused("outputs on validation batch 0 are not finite", model=broken, check=False)
    refused("has no prunable group", model=nn.Sequential(nn.Flatten(), nn.Linear(100, 3)))
    with pytest.raises(PruningError, match="towards: a plan already names"):
        prune(
            net, x, frontier(net, x, validation, points=2, score="l2").points[0].plan, towards=Budget(macs=5)
        )
