"""Sensitivity: real surgery at every point, and plans that follow from the curves."""

from __future__ import annotations

import csv
import json
import sys

import nets
import numpy as np
import pytest
import torch
from torch import nn

from pruning import Budget, Plan, PruningError, prune, sensitivity, trace
from pruning.planning import CostModel, joint
from pruning.planning.cost import Cost
from pruning.planning.curves import Reading, Sensitivity, SensitivityPoint
from pruning.planning.prefix_cache import PrefixCache
from pruning.surgery import channel_constants, recalibrate
from pruning.surgery.apply import apply
from pruning.training import TrainConfig


def data(count=3, size=16, classes=4, seed=5):
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 14, 14, generator=draw), torch.randint(0, classes, (size,), generator=draw))
        for _ in range(count)
    ]


def plain_reading(model, batches):
    """Return loss and accuracy, computed without the prefix cache."""
    with torch.no_grad():
        logits = torch.cat([model.eval()(x) for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    return nn.functional.cross_entropy(logits, targets).item(), (
        logits.argmax(1) == targets
    ).float().mean().item()


@pytest.mark.parametrize("name", nets.NETS)
def test_every_point_equals_a_measurement_of_the_pruned_model(name):
    """The prefix cache does not change the results of surgery and evaluation."""
    net, calibration = nets.make(name), data(2, seed=6)
    with torch.no_grad():
        shapes = [net(x).shape for x, _ in data()]  # one network gives logits per pixel
    validation = [
        (x, torch.randint(0, s[1], (s[0], *s[2:]))) for (x, _), s in zip(data(), shapes, strict=True)
    ]
    before = nets.snapshot(net)
    found = sensitivity(net, nets.images(), validation, calibration=calibration, widths=3)
    traced = trace(net, nets.images())
    cost_model = CostModel(net, traced)
    constants = channel_constants(net, traced, [x for x, _ in calibration])
    assert {p.group for p in found.points} == set(traced.groups)
    for point in found.points:
        plan = Plan({point.group: tuple(found.order[point.group][-point.width :])})
        small = apply(net, traced, plan, constants)
        cost = cost_model(plan.widths)
        assert (point.params, point.macs) == (cost.params, cost.macs)
        for stage in ("pruned", "recalibrated"):
            if stage == "recalibrated":
                layers = {member.layer for member in traced.groups[point.group].members}
                unchanged = PrefixCache(net, layers, [validation[0][0]]).unchanged
                recalibrate(small, [x for x, _ in calibration], keep=unchanged)
            reading = point.readings[stage]
            assert (reading.loss, reading.accuracy) == pytest.approx(
                plain_reading(small, validation), rel=1e-3, abs=1e-5
            )
            assert reading.loss_low <= reading.loss <= reading.loss_high
            assert reading.accuracy_low <= reading.accuracy <= reading.accuracy_high
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks for m in net.modules())


def test_a_bootstrap_interval_has_the_width_of_two_standard_errors():
    """95 % of the bootstrap means of hits lie within two standard errors."""
    net, validation = nets.make("lenet"), data(8, 100)
    dense = sensitivity(net, nets.images(), validation, widths=1).dense
    error = (dense.accuracy * (1 - dense.accuracy) / 800) ** 0.5
    assert dense.accuracy_high - dense.accuracy_low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_fine_tuning_adds_a_third_reading():
    net, batches = nets.make("lenet"), data()
    found = sensitivity(
        net, nets.images(), batches, calibration=batches, widths=2, finetune=TrainConfig(3, lr=0.05)
    )
    losses = [(p.readings["recalibrated"].loss, p.readings["finetuned"].loss) for p in found.points]
    assert np.mean([after for _, after in losses]) < np.mean([before for before, _ in losses])


def test_an_interrupted_analysis_can_be_resumed(tmp_path, monkeypatch):
    net, validation = nets.make("lenet"), data()
    whole = sensitivity(net, nets.images(), validation, path=tmp_path / "whole.json")

    file = sys.modules["pruning.planning.sensitivity"]._ResultFile
    original, calls = file.write, []

    def write(self, result):
        original(self, result)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(file, "write", write)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(net, nets.images(), validation, path=tmp_path / "cut.json")
    assert len(json.loads((tmp_path / "cut.json").read_text())["sensitivity"]["points"]) == 5
    monkeypatch.setattr(file, "write", original)
    again = sensitivity(net, nets.images(), validation, path=tmp_path / "cut.json")
    assert again == whole
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    with pytest.raises(PruningError, match="analysis of another model"):
        sensitivity(nets.make("lenet", 1), nets.images(), validation, path=tmp_path / "cut.json")
    (tmp_path / "cut.json").write_text("{}")
    with pytest.raises(PruningError, match="holds no sensitivity analysis"):
        sensitivity(net, nets.images(), validation, path=tmp_path / "cut.json")


def test_models_and_splits_that_cannot_be_analysed_are_rejected():
    head = nn.Sequential(nn.Flatten(), nn.Linear(588, 4))
    with pytest.raises(PruningError, match=r"no prunable group.*output"):
        sensitivity(head, nets.images(), data())
    with pytest.raises(PruningError, match="validation split is empty"):
        sensitivity(nets.make("lenet"), nets.images(), [])
    with pytest.raises(PruningError, match="none of class 3"):
        sensitivity(nets.make("lenet"), nets.images(), data(4, 20, classes=3))
    with pytest.raises(PruningError, match="none of class 1, 2, 3"):
        sensitivity(nets.make("lenet"), nets.images(), data(1, 20, classes=1))


def reading(loss):
    return Reading(loss, loss, loss, 0.5, 0.4, 0.6)


def curves(*losses, channels=None):
    """Return an analysis of one group whose loss at width w is losses[-w]."""
    points = [SensitivityPoint("g", len(losses) - i, 0, 0, {"recalibrated": reading(loss)})
              for i, loss in enumerate(losses) if i]  # fmt: skip
    return Sensitivity({"g": channels or len(losses)}, reading(losses[0]), Cost(0, 0, 0),
                       {"g": list(range(len(losses)))}, {}, points)  # fmt: skip


def test_increases_of_a_convex_curve_are_the_differences_of_its_losses():
    assert curves(0.1, 0.2, 0.4, 0.8).increases("g").tolist() == pytest.approx([0.1, 0.2, 0.4, float("inf")])


def test_a_curve_that_is_not_monotone_is_replaced_by_its_convex_lower_bound():
    # The dip at the third value and the step at the second represent noise.
    increases = curves(0.0, 0.3, 0.1, 0.3, 1.0).increases("g")
    assert increases.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.7, float("inf")])
    assert (np.diff(increases) >= 0).all()


def test_widths_that_were_not_measured_are_interpolated():
    found = curves(0.0, 0.1, 0.2, 0.4, 0.6)
    sparse = Sensitivity(**{**vars(found), "points": [p for p in found.points if p.width in (3, 1)]})
    assert sparse.increases("g").tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, float("inf")])


def test_sensitivity_curves_work_as_scores():
    """The plan narrows the group whose loss does not rise."""
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    points = [
        SensitivityPoint(
            g, w, 0, 0, {"recalibrated": reading(0.0 if g == "classifier.fc1" else 1.0 - w / full)}
        )
        for g, full in traced.widths.items()
        for w in range(1, full)
    ]
    order = {g: list(range(full)) for g, full in traced.widths.items()}
    found = Sensitivity(traced.widths, reading(0.0), Cost(0, 0, 0), order, {}, points)
    budget = Budget(channels=sum(traced.widths.values()) - 4)
    step = prune(net, nets.images(), budget, score=found.scores)
    assert step.plan.widths == {**traced.widths, "classifier.fc1": traced.widths["classifier.fc1"] - 4}
    assert step.plan.keep["classifier.fc1"][0] == 4, "channels are removed in their order"
    with pytest.raises(PruningError, match="analyze this model"):
        prune(step.model, nets.images(), Budget(params="50%"), score=found.scores)


def test_the_loss_of_a_plan_of_one_group_is_predicted_exactly():
    net, batches = nets.make("lenet"), data()
    found = sensitivity(net, nets.images(), batches, calibration=batches)
    point = next(p for p in found.points if p.group == "classifier.fc2" and p.width == 3)
    assert found.predicted_loss({"classifier.fc2": 3}) == pytest.approx(point.readings["recalibrated"].loss)
    whole = joint(net, nets.images(), Budget(params="40%"), found, batches, calibration=batches)
    assert whole.cost.params <= 0.4 * found.dense_cost.params + 0.5
    small = prune(net, nets.images(), Budget(params="40%"), score=found.scores, calibration=batches).model
    assert whole.measured["recalibrated"].loss == pytest.approx(plain_reading(small, batches)[0], rel=1e-4)


def test_results_are_unchanged_by_json_and_complete_in_csv():
    found = sensitivity(nets.make("lenet"), nets.images(), data(), widths=2)
    assert Sensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found
    lines = found.to_csv().splitlines()
    assert lines[0].startswith("group,channels,width,params_freed,macs_freed,milliseconds_freed,stage,loss")
    assert len(lines) == 1 + sum(len(p.readings) for p in found.points)


def test_points_contain_the_time_of_their_layers():
    net = nn.Sequential(
        nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.Flatten(), nn.Linear(9600, 4)
    )
    plain = sensitivity(net, nets.images(), data(), widths=2)
    assert plain.dense_milliseconds is None and all(p.milliseconds is None for p in plain.points)
    found = sensitivity(net, nets.images(), data(), widths=2, runtime="eager")
    assert Sensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found
    (narrow,) = (p for p in found.points if (p.group, p.width) == ("0", 1))
    assert 0 < narrow.milliseconds < 0.5 * found.dense_milliseconds, "it needs a hundredth of the arithmetic"
    for row in csv.DictReader(found.to_csv().splitlines()):
        (point,) = (p for p in found.points if (p.group, p.width) == (row["group"], int(row["width"])))
        freed = found.dense_milliseconds - point.milliseconds
        assert float(row["milliseconds_freed"]) == pytest.approx(freed, abs=1e-6)
        assert int(row["macs_freed"]) == found.dense_cost.macs - point.macs
    (untimed, *_) = csv.DictReader(plain.to_csv().splitlines())
    assert untimed["milliseconds_freed"] == ""


def test_prune_with_the_score_sensitivity_measures_the_curves():
    net, batches = nets.make("lenet"), data()
    by_name = prune(net, nets.images(), Budget(params="40%"), score="sensitivity", calibration=batches)
    found = sensitivity(net, nets.images(), batches, calibration=batches, score="taylor", widths=12)
    by_curves = prune(net, nets.images(), Budget(params="40%"), score=found.scores, calibration=batches)
    assert by_name.plan == by_curves.plan
    with pytest.raises(PruningError, match="validation split is empty"):
        prune(net, nets.images(), Budget(params="40%"), score="sensitivity")
    with pytest.raises(PruningError, match="choose another score"):
        sensitivity(net, nets.images(), batches, score="sensitivity")
