"""Judging pruned networks: metrics against their definitions, bootstrap intervals, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pruning import PruningError
from pruning.planning.bootstrap import Bootstrap
from pruning.planning.judge import Estimate, Judge
from pruning.utils.batch import Batch

pytestmark = [pytest.mark.quick, pytest.mark.numerics]

ROWS = Batch(8, {(): 0})


class Maps(nn.Module):
    """Mixes the channels of its inputs (N, C, ...) by a matrix; the first of them returns its inputs."""

    def __init__(self, *matrices, wrap=lambda outputs: outputs[0]):
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(matrix) for matrix in matrices])
        self.wrap = wrap

    def forward(self, x):
        return self.wrap([torch.einsum("oc,nc...->no...", matrix, x) for matrix in self.matrices])


@pytest.mark.parametrize("shape", [(), (5,)], ids=["classes", "maps of classes"])
def test_metrics_of_classes_follow_their_definitions(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, *shape, generator=generator)
    labels = torch.randint(4, (40, *shape), generator=generator)
    labels.view(-1)[::7] = -100
    mix = torch.randn(4, 4, generator=generator)
    batches = [(x[:16], labels[:16]), (x[16:], labels[16:])]
    judge = Judge(Maps(torch.eye(4)), batches, ROWS)
    found = judge(Maps(mix))
    assert judge.metric == "accuracy" and judge.examples == 40

    old, new = x.numpy(), torch.einsum("oc,nc...->no...", mix, x).numpy()
    counts = labels.numpy() != -100
    log = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))  # noqa: E731
    divergence = (np.exp(log(old)) * (log(old) - log(new))).sum(1)
    right = new.argmax(1) == labels.numpy()
    assert found.metrics["accuracy"].value == pytest.approx(right[counts].mean())
    assert found.metrics["agreement"].value == pytest.approx((new.argmax(1) == old.argmax(1))[counts].mean())
    assert found.metrics["divergence"].value == pytest.approx(divergence[counts].mean(), rel=1e-4)
    loss = nn.functional.cross_entropy(torch.from_numpy(new), labels)
    assert found.metrics["loss"].value == pytest.approx(float(loss), rel=1e-4)
    before = (old.argmax(1) == labels.numpy())[counts].mean()
    assert found.change.value == pytest.approx(right[counts].mean() - before)
    for label in range(4):
        here = labels.numpy() == label
        assert judge.totals[label] == here.sum() and found.classes.get(label, 0) == right[here].sum()

    unlabeled = Judge(Maps(torch.eye(4)), [(x, None)], ROWS)
    assert unlabeled.metric == "agreement" and unlabeled.dense.metrics["agreement"].value == 1
    again = unlabeled(Maps(mix))
    assert again.change is None
    assert again.metrics["agreement"].value == pytest.approx((new.argmax(1) == old.argmax(1)).mean())
    assert sum(again.classes.values()) == (new.argmax(1) == old.argmax(1)).sum()


def test_values_are_judged_by_their_relative_error():
    x, targets = torch.randn(30, 3), torch.randn(30, 2)
    both = lambda outputs: {"near": outputs[0], "far": outputs[1]}  # noqa: E731
    first, second = torch.randn(2, 3), torch.randn(4, 3)
    judge = Judge(Maps(first, second, wrap=both), [(x[:8], targets[:8]), (x[8:], targets[8:])], ROWS)
    found = judge(Maps(1.5 * first, 0.5 * second, wrap=both))
    assert judge.metric == "error" and judge.dense.metrics["error"] == Estimate(0, 0, 0)
    assert found.metrics["error"] == pytest.approx((0.25, 0.25, 0.25), rel=1e-4)
    chosen = Judge(Maps(first, second, wrap=both), [(x, None)], ROWS, outputs=["far"])
    assert chosen.metric == "agreement"  # a single tensor (N, classes) without targets
    values = Judge(Maps(first, second, wrap=both), [(x, None)], ROWS, outputs=["far"], compare="values")
    assert values(Maps(first, 2 * second, wrap=both)).metrics["error"].value == pytest.approx(1, rel=1e-4)


def test_intervals_hold_as_often_as_they_say_and_differences_are_paired():
    generator, held = torch.Generator().manual_seed(0), 0
    bootstrap = Bootstrap(200)
    for _ in range(200):
        values = (torch.rand(200, 1, generator=generator) < 0.8).float()
        low, high = bootstrap.interval(bootstrap.means(values))
        held += bool(low <= 0.8 <= high)
    assert 0.9 <= held / 200 <= 0.99
    low, high = bootstrap.interval(bootstrap.means(values))
    assert float(high - low) == pytest.approx(2 * 1.96 * math.sqrt(0.16 / 200), rel=0.2)
    x, labels = torch.randn(100, 3), torch.randint(3, (100,))
    judge = Judge(Maps(torch.eye(3)), [(x, labels)], ROWS)
    assert judge(Maps(2 * torch.eye(3))).change == Estimate(0, 0, 0), "the same predictions: no uncertainty"


def test_outputs_that_are_not_finite_count_as_wrong_or_are_refused():
    x, labels = torch.randn(20, 3), torch.arange(20) % 3
    judge = Judge(Maps(torch.eye(3)), [(x, labels)], ROWS)
    found = judge(Maps(torch.full((3, 3), math.nan)))
    assert found.metrics["accuracy"] == Estimate(0, 0, 0) and "divergence" not in found.metrics
    with pytest.raises(PruningError, match="dense network's outputs on validation batch 1 are not finite"):
        Judge(Maps(torch.eye(3)), [(x, labels), (x * math.nan, labels)], ROWS)


def test_a_metric_of_the_user_takes_the_place_of_all_others():
    x, targets = torch.randn(30, 3), torch.randn(30)
    found = lambda outputs: {"boxes": [outputs[0][outputs[0][:, 0] > 0]], "x": outputs[0]}  # noqa: E731
    near = lambda outputs, wanted: -(outputs["x"][:, 0] - wanted).abs()  # noqa: E731
    batches = [(x[:20], targets[:20]), (x[20:], targets[20:])]
    judge = Judge(Maps(torch.eye(3), wrap=found), batches, ROWS, metric=near)
    again = judge(Maps(2 * torch.eye(3), wrap=found))
    assert judge.metric == "score" and set(again.metrics) == {"score"}
    dense, new = (-(k * x[:, 0] - targets).abs() for k in (1, 2))
    assert again.metrics["score"].value == pytest.approx(float(new.mean()), rel=1e-4)
    assert again.change.value == pytest.approx(float((new - dense).mean()), rel=1e-3)
    assert judge.dense.change == Estimate(0, 0, 0)
    with pytest.raises(PruningError, match=r"the metric returned \(\) for 20 examples: return a tensor"):
        Judge(Maps(torch.eye(3)), batches, ROWS, metric=lambda outputs, wanted: outputs.mean())
    with pytest.raises(PruningError, match="metric of the dense network is not finite"):
        Judge(Maps(torch.eye(3)), batches, ROWS, metric=lambda outputs, wanted: wanted * math.nan)


def test_validation_inputs_that_cannot_be_judged_on_are_refused():
    x = torch.randn(20, 3)
    with pytest.raises(PruningError, match="no validation inputs"):
        Judge(Maps(torch.eye(3)), [], ROWS)
    with pytest.raises(PruningError, match="no validation example has a label"):
        Judge(Maps(torch.eye(3)), [(x, torch.full((20,), -100))], ROWS)
    with pytest.raises(PruningError, match="the targets go from 5 to 5, but the network has 3 classes"):
        Judge(Maps(torch.eye(3)), [(x, torch.full((20,), 5))], ROWS)
    judge = Judge(Maps(torch.eye(3)), [(x, None)], ROWS)
    with pytest.raises(PruningError, match=r"shapes \{'logits': \(20, 2\)\}, the dense one"):
        judge(Maps(torch.ones(2, 3)))
