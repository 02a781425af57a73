"""Shapes on the meta device: those of torch, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruning.utils import meta

pytestmark = pytest.mark.quick


def empty(*shape):
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    ("run", "x"),
    [
        (lambda x: F.layer_norm(x, (5, 6), empty(5, 6)), empty(4, 5, 6)),
        (lambda x: F.layer_norm(x, (5,)), empty(4, 5, 6).transpose(1, 2)),
        (lambda x: F.linear(x, empty(7, 6), empty(7)), empty(4, 6)),
        (lambda x: F.batch_norm(x, *empty(2, 4)), empty(3, 4, 6)),
        (lambda x: F.hardswish(x + x), empty(4, 6)),
    ],
)
def test_output_shapes_equal_those_of_torch(run, x):
    wanted = run(x)
    with meta.Shapes():
        got = run(x)
    assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", [["x", "weight", "bias"], ["x"], ["weight", "bias"]])
def test_gradient_shapes_equal_those_of_torch(training, needed):
    given = {"x": empty(3, 4, 6), "weight": empty(4), "bias": empty(4)}
    wanted_for = [given[name].requires_grad_() for name in needed]

    def gradients():
        x, weight, bias = given.values()
        y = F.relu(F.batch_norm(x, empty(4), empty(4), weight, bias, training))
        return [(g.shape, g.dtype, g.stride()) for g in torch.autograd.grad(y.sum(), wanted_for)]

    wanted = gradients()
    with meta.Shapes():
        assert gradients() == wanted


@pytest.mark.parametrize(
    "run",
    [
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.linear(x, empty(7, 5), empty(7)),
        lambda x: F.linear(x, empty(7, 6), empty(5)),
        lambda x: F.batch_norm(x, *empty(2, 5)),
    ],
)
def test_invalid_shapes_raise_as_in_torch(run):
    with meta.Shapes(), pytest.raises(RuntimeError):
        run(empty(4, 6))
