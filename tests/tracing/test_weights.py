"""Products and convolutions whose weight is a parameter or buffer of the module that calls them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pruning
from pruning import Plan, trace
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel, count
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify

pytestmark = pytest.mark.quick

KINDS = ("addmm", "matmul", "linear", "conv")


class Own(nn.Module):
    """A weighted layer that calls torch itself; its weight is (out, in), transposed for `addmm`."""

    def __init__(self, kind: str, into: int, out: int):
        super().__init__()
        shape = {
            "addmm": (into, out),
            "matmul": (into, out),
            "linear": (out, into),
            "conv": (out, into, 1, 1),
        }
        self.kind, self.nf, self.weight = kind, out, nn.Parameter(torch.randn(shape[kind]))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "addmm":  # GPT-2's
            size = (*x.shape[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)
        if self.kind == "matmul":
            return x @ self.weight + self.bias
        return (F.linear if self.kind == "linear" else F.conv2d)(x, self.weight, self.bias)


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Own(kind, 4, 6), nn.Tanh(), Own(kind, 6, 5), nn.Tanh(), Own(kind, 5, 3)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_modules_with_their_own_weight_are_layers(kind, tmp_path):
    net, x = network(kind), torch.randn(2, 4, 7, 7) if kind == "conv" else torch.randn(2, 7, 4)
    traced, plan = trace(net, x), Plan({"0": (1, 2, 5), "2": (0, 4)})
    assert traced.widths == {"0": 6, "2": 5}
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, x) < 1e-4

    into = 0 if kind in ("addmm", "matmul") else 1
    with torch.no_grad():  # the dense network without what reads the dropped channels
        masked = network(kind)
        masked[2].weight.index_fill_(into, torch.tensor([0, 3, 4]), 0)
        masked[4].weight.index_fill_(into, torch.tensor([1, 2, 3]), 0)
    torch.testing.assert_close(small(x), masked(x))

    cost_model = CostModel(net, traced)
    for model, widths in ((net, traced.widths), (small, plan.widths)):
        expected, counted = cost_model(widths), count(model, x)
        assert (counted.params, counted.macs) == (expected.params, expected.macs)

    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        assert torch.equal(load(tmp_path / "small.pth", lambda: network(kind))(x), small(x))


class Blur(nn.Module):
    """Blur each channel with a fixed kernel: one for each, or one expanded to all."""

    def __init__(self, channels: int, expanded: bool):
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.rand(1 if expanded else channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(self.channels, 1, 3, 3)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=self.channels)


@pytest.mark.parametrize("expanded", [False, True])
def test_fixed_kernels_follow_the_channels_that_they_blur(expanded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), Blur(6, expanded), nn.Conv2d(6, 2, 1)).eval()
    x, keep = torch.randn(2, 3, 8, 8), [0, 3, 5]
    traced, plan = trace(net, x), Plan({"0": tuple(keep)})
    small = apply(net, traced, plan)
    assert small[1].channels == 3 and verify(net, small, traced, plan, x) < 1e-4
    kept = net[1](net[0](x))[:, keep]
    torch.testing.assert_close(small(x), F.conv2d(kept, net[2].weight[:, keep], net[2].bias))


def test_a_parameter_of_the_model_itself_is_a_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return F.linear(torch.relu(self.stem(x)), self.weight)

    traced = trace(Net(), torch.randn(2, 4))
    assert traced.widths == {"stem": 6} and "the model's output" in traced.skipped["weight"]


def test_two_models_of_one_class_may_use_its_weight_in_different_ways():
    class Either(nn.Module):
        def __init__(self, into, out, transposed):
            super().__init__()
            self.transposed = transposed
            self.weight = nn.Parameter(torch.randn(out, into) if transposed else torch.randn(into, out))

        def forward(self, x):
            return x @ (self.weight.t() if self.transposed else self.weight)

    torch.manual_seed(0)
    x, plan = torch.randn(6, 4), Plan({"0": (0, 2, 5)})
    nets = [nn.Sequential(Either(4, 8, t), nn.ReLU(), Either(8, 3, t)) for t in (False, True)]
    traces = [trace(net, x) for net in nets]  # before either of them is pruned
    for net, traced in zip(nets, traces, strict=True):
        small = apply(net, traced, plan)
        assert verify(net, small, traced, plan, x) < 1e-4
        assert CostModel(net, traced)(plan.widths).params == sum(p.numel() for p in small.parameters()) == 21
