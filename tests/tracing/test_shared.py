"""Parameters that layers share: an embedding and the output layer lose the same columns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning import Budget, Plan, load, prune, save, trace
from pruning.planning import count
from pruning.planning.cost import CostModel
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick


class Language(nn.Module):
    """A model of tokens whose output layer has the weight of its embedding."""

    def __init__(self, words: int = 11, width: int = 8):
        super().__init__()
        self.embed, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(self.norm(x + torch.tanh(self.mix(x))))


def network():
    torch.manual_seed(0)
    return Language().eval(), torch.randint(0, 11, (2, 5))


def test_tied_embeddings_are_narrowed_together_and_stay_tied():
    net, ids = network()
    traced, kept = trace(net, ids), [0, 3, 4, 7]
    small = apply(net, traced, Plan({"embed": kept}))
    assert small.out.weight is small.embed.weight and small.out.weight.shape == (11, 4)
    assert net.out.weight is net.embed.weight and net.out.weight.shape == (11, 8)
    by_hand = copy.deepcopy(net)
    for layer in (by_hand.mix, by_hand.norm):
        layer.weight = nn.Parameter(
            layer.weight[kept][:, kept] if layer.weight.ndim == 2 else layer.weight[kept]
        )
        layer.bias = nn.Parameter(layer.bias[kept])
    by_hand.embed.weight = by_hand.out.weight = nn.Parameter(net.embed.weight[:, kept])
    by_hand.norm.normalized_shape = (4,)
    torch.testing.assert_close(small(ids), by_hand(ids))
    cost = CostModel(net, traced)
    assert cost({}) == count(net, ids) and cost({"embed": 4}) == count(small, ids)


def test_a_narrowed_network_with_tied_embeddings_reloads_with_the_tie(tmp_path):
    net, ids = network()
    step = prune(net, ids, Budget(params="50%"), score="l2")
    save(tmp_path / "small.pt", step.model)
    loaded = load(tmp_path / "small.pt", factory=Language)
    assert loaded.out.weight is loaded.embed.weight
    assert torch.equal(loaded(ids), step.model(ids))


def test_layers_that_lose_different_elements_of_a_shared_weight_are_skipped():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    net[2].weight = net[0].weight
    traced = trace(net, torch.randn(2, 6))
    assert not traced.groups and "untie them" in traced.skipped["0"] and "untie them" in traced.skipped["2"]
