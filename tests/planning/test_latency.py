"""Latency budgets: the closed-form parts, and that results meet the limit."""

from __future__ import annotations

import json
import re

import nets
import numpy as np
import pytest
import torch
from torch import nn

from pruning import Budget, LatencyBudget, PruningError, prune, slim, trace
from pruning.deploy.timing import time_forward
from pruning.graph.recurrent import is_recurrent
from pruning.planning.cost import CostModel
from pruning.planning.latency import _between, even_scores
from pruning.planning.layer_times import LatencyTable, _interpolated
from pruning.planning.options import PlanOptions
from pruning.planning.scores import l2
from pruning.planning.search import ascending
from pruning.planning.width_limits import lowest_widths
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.training import cross_entropy
from pruning.training.config import TrainConfig


def wide():
    """A network whose time depends mainly on the widths of its convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    ).eval()  # fmt: skip


IMAGES = torch.randn(8, 3, 20, 20)


def table(net, images, multiple=1, runtime="eager"):
    traced = trace(net, images)
    order = ascending(traced, l2(net, traced, [], cross_entropy))
    lowest = lowest_widths(traced, order, PlanOptions())
    cost_model = CostModel(net, traced)
    measured = LatencyTable(net, images, cost_model, LatencyBudget("0.5x", runtime), lowest, multiple)
    return measured, order, traced


@pytest.mark.parametrize("name", nets.NETS)
def test_a_latency_table_covers_every_layer_that_runs_and_its_path_never_widens(name, monkeypatch):
    monkeypatch.setattr("pruning.planning.layer_times.MAX_WIDTHS", 3)  # fewer layers to time
    net, images = nets.make(name), nets.images()
    measured, order, traced = table(net, images)
    reads_in_steps = {name for name in traced.uses if is_recurrent(net.get_submodule(name))}
    not_run = {
        name for name in traced.uses if name.endswith("attention.out_proj")
    }  # its owner reads its weight
    assert measured.times.keys() == traced.uses.keys() - reads_in_steps - not_run
    path = measured.path(order)
    assert np.array_equal(path[0], CostModel(net, traced).full)
    times = [measured.milliseconds(widths) for widths in path]
    for before, after, wider, slimmer in zip(times[:-1], times[1:], path[:-1], path[1:], strict=True):
        assert after < before and (slimmer <= wider).all() and (slimmer < wider).sum() == 1


def test_candidate_widths_are_multiples_the_floor_or_the_full_width():
    net = wide()
    measured, order, _ = table(net, IMAGES, multiple=16)
    for widths in measured.path(order):
        assert all(w % 16 == 0 or w in (1, full) for w, full in zip(widths, measured.full, strict=True))


def test_times_between_measured_widths_are_interpolated_bilinearly():
    outs, ins = np.array([1.0, 4.0]), np.array([2.0, 6.0, 8.0])
    plane = np.array([[3 * o + 5 * i for i in ins] for o in outs])
    at = np.array([1.0, 2.5, 4.0]), np.array([2.0, 7.0, 8.0])
    np.testing.assert_allclose(_interpolated(outs, ins, plane, *at), 3 * at[0] + 5 * at[1])
    assert _interpolated(np.array([5.0]), np.array([2.0]), np.array([[7.0]]), 5.0, 2.0) == 7


def test_even_scores_narrow_every_group_by_the_same_share():
    half = {n: int((s <= 0.5).sum()) for n, s in even_scores(trace(wide(), IMAGES)).items()}
    assert half == {"0": 32, "3": 32, "6": 24}


def test_refined_widths_lie_between_the_two_given_widths():
    wide_ones, slim_ones = np.array([64.0, 30.0]), np.array([64.0, 10.0])
    steps = _between(wide_ones, slim_ones, 4)
    assert np.array_equal(steps[0], wide_ones) and np.array_equal(steps[-1], slim_ones)
    assert all(s[0] == 64 and 10 <= s[1] <= 30 and (s[1] % 4 == 0 or s[1] in (10, 30)) for s in steps)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_the_pruned_network_meets_the_limit(runtime):
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    net = wide()
    budget = LatencyBudget("0.6x", runtime, seconds=0.1)
    step = prune(net, IMAGES, budget, score="l2", floor=4, multiple=16)
    assert step.latency is not None and step.latency.pruned <= 0.6 * step.latency.dense
    assert step.difference < 1e-4 and min(step.plan.widths.values()) >= 4
    if runtime == "eager":  # an independent measurement agrees, apart from noise of the machine
        times = time_forward({"dense": net, "small": step.model}, IMAGES, seconds=0.4)
        assert times["small"].median < 0.8 * times["dense"].median


def test_the_command_prints_the_measured_times(tmp_path, toolkit):
    words = ["prune", "--model", "models:LeNet5", "--input-shape", "1x28x28", "--score", "l2"]
    code, out, err = toolkit(*words, "--max-latency", "0.9x", "--output", tmp_path / "s.pth")
    assert code == 0, err
    ratio = float(re.search(r"time: .* \((\d\.\d+)x\); \d+ networks were timed", out)[1])
    assert 0 < ratio <= 0.9 and (tmp_path / "s.pth").exists()


def test_a_limit_in_milliseconds_applies_at_the_given_batch_size():
    net = wide()
    dense = time_forward({"dense": net}, IMAGES[:1], seconds=0.2)["dense"].median
    budget = LatencyBudget(f"{dense:.4f}ms", batch_size=1, seconds=0.1)
    step = prune(net, IMAGES, budget, score="l2")
    assert step.latency is not None and step.latency.pruned <= dense
    assert [
        len(x) for x in (LatencyBudget("1x", batch_size=5).batch_of(IMAGES[:2]), budget.batch_of(IMAGES))
    ] == [5, 1]


def test_a_limit_that_the_dense_network_meets_removes_nothing():
    step = prune(wide(), IMAGES, LatencyBudget("9x", seconds=0.1), score="l2")
    assert step.after == step.before and step.latency is not None and step.latency.networks == 2


def test_an_unreachable_limit_is_rejected_with_the_time_of_the_narrowest_network():
    with pytest.raises(PruningError, match=r"cannot be reached: .* the network takes \d+\.\d+ ms"):
        prune(wide(), IMAGES, LatencyBudget("0.001x", seconds=0.1), score="l2")


@pytest.mark.parametrize("limit", ["", "0.5", "x", "0x", "-1ms", "infx", "nanms", "fast"])
def test_a_limit_of_another_form_is_rejected(limit):
    with pytest.raises(PruningError, match=r"0\.5x"):
        LatencyBudget(limit)


def test_an_unknown_runtime_is_rejected():
    with pytest.raises(PruningError, match="choose one of: eager, onnxruntime"):
        LatencyBudget("0.5x", "tensorflow")


def test_slimming_meets_a_latency_budget(tmp_path):
    from pruning.stages import Run

    net = wide()
    batches = [(IMAGES, torch.randint(0, 5, (8,))) for _ in range(3)]
    one = TrainConfig(1, lr=0.01)
    budget = LatencyBudget("0.6x", seconds=0.1)
    config = SlimConfig(budget, one, PruneConfig(2, one), one)
    run = Run(tmp_path / "run", {})
    lines: list[str] = []
    slim(net, batches, config=config, validate=batches, run=run, log=lines.append)
    events = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    last = [event for event in events if "widths" in event][-1]
    assert last["latency"]["pruned"] <= 0.6 * last["latency"]["dense"]
    assert any("0.6x" in line for line in lines)
    with pytest.raises(PruningError, match="params, MACs or channels"):
        _ = config.counts
    assert SlimConfig.within(Budget(macs="50%")).counts == Budget(macs="50%")


def test_options_that_a_latency_budget_ignores_are_rejected():
    with pytest.raises(PruningError, match="widths: not supported with a latency budget"):
        prune(
            nets.make("lenet"), nets.images(), LatencyBudget("0.9x"), score="l2", widths={"features.conv1": 3}
        )
    with pytest.raises(PruningError, match="per_cost: not supported with a latency budget"):
        prune(nets.make("lenet"), nets.images(), LatencyBudget("0.9x"), score="l2", per_cost=False)
    with pytest.raises(PruningError, match="dense: only a LatencyBudget"):
        prune(nets.make("lenet"), nets.images(), Budget("90%"), score="l2", dense=nets.make("lenet"))
