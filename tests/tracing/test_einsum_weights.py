"""Weights with more dimensions than two sides, as code multiplies by them in `torch.einsum`."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import pruning
from pruning import Plan, Trace, trace
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel, count
from pruning.planning.scores import score_channels
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify

pytestmark = pytest.mark.quick


class Attention(nn.Module):
    """Attention whose weights are (inputs, heads, positions), as those of XLNet."""

    def __init__(self, width: int, heads: int, positions: int, unread: bool = False):
        super().__init__()
        shape = width, heads, positions
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(shape) / 3) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(heads, positions))
        if unread:
            self.segments = nn.Parameter(torch.randn(2, heads, positions))
        self.segment: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("ibh,hnd->ibnd", x, w) for w in (self.q, self.k, self.v))
        q = q + self.bias
        if self.segment is not None:
            q = q + self.segments[self.segment]
        shares = torch.einsum("ibnd,jbnd->bnij", q, k).softmax(-1)
        return torch.einsum("ibnd,hnd->ibh", torch.einsum("bnij,jbnd->ibnd", shares, v), self.o)


class Net(nn.Module):
    def __init__(self, width: int = 8, heads: int = 3, positions: int = 4, unread: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 2)
        self.attention = Attention(width, heads, positions, unread)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + self.attention(hidden))


class Divided(nn.Module):
    """A linear layer with outputs along two dimensions of its weight, and one that reads them."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Parameter(torch.randn(5, 4, 6) / 2), nn.Parameter(torch.randn(4, 6, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,ndo->bo", torch.einsum("bi,ind->bnd", x, self.into).relu(), self.out)


Network = TypeVar("Network", bound=nn.Module)

#: By group, the parameters that lose its channels, each with the dimension.
HELD = {
    "first": {"q": 0, "k": 0, "v": 0, "o": 0},
    "attention.q/heads": {"q": 1, "k": 1, "v": 1, "o": 1, "bias": 0},
    "attention.q/qk": {"q": 2, "k": 2, "bias": 1},
    "attention.v/width": {"v": 2, "o": 2},
}


def narrowed(model: Network, traced: Trace, plan: Plan) -> Network:
    small = apply(model, traced, plan)
    assert isinstance(small, type(model))
    return small


def net(**options):
    torch.manual_seed(0)
    return Net(**options), torch.randn(6, 2, 5)


@pytest.mark.parametrize("name", HELD)
def test_channels_lie_along_dimensions_of_the_weights(name):
    """The oracle narrows the parameters by hand."""
    model, x = net()
    traced = trace(model, x)
    assert traced.widths == {"first": 8, "attention.q/heads": 3, "attention.q/qk": 4, "attention.v/width": 4}
    kept = tuple(range(1, traced.widths[name]))
    plan = Plan({name: kept})
    small = narrowed(model, traced, plan)
    assert verify(model, small, traced, plan, x) < 1e-5
    for own, parameter in model.attention.named_parameters():
        dim = HELD[name].get(own)
        narrow = parameter if dim is None else parameter.index_select(dim, torch.tensor(kept))
        torch.testing.assert_close(small.attention.get_parameter(own), narrow, rtol=0, atol=0)


def test_all_groups_are_narrowed_together_and_counted(tmp_path):
    model, x = net()
    traced = trace(model, x)
    plan = Plan(
        {"first": (0, 2, 5), "attention.q/heads": (0, 2), "attention.q/qk": (1, 3), "attention.v/width": (2,)}
    )
    small = narrowed(model, traced, plan)
    assert verify(model, small, traced, plan, x) < 1e-5
    costs = CostModel(model, traced)
    for network, at in ((model, traced.widths), (small, plan.widths)):
        expected, counted = costs(at), count(network, x)
        assert (counted.params, counted.macs) == (expected.params, expected.macs)
    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        assert torch.equal(load(tmp_path / "small.pth", Net)(x), small(x))


def test_a_parameter_that_no_call_reaches_follows_one_of_its_shape():
    model, x = net(unread=True)
    traced = trace(model, x)
    plan = Plan({"attention.q/heads": (0, 2), "attention.q/qk": (1, 2, 3)})
    small = narrowed(model, traced, plan)
    segments = model.attention.segments[:, [0, 2]][:, :, [1, 2, 3]]
    assert torch.equal(small.attention.segments, segments)
    model.attention.segment = small.attention.segment = 1
    assert verify(model, small, traced, plan, x) < 1e-5


def test_outputs_along_two_dimensions_without_attention_are_narrowed_along_both():
    torch.manual_seed(0)
    model, x = Divided(), torch.randn(3, 5)
    traced = trace(model, x)
    assert sorted(traced.widths.values()) == [4, 6]
    plan = Plan({name: (0, 3) if width == 4 else (1, 4, 5) for name, width in traced.widths.items()})
    small = narrowed(model, traced, plan)
    assert torch.equal(small.into, model.into[:, [0, 3]][:, :, [1, 4, 5]])
    assert torch.equal(small.out, model.out[[0, 3]][:, [1, 4, 5]])
    assert verify(model, small, traced, plan, x) < 1e-5


@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_heads_without_effect_are_removed_first(score):
    model, x = net()
    with torch.no_grad():
        for own in (model.attention.q, model.attention.k, model.attention.v, model.attention.o):
            own[:, 1] *= 1e-3
        model.attention.bias[1] *= 1e-3
    traced = trace(model, x)
    batches = [(x, torch.randn(6, 2, 2))]
    scores = score_channels(model, traced, score, batches, nn.functional.mse_loss)
    assert scores["attention.q/heads"].argmin() == 1
