"""Heads and widths of attention: compared with the dense model whose queries, keys and outputs are zeroed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from attention import DEPTH, FUSED, GROUPED, HEADS, KINDS, WIDTH, Fused, Mean, network
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
