"""Statistics over channels that a model's code computes: norms written by hand, attention over channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import Plan, PruningError, trace
from pruning.surgery import verify as verification
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick


class Statistic(nn.Module):
    """A layer without the table's rules, between linear layers; its scales are `weight`."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.weight, self.kind, self.shape = nn.Parameter(torch.randn(width)), kind, (width,)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.kind == "layer":
            centered = x - x.mean(-1, keepdim=True)
            return centered / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.weight
        if self.kind == "functional":
            return F.layer_norm(x, self.shape, self.weight)
        if self.kind == "functional_rms":
            return F.rms_norm(x, self.shape, self.weight)
        if self.kind == "normalize":
            return F.normalize(x, dim=-1) * self.weight
        if self.kind == "grn":
            norms = x.norm(dim=1, keepdim=True)
            return x + self.weight * x * (norms / (norms.mean(-1, keepdim=True) + 1e-6))
        if self.kind == "cbam":
            pooled = torch.stack([x.mean(-1), x.max(-1)[0]], -1).sum(-1, keepdim=True)
            return x * self.weight * torch.sigmoid(pooled)
        if self.kind == "number":
            return self.weight * x.sum(-1, keepdim=True) / self.shape[0] + x.shape[-1] * x
        if self.kind == "position":
            return x * self.weight + x.max(-1)[1].unsqueeze(-1)
        raise ValueError(self.kind)


KINDS = ("rms", "layer", "functional", "functional_rms", "normalize", "grn", "cbam")


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), Statistic(8, kind), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return net.eval(), torch.randn(2, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_kept_channels(kind):
    net, x = network(kind)
    traced, keep = trace(net, x), [0, 2, 3, 7]
    assert traced.widths == {"0": 8, "2": 6}
    small = apply(net, traced, Plan({"0": tuple(keep)}))

    expected = nn.Sequential(nn.Linear(5, 4), Statistic(4, kind), nn.Linear(4, 6), *copy.deepcopy(net[3:]))
    with torch.no_grad():  # the same layers, built narrow
        expected[0].weight.copy_(net[0].weight[keep])
        expected[0].bias.copy_(net[0].bias[keep])
        expected[1].weight.copy_(net[1].weight[keep])
        expected[2].weight.copy_(net[2].weight[:, keep])
        expected[2].bias.copy_(net[2].bias)
    torch.testing.assert_close(small(x), expected(x))
    assert verification.verify(net, small, traced, Plan({"0": tuple(keep)}), x) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_masked_model_differs_if_statistics_are_wrong(kind):
    net, x = network(kind)
    traced, plan = trace(net, x), Plan({"0": (1, 4, 5)})
    small = apply(net, traced, plan)
    with torch.no_grad():
        small[1].weight.mul_(torch.tensor([1.0, 1.1, 1.0]))
    with pytest.raises(PruningError, match="not equivalent"):
        verification.verify(net, small, traced, plan, x)


@pytest.mark.parametrize(
    ("kind", "reason"), [("number", "does not compute what"), ("position", "reads positions")]
)
def test_what_else_the_code_computes_from_channels_keeps_them(kind, reason):
    net, x = network(kind)
    traced = trace(net, x)
    assert traced.widths == {"2": 6}
    assert reason in traced.skipped["0"]


def test_a_statistic_over_parts_of_two_groups():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x):
            x = torch.cat([self.a(x), self.b(x)], 1)
            return self.head(x - x.mean((1, 2, 3), keepdim=True))

    torch.manual_seed(0)
    net, x = Joined().eval(), torch.randn(2, 3, 5, 5)
    traced, plan = trace(net, x), Plan({"a": (0, 3), "b": (1, 2, 5)})
    small = apply(net, traced, plan)
    kept = torch.cat([net.a(x), net.b(x)], 1)[:, [0, 3, 5, 6, 9]]
    centered = kept - kept.mean((1, 2, 3), keepdim=True)
    expected = F.conv2d(centered, net.head.weight[:, [0, 3, 5, 6, 9]], net.head.bias)
    torch.testing.assert_close(small(x), expected)
    assert verification.verify(net, small, traced, plan, x) < 1e-4
