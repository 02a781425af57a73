"""Heads and widths of attention: compared with the dense model whose queries, keys and outputs are zeroed."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import Budget, Plan, prune, trace
from pruning.graph.groups import Trace
from pruning.planning import count
from pruning.planning.cost import CostModel
from pruning.planning.scores import taylor
from pruning.surgery.apply import apply
from pruning.surgery.refit import refit

pytestmark = pytest.mark.quick

WIDTH, HEADS, DEPTH = 12, 4, 6


class Attention(nn.Module):
    """Attention whose queries, keys and values are three layers; `kind` chooses the code of the products."""

    def __init__(self, kind: str, kv_heads: int = HEADS):
        super().__init__()
        self.kind, self.num_heads, self.head_dim, self.kv_heads = kind, HEADS, DEPTH, kv_heads
        self.repeats, self.scale = HEADS // kv_heads, DEPTH**-0.5
        self.q, self.out = nn.Linear(WIDTH, HEADS * DEPTH), nn.Linear(HEADS * DEPTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * DEPTH), nn.Linear(WIDTH, kv_heads * DEPTH)
        if kind == "rotary":
            self.register_buffer("frequency", 100.0 ** -torch.linspace(0, 1, DEPTH // 2))
        if kind == "bias":
            self.table = nn.Parameter(torch.randn(9, HEADS))
        if kind == "norm":
            self.q_norm, self.k_norm = nn.LayerNorm(DEPTH), nn.LayerNorm(DEPTH)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).to(x)[:, None] * self.frequency
        angles, half = torch.cat([angles, angles], -1), x.shape[-1] // 2
        return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = *x.shape[:2], -1, self.head_dim
        return tuple(layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if self.kind == "gqa_sdpa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if self.kind == "gqa":
            k, v = (x.repeat_interleave(self.repeats, dim=1) for x in (k, v))
        if self.kind == "gqa_expanded":
            k, v = (x[:, :, None].expand(-1, -1, self.repeats, -1, -1).flatten(1, 2) for x in (k, v))
        if self.kind == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        if self.kind == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind == "einsum":
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * self.scale
            return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
        if self.kind == "shape":
            return ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if self.kind == "bias":
            place = torch.arange(scores.shape[-1])
            scores = scores + self.table[place[:, None] - place + 4].permute(2, 0, 1)
        if self.kind == "causal":
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -1e9)
        return scores.softmax(-1) @ v


class Fused(Attention):
    """Attention with one layer for queries, keys and values."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DEPTH)
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "chunked":
            shape = *x.shape[:2], self.num_heads, self.head_dim
            return tuple(part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        shape = *x.shape[:2], 3, self.num_heads, self.head_dim
        return self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)


class Mean(nn.Module):
    """The mean over tokens, (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


KINDS = ("softmax", "sdpa", "einsum", "shape", "causal", "bias", "norm", "rotary")
GROUPED = ("gqa", "gqa_expanded", "gqa_sdpa")
FUSED = ("fused", "chunked")


def network(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a network with attention, and inputs (batch, tokens, channels)."""
    torch.manual_seed(0)
    kv_heads = HEADS // 2 if kind in GROUPED else HEADS
    attention = Fused(kind) if kind in FUSED else Attention(kind, kv_heads)
    net = nn.Sequential(nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), attention, nn.Tanh(), nn.Linear(WIDTH, 3))
    return net.eval(), torch.randn(2, 5, 5)


@functools.cache
def traced_network(kind: str) -> tuple[nn.Module, Tensor, Trace]:
    """Return the same network for several tests, which only read it, and its trace."""
    net, x = network(kind)
    return net, x, trace(net, x)


class NormOfKept(nn.Module):
    """A LayerNorm over some of the positions; the others are 0."""

    def __init__(self, norm: nn.LayerNorm, kept: list[int]):
        super().__init__()
        self.norm, self.kept = norm, torch.tensor(kept)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight[self.kept], self.norm.bias[self.kept]
        values = F.layer_norm(x[..., self.kept], (len(self.kept),), weight, bias)
        return torch.zeros_like(x).index_copy(-1, self.kept, values)


def masked(net: nn.Module, heads: list[int], places: list[int]) -> nn.Module:
    """Return the dense network without some heads and positions.

    The rows of q and k at the positions are 0, and the columns of `out` at the heads and the positions.
    """
    dense = copy.deepcopy(net)
    attention = dense[2]

    def without_places(heads: int) -> Tensor:
        return ~torch.isin(torch.arange(heads * DEPTH) % DEPTH, torch.tensor(places))

    if isinstance(attention, Fused):
        of_values = torch.zeros(HEADS * DEPTH, dtype=torch.bool)
        rows = {"qkv": torch.cat([without_places(HEADS), without_places(HEADS), of_values])}
    else:
        rows = {"q": without_places(HEADS), "k": without_places(attention.kv_heads)}
    without_heads = ~torch.isin(torch.arange(HEADS * DEPTH) // DEPTH, torch.tensor(heads))
    with torch.no_grad():
        for name, dropped in rows.items():
            layer = attention.get_submodule(name)
            layer.weight[dropped], layer.bias[dropped] = 0, 0
        attention.out.weight[:, without_places(HEADS) | without_heads] = 0
    if attention.kind == "norm":
        attention.q_norm, attention.k_norm = (
            NormOfKept(norm, places) for norm in (attention.q_norm, attention.k_norm)
        )
    return dense


def by_groups(net: nn.Module, heads: list[int], places: list[int]) -> Plan:
    """Return the plan that keeps these channels of the two groups of attention."""
    return Plan({named(net, "heads"): heads, named(net, "width"): places})


def named(net: nn.Module, axis: str = "width") -> str:
    """Return the name of a group of attention."""
    return f"2.{'qkv' if isinstance(net[2], Fused) else 'q'}/{axis}"


@pytest.mark.parametrize("kind", [*KINDS, *FUSED, *GROUPED])
@pytest.mark.parametrize("all_heads", [True, False])
@pytest.mark.parametrize("all_places", [True, False])
def test_pruned_attention_equals_the_dense_one_without_these_heads_and_positions(kind, all_heads, all_places):
    net, x, traced = traced_network(kind)
    groups, pairs = net[2].kv_heads, DEPTH // 2 if kind == "rotary" else DEPTH
    kept_groups = list(range(groups)) if all_heads else list(range(1, groups, 2))
    kept_pairs = list(range(pairs)) if all_places else [0, 2]
    heads = [h for h in range(HEADS) if h // (HEADS // groups) in kept_groups]
    places = [d for d in range(DEPTH) if d % pairs in kept_pairs]
    plan = by_groups(net, kept_groups, kept_pairs)

    small = apply(net, traced, plan)
    torch.testing.assert_close(small(x), masked(net, heads, places)(x), rtol=1e-4, atol=1e-5)
    other = torch.randn(3, 5, 5)
    torch.testing.assert_close(small(other), masked(net, heads, places)(other), rtol=1e-4, atol=1e-5)
    assert small[2].out.weight.shape == (WIDTH, len(heads) * len(places))
    assert CostModel(net, traced)(plan.widths) == count(small, x)


@pytest.mark.parametrize("kind", ["softmax", "sdpa", "rotary", "gqa", "fused"])
def test_dead_heads_and_positions_are_pruned_without_any_change(kind):
    """The scale stays that of the dense model, also where the code computes it from a width."""
    net, x = network(kind)
    places = [0, 2, 3, 5] if kind == "rotary" else [1, 2, 4]
    heads = [2, 3]
    dead = masked(net, heads, places)
    wanted = dead(x)
    pairs = sorted({d % 3 for d in places}) if kind == "rotary" else places
    kept_heads = [1] if kind == "gqa" else heads
    small = apply(dead, trace(dead, x), by_groups(net, kept_heads, pairs))
    torch.testing.assert_close(small(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, *FUSED, *GROUPED])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_budget_on_macs_counts_the_products_of_attention(kind, share):
    net, x = network(kind)
    dense = count(net, x).macs
    step = prune(net, x, Budget(macs=f"{share:.0%}"), score="l2")
    assert count(step.model, x).macs == step.after.macs <= share * dense


def test_what_one_head_or_position_frees_is_exact():
    net, x = network("softmax")
    cost = CostModel(net, trace(net, x))
    widths = torch.tensor([10, 3, 7, 4]).double().numpy()[: len(cost.groups)]
    widths = widths.clip(2, cost.full)
    freed = cost.freed(widths)
    for i in range(len(widths)):
        narrower = widths.copy()
        narrower[i] -= 1
        for what in ("params", "macs"):
            lost = getattr(cost(widths), what) - getattr(cost(narrower), what)
            assert freed[what][i] == pytest.approx(lost, abs=1)


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


def test_a_gram_matrix_loses_the_rows_and_columns_of_removed_channels():
    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x).flatten(2)
            return self.head((x @ x.transpose(1, 2)).mean(2))

    torch.manual_seed(0)
    net, x, kept = Gram(), torch.randn(2, 3, 4, 4), [0, 2, 3, 7]
    traced = trace(net, x)
    small = apply(net, traced, Plan({"stem": kept}))
    channels = net.stem(x).flatten(2)[:, kept]
    by_hand = (channels @ channels.transpose(1, 2)).mean(2) @ net.head.weight[:, kept].T + net.head.bias
    torch.testing.assert_close(small(x), by_hand, rtol=1e-4, atol=1e-5)
    assert CostModel(net, traced)({"stem": 4}) == count(small, x)


@pytest.mark.parametrize("kind", ["sdpa", "shape", "fused"])
def test_refitting_keeps_the_scale_of_attention(kind):
    """A refit of queries behind narrowed inputs aims at those of the dense model times the scale's factor."""
    torch.manual_seed(1)
    net, _ = network(kind)
    x = torch.randn(4, 5, 5)
    dead = masked(net, [0, 1, 2, 3], [1, 2, 4])
    with torch.no_grad():
        dead[0].weight[0], dead[0].bias[0] = dead[0].weight[1], dead[0].bias[1]  # one channel twice
    dead[1] = nn.Identity()
    traced = trace(dead, x)
    plan = Plan({"0": tuple(range(1, WIDTH)), named(net): (1, 2, 4)})
    small = apply(dead, traced, plan)
    refit(small, dead, traced, plan, [x])
    torch.testing.assert_close(small(x), dead(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["softmax", "sdpa", "rotary", "bias", "fused", "gqa"])
def test_taylor_is_the_first_order_change_of_the_loss_without_a_head_or_a_position(kind):
    """Compared with the derivative of the loss with respect to a gate on the head, or on the position."""
    net, x = network(kind)
    targets = torch.tensor([0, 2])
    net = nn.Sequential(*net, Mean())
    traced = trace(net, x)
    scores = taylor(net, traced, [(x, targets)], F.cross_entropy)
    groups, pairs = net[2].kv_heads, DEPTH // 2 if kind == "rotary" else DEPTH
    gates = {"heads": torch.ones(groups, requires_grad=True), "width": torch.ones(pairs, requires_grad=True)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = gates["width"].repeat(DEPTH // pairs)
        found = type(net[2]).attend(net[2], q * places, k, v * places)
        return found * gates["heads"].repeat_interleave(HEADS // groups)[:, None, None]

    net[2].attend = attend
    loss = F.cross_entropy(net(x), targets)
    for axis, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
        torch.testing.assert_close(scores[named(net, axis)], gradient.square(), rtol=1e-3, atol=1e-9)
