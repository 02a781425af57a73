"""Weights that code computes from parameters: scaled, modulated, mixed and merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pruning import Budget, Plan, load, prune, save, trace
from pruning.planning.cost import CostModel, count
from pruning.surgery import with_plain_weights
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify
from pruning.utils.modules import copied

pytestmark = pytest.mark.quick


class Scaled(nn.Module):
    """A convolution with an equalized learning rate."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into, 3, 3)), nn.Parameter(torch.randn(out))
        self.scale = 1 / math.sqrt(9 * into)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=1)


class Modulated(nn.Module):
    """StyleGAN2's convolution: each example has its own weight, modulated and demodulated."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, out, into, 3, 3)), nn.Linear(3, into)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        styles = self.style(torch.linspace(0, 1, 3 * n).view(n, 3))
        weight = self.weight * styles.view(n, 1, c, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = weight.reshape(n * weight.shape[1], c, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n).view(n, -1, h, w)


class Mixed(nn.Module):
    """CondConv: the weight of an example is a mixture of several."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.routing = nn.Parameter(torch.randn(4, out, into, 3, 3)), nn.Linear(into, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        shares = torch.sigmoid(self.routing(x.mean((2, 3))))
        weight = torch.einsum("ne,eoihw->noihw", shares, self.weight).flatten(0, 1)
        return F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n).view(n, -1, h, w)


class Merged(nn.Linear):
    """A linear layer whose code adds an update of low rank to its weight."""

    def __init__(self, into: int, out: int):
        super().__init__(into, out)
        self.a, self.b = nn.Parameter(torch.randn(4, into)), nn.Parameter(torch.randn(out, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 0.5 * (self.b @ self.a), self.bias)


class Update(nn.Module):
    """A parametrization of low rank, which has no inverse."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(4, weight[0].numel())),
            nn.Parameter(torch.randn(len(weight), 4)),
        )

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * (self.b @ self.a).view_as(weight)


class Parametrized(nn.Linear):
    def __init__(self, into: int, out: int):
        super().__init__(into, out)
        nn.utils.parametrize.register_parametrization(self, "weight", Update(self.weight))


class ParametrizedConv(nn.Conv2d):
    def __init__(self, into: int, out: int):
        super().__init__(into, out, 3)
        nn.utils.parametrize.register_parametrization(self, "weight", Update(self.weight))


class Lent(nn.Module):
    """A LoRA of layers that do not run: their weights are merged."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.base, self.down = nn.Linear(into, out), nn.Linear(into, 4, bias=False)
        self.up = nn.Linear(4, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up.weight @ self.down.weight, self.base.bias)


class Slots(nn.Module):
    """A matrix for each slot of the input."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, into, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nsi,sio->nso", x, self.weight)


SHAPES = {
    Scaled: (2, 3, 6, 6),
    Modulated: (2, 3, 6, 6),
    Mixed: (2, 3, 6, 6),
    Merged: (2, 40, 3),
    Parametrized: (2, 3),
    ParametrizedConv: (2, 3, 9, 9),
    Lent: (2, 3),
    Slots: (2, 5, 3),
}

#: The parameter whose rows are the output channels, and the dimension of the outputs.
HELD = {
    Slots: ("weight", 2),
    Modulated: ("weight", 1),
    Mixed: ("weight", 1),
    Parametrized: ("parametrizations.weight.original", 0),
    ParametrizedConv: ("parametrizations.weight.original", 0),
    Lent: ("base.weight", 0),
}


def net_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(3, 8), nn.Tanh(), kind(8, 6), nn.Tanh(), kind(6, 2))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_weight_that_code_computes_is_narrowed_and_counted(kind, tmp_path):
    net, x = net_of(kind), torch.randn(SHAPES[kind])
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        copied(net).requires_grad_(False)(x)
    step = prune(net, x, Budget(macs="50%"), score="l1")
    assert step.before.macs == pytest.approx(flops.get_total_flops() / 2 / len(x), abs=2)
    widths = {
        member.layer: len(step.plan.keep[g])
        for g, group in step.trace.groups.items()
        for member in group.members
    }
    name, dim = HELD.get(kind, ("weight", 0))
    assert widths[f"0.{name}"] == step.model.get_parameter(f"0.{name}").shape[dim] < 8
    assert step.after.params == sum(p.numel() for p in step.model.parameters())
    assert step.after.macs == pytest.approx(count(step.model, x).macs, abs=2)
    assert verify(net, step.model, step.trace, step.plan, torch.randn(3, *x.shape[1:])) < 1e-4
    save(tmp_path / "small.pth", step.model)
    again = load(tmp_path / "small.pth", lambda: net_of(kind))
    assert torch.equal(again.eval()(x), step.model.eval()(x))


class Flat(nn.Module):
    """Mixes weights that are held as rows of one matrix, which has no dimension for each side."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.weight = nn.Parameter(torch.randn(4, 8 * 8 * 9))

    def forward(self, x: Tensor) -> Tensor:
        weight = (torch.ones(1, 4) @ self.weight).view(8, 8, 3, 3)
        return self.last(F.conv2d(self.first(x), weight))


def test_a_weight_without_a_dimension_for_each_side_is_named():
    traced = trace(Flat(), torch.randn(2, 3, 8, 8))
    assert "first" in traced.skipped and "to let it be pruned" in traced.skipped["first"]


class Blurred(nn.Module):
    """Blurs each channel as an image of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        return self.last(F.conv2d(x.reshape(n * c, 1, h, w), self.kernel, padding=1).reshape(n, c, h, w))


def test_channels_that_are_convolved_as_images_are_followed_and_counted():
    net, x = Blurred(), torch.randn(2, 3, 8, 8)
    traced, plan = trace(net, x), Plan({"first": (0, 4, 7)})
    assert not traced.skipped.keys() - {"last"}
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, x) < 1e-5
    assert CostModel(net, traced)({"first": 3}).macs == count(small, x).macs


class Standardized(nn.Conv2d):
    """A convolution with a gain, whose code standardizes its weight by `F.batch_norm`."""

    def __init__(self, into: int, out: int):
        super().__init__(into, out, 3)
        self.gain = nn.Parameter(torch.ones(out, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class ByHand(nn.Module):
    """Standardizes its filters by operations, and holds nothing but parameters."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into, 3, 3)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias)


class Held(nn.Module):
    """Standardizes its filters by `F.batch_norm`, outside of a convolution's class."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(out, into, 3, 3)), nn.Parameter(torch.rand(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, len(self.weight), -1)
        return F.conv2d(x, F.batch_norm(flat, None, None, self.gain, training=True).reshape_as(self.weight))


class Normalized(nn.Module):
    """A linear layer whose rows are divided by their norm."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Magnitudes(Merged):
    """DoRA: the merged weight has rows of the magnitudes m."""

    def __init__(self, into: int, out: int):
        super().__init__(into, out)
        self.m = nn.Parameter(torch.rand(out) + 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.b @ self.a
        return F.linear(x, self.m[:, None] * weight / weight.norm(dim=1, keepdim=True), self.bias)


FILTERS = {
    Standardized: (2, 3, 9, 9),
    ByHand: (2, 3, 9, 9),
    Held: (2, 3, 9, 9),
    Normalized: (2, 3),
    Magnitudes: (2, 3),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_filters_of_weights_with_statistics_go_and_their_inputs_stay(kind, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        last = nn.Conv2d(6, 2, 1) if len(FILTERS[kind]) > 2 else nn.Linear(6, 2)
        return nn.Sequential(kind(3, 8), nn.Tanh(), kind(8, 6), nn.Tanh(), last)

    net, x = make(), torch.randn(FILTERS[kind])
    traced = trace(net, x)
    [name] = [name for name, width in traced.widths.items() if width == 6]
    assert name[0] == "2" and 8 not in traced.widths.values()
    why = next(why for layer, why in traced.skipped.items() if layer[0] == "0")
    assert "with_plain_weights" in why
    plan = Plan({name: (0, 3, 4)})
    small = apply(net, traced, plan)
    masked = copied(net)
    with torch.no_grad():
        masked[4].weight[:, [1, 2, 5]] = 0  # an oracle that knows no statistics
    torch.testing.assert_close(small(x), masked(x))
    assert CostModel(net, traced)(plan.widths).params == sum(p.numel() for p in small.parameters())
    save(tmp_path / "small.pth", small)
    assert torch.equal(load(tmp_path / "small.pth", make)(x), small(x))
    assert 8 in trace(with_plain_weights(net, x), x).widths.values()


class Prototypes(nn.Module):
    """Adds a table whose rows are normalized: no weight."""

    def __init__(self):
        super().__init__()
        self.first, self.table, self.last = nn.Linear(4, 8), nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + F.normalize(self.table, dim=1))


def test_statistics_of_a_parameter_that_is_no_weight_fix_its_channels():
    assert "first" in trace(Prototypes(), torch.randn(2, 5, 4)).skipped


def test_a_gain_of_zero_does_not_hide_that_a_layer_looks_at_all_inputs():
    net = net_of(Standardized)
    for layer in net[::2]:
        nn.init.zeros_(layer.gain)
    assert trace(net, torch.randn(2, 3, 9, 9)).skipped.keys() == {"0", "2", "4"}
