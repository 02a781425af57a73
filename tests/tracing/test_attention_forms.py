"""Attention whose code takes sizes from its input or from attributes, or applies softmax over positions."""

from __future__ import annotations

import copy

import pytest
import torch
from attention import DEPTH, HEADS, WIDTH, Attention
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import Budget, Plan, prune, trace
from pruning.planning import count
from pruning.planning.cost import CostModel
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick


def test_heads_whose_sizes_are_constants_in_the_code_are_skipped_with_the_reason():
    class Constant(Attention):
        def heads(self, x):
            shape = *x.shape[:2], 4, 6
            return tuple(layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, WIDTH), Constant("softmax"), nn.Linear(WIDTH, 3))
    traced = trace(net, torch.randn(2, 5, 5))
    assert list(traced.groups) == ["0", "1.out"]
    assert "tied to its width" in traced.skipped["1.q"] and "Compute the sizes" in traced.skipped["1.q"]


class Divided(nn.Module):
    """Attention that takes the size of a head from its input, between residual sums."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = HEADS, (3 * WIDTH // HEADS) ** -0.5
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = batch, tokens, 3, self.num_heads, width // self.num_heads
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize(("heads", "places"), [([0, 1, 3], [0, 1, 2]), ([0, 1, 2, 3], [0, 2]), ([1, 2], [2])])
def test_channels_of_the_input_are_pruned_with_the_positions_of_heads_that_the_code_counts_by_them(
    heads, places
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, WIDTH), Divided(), Divided(), nn.Linear(WIDTH, 3)).eval()
    x = torch.randn(2, 4, 5)
    traced = trace(net, x)
    assert traced.widths == {"0/heads": HEADS, "0/width": WIDTH // HEADS}
    plan = Plan({"0/heads": heads, "0/width": places})
    small = apply(net, traced, plan)
    kept = torch.tensor([h * 3 + d for h in range(HEADS) for d in range(3) if h in heads and d in places])
    thrice = torch.cat([kept, WIDTH + kept, 2 * WIDTH + kept])

    def by_hand(x: Tensor) -> Tensor:
        """Compute the dense network on its kept channels, without its code."""
        x = x @ net[0].weight[kept].T + net[0].bias[kept]
        for block in net[1:3]:
            normed = F.layer_norm(x, (len(kept),), block.norm.weight[kept], block.norm.bias[kept])
            qkv = normed @ block.qkv.weight[thrice][:, kept].T + block.qkv.bias[thrice]
            q, k, v = (part.unflatten(-1, (len(heads), -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
            mixed = ((q @ k.transpose(-2, -1)) * block.scale).softmax(-1) @ v
            x = (
                x
                + mixed.transpose(1, 2).flatten(2) @ block.out.weight[kept][:, kept].T
                + block.out.bias[kept]
            )
        return x @ net[3].weight[:, kept].T + net[3].bias

    torch.testing.assert_close(small(x), by_hand(x), rtol=1e-4, atol=1e-5)
    assert CostModel(net, traced)(plan.widths) == count(small, x)


class OwnCode(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OwnLayers(Attention):
    """Attention of layers with code of their own, whose outputs are viewed as an attribute says."""

    def __init__(self):
        super().__init__("own")
        self.all = HEADS * DEPTH
        self.q, self.k, self.v = (OwnCode(WIDTH, self.all) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.all))


def test_an_attribute_of_joined_groups_follows_once():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, WIDTH), OwnLayers(), nn.Linear(WIDTH, 3)), torch.randn(2, 4, 5)
    traced = trace(net, x)
    assert traced.widths["1.q/heads"] == HEADS and traced.widths["1.q/width"] == DEPTH
    small = apply(net, traced, Plan({"1.q/heads": (0, 3), "1.q/width": (0, 1, 5)}))
    assert (small[1].all, small[1].head_dim) == (6, 3)
    kept = torch.tensor([h * DEPTH + d for h in (0, 3) for d in (0, 1, 5)])
    hidden = net[0](x)
    q, k, v = (
        (hidden @ layer.weight[kept].T + layer.bias[kept]).unflatten(-1, (2, 3)).transpose(1, 2)
        for layer in (net[1].q, net[1].k, net[1].v)
    )
    mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    by_hand = net[2](mixed @ net[1].out.weight[:, kept].T + net[1].out.bias)
    torch.testing.assert_close(small(x), by_hand, rtol=1e-4, atol=1e-5)


class Viewed(nn.Module):
    """Attention over pixels with fewer positions in q and k than in v; views take the width of the input."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.key_dim, self.head_dim, self.scale = HEADS, 2, WIDTH // HEADS, 2**-0.5
        self.qkv = nn.Conv2d(WIDTH, HEADS * (2 * self.key_dim + self.head_dim), 1)
        self.near, self.out = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        shape = batch, self.num_heads, 2 * self.key_dim + self.head_dim, height * width
        q, k, v = self.qkv(x).view(shape).split([self.key_dim, self.key_dim, self.head_dim], 2)
        mixed = v @ ((q * self.scale).transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)
        near = self.near(v.reshape(batch, channels, height, width))
        return x + self.out(mixed.view(batch, channels, height, width) + near)


def test_channels_are_pruned_with_the_values_that_a_view_takes_for_as_many():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 1), Viewed(), nn.Conv2d(WIDTH, 5, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    traced = trace(net, x)
    assert {key.partition("/")[2]: width for key, width in traced.widths.items()} == {
        "width": 2,
        "heads": HEADS,
        "v": WIDTH // HEADS,
    }
    heads, key, value = (
        next(name for name in traced.widths if name.endswith(e)) for e in ("heads", "h", "v")
    )
    small = apply(net, traced, Plan({heads: [1, 2, 3], key: [1], value: [0, 2]}))
    block, kept = small[1], torch.tensor([3 * h + d for h in (1, 2, 3) for d in (0, 2)])
    assert (block.num_heads, block.key_dim, block.head_dim) == (3, 1, 2)
    rows = torch.tensor([7 * h + d for h in (1, 2, 3) for d in (1, 3, 4, 6)])
    torch.testing.assert_close(block.qkv.weight[:, :, 0, 0], net[1].qkv.weight[rows][:, kept, 0, 0])
    torch.testing.assert_close(block.out.weight, net[1].out.weight[kept][:, kept])
    assert prune(net, x, Budget(macs="50%"), score="l2").difference < 1e-4


class Linear(Attention):
    """Attention by softmax over the positions of queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q + self.gone).softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class CrossCovariance(Attention):
    """Attention between the positions of each head, as in XCiT."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (F.normalize(each, dim=-2) for each in (q, k))
        return v @ (q.transpose(-2, -1) @ k + self.gone[:, None]).softmax(-2)


@pytest.mark.parametrize("kind", [Linear, CrossCovariance])
def test_softmax_over_the_positions_of_heads_is_over_those_that_are_kept(kind):
    """The dense model adds -inf to what softmax reads at the dropped positions."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, WIDTH), kind("linear"), nn.Linear(WIDTH, 3)), torch.randn(2, 5, 5)
    net[1].register_buffer("gone", torch.zeros(DEPTH))
    traced = trace(net, x)
    assert traced.widths["1.q/heads"] == HEADS
    (places,) = [
        name for name, group in traced.groups.items() if group.reductions and group.channels == DEPTH
    ]
    plan = Plan({"1.q/heads": (0, 3), places: (0, 1, 4)})
    small, dense = apply(net, traced, plan), copy.deepcopy(net)
    assert small[1].gone.shape == (3,)
    with torch.no_grad():
        dense[1].gone[[2, 3, 5]] = -torch.inf
        read = dense[1].out.weight.unflatten(1, (HEADS, DEPTH))
        read[:, [1, 2]], read[:, :, [2, 3, 5]] = 0, 0
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)


class Encoded(nn.Module):
    """Attention in factors with values that a convolution mixes over pixels, as in CoaT."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.out = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.near = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = batch, tokens, 3, self.num_heads, width // self.num_heads
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        near = self.near(v.transpose(-1, -2).reshape(batch, width, 2, -1))
        mixed = q @ (k.softmax(2).transpose(-1, -2) @ v) + q * near.reshape(q.mT.shape).mT
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


def test_a_convolution_of_values_follows_their_heads_and_positions():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, WIDTH), Encoded(), nn.Linear(WIDTH, 3)), torch.randn(2, 6, 5)
    traced = trace(net, x)
    assert traced.widths == {"0/heads": HEADS, "0/width": WIDTH // HEADS, "1.out": WIDTH}
    small, dense = apply(net, traced, Plan({"0/heads": (0, 2, 3), "0/width": (0, 2)})), copy.deepcopy(net)
    gone = torch.tensor([not (h != 1 and d != 1) for h in range(HEADS) for d in range(3)])
    with torch.no_grad():
        dense[1].qkv.weight[:, gone] = 0
        for held in (dense[1].qkv.weight, dense[1].qkv.bias):
            held[gone.repeat(3)] = 0
        dense[1].out.weight[:, gone] = 0
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)


class Complex(Attention):
    """Rotary positions as products of complex numbers, with turns that are a constant or follow a buffer."""

    def __init__(self, constant: bool):
        super().__init__("rotary")
        if constant:
            del self.frequency
            self.frequency = 100.0 ** -torch.linspace(0, 1, DEPTH // 2)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).to(x)[:, None] * self.frequency.to(x)
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)


@pytest.mark.parametrize("constant", [True, False])
def test_heads_are_followed_through_complex_numbers(constant):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, WIDTH), Complex(constant), nn.Linear(WIDTH, 3)), torch.randn(2, 5, 5)
    traced, dense = trace(net, x), copy.deepcopy(net)
    assert traced.widths["1.q/heads"] == HEADS
    small = apply(net, traced, Plan({"1.q/heads": (0, 3)}))
    assert small[1].out.weight.shape == (WIDTH, 2 * DEPTH)
    with torch.no_grad():
        dense[1].out.weight.unflatten(1, (HEADS, DEPTH))[:, [1, 2]] = 0
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["flatten", "abs"])
def test_real_and_imaginary_parts_keep_the_same_channels(tail):
    """Pairs of channels are one complex number; the oracle zeroes what reads the pairs that are dropped."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 10), nn.Linear(10 if tail == "flatten" else 5, 3)

        def forward(self, x):
            numbers = torch.view_as_complex(self.first(x).unflatten(-1, (-1, 2)).contiguous())
            return self.last(torch.view_as_real(numbers).flatten(-2) if tail == "flatten" else numbers.abs())

    torch.manual_seed(0)
    net, x = Pairs(), torch.randn(2, 4)
    traced, dense = trace(net, x), copy.deepcopy(net)
    assert traced.widths == {"first": 5}
    small = apply(net, traced, Plan({"first": (0, 2, 4)}))
    assert small.first.out_features == 6
    with torch.no_grad():
        dense.last.weight.unflatten(1, (5, -1))[:, [1, 3]] = 0
    torch.testing.assert_close(small(x), dense(x))


class Queried(nn.Module):
    """Attention, then a pooling whose queries are a parameter, so that no layer can take its scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.queries = nn.Parameter(torch.randn(1, 2, 3, 4))
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.key, self.value))
        pooled = F.scaled_dot_product_attention(self.queries.expand(len(x), -1, -1, -1), k, v)
        return self.head(pooled.transpose(1, 2).flatten(2).mean(1))


def test_a_product_whose_scale_nothing_can_take_does_not_stop_the_others():
    torch.manual_seed(0)
    step = prune(Queried(), torch.randn(2, 7, 6), Budget(macs="60%"), score="l2")
    assert step.plan.widths["qkv/width"] < 4
    assert step.model.queries.shape[-1] == step.model.key.out_features // 2 == 4, "its scale would change"
