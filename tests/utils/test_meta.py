"""Shapes on the meta device: those of torch, and its errors."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from pruning.utils import meta
from pruning.utils.entries import default_dtype
from pruning.utils.tree import tensors

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


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.softmax(-1),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.transpose(1, 2).contiguous() * x.mean(-1)[:, None],
        lambda x: torch.nn.functional.group_norm(x, 2),
        lambda x: torch.full_like(x, 1),
        lambda x: torch.full_like(x, 1, dtype=torch.long),
        lambda x: torch.var_mean(x, -1),
        lambda x: x.to(torch.long) / 2,
        lambda x: x.to(torch.long) + 1,
        lambda x: x.to(torch.long) + 1.0,
        lambda x: x.to(torch.long) + True,
        lambda x: x.to(memory_format=torch.contiguous_format).topk(2),
    ],
)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_remembered_operations_make_what_torch_makes(compute, default):
    x = torch.empty(2, 4, 4, device="meta")

    def made(mode):
        with mode, default_dtype(default):
            return [(t.shape, t.stride(), t.dtype) for t in tensors([compute(x)])]

    expected = made(contextlib.nullcontext())
    assert [made(meta.Shapes()) for _ in range(3)] == [expected] * 3
