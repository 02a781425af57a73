"""Whole experts of mixtures, with the rows of their router."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning import PruningError, load, save
from pruning.surgery import expert_usage, mixtures, without_experts

pytestmark = pytest.mark.quick


class Mixed(nn.Module):
    """Four experts in a list, of which each token uses two; the router is a linear layer or a parameter."""

    def __init__(self, experts=4):
        super().__init__()
        self.num_experts = experts
        self.gate = nn.Linear(6, experts)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(experts)])

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        used = nn.functional.one_hot(chosen, self.num_experts).sum(1)
        made = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (chosen == i)).sum(-1, keepdim=True)
            made = made + used[:, i : i + 1] * share * expert(x)
        return made


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), Mixed(), nn.Linear(6, 3)), torch.randn(40, 5)


def test_tokens_choose_among_the_experts_that_are_kept(tmp_path):
    net, x = network()
    assert {name: (m.experts, m.chosen) for name, m in mixtures(net, x).items()} == {"1": (4, 2)}
    small = without_experts(net, {"1": [0, 3, 2]}, x)
    oracle, _ = network()
    with torch.no_grad():  # an expert that is never chosen
        oracle[1].gate.weight[1], oracle[1].gate.bias[1] = 0, -1e9
    torch.testing.assert_close(small(x), oracle(x))
    assert len(small[1].experts) == small[1].num_experts == small[1].gate.out_features == 3
    save(tmp_path / "small.pth", small)
    assert torch.equal(load(tmp_path / "small.pth", lambda: network()[0])(x), small(x))


def test_usage_is_the_share_of_choices():
    net, x = network()
    chosen = net[1].gate(net[0](x)).topk(2).indices
    expected = torch.stack([(chosen == i).sum() for i in range(4)]) / chosen.numel()
    torch.testing.assert_close(expert_usage(net, [x[:15], x[15:]])["1"], expected.double())


def test_experts_that_cannot_go_are_named():
    net, x = network()
    with pytest.raises(PruningError, match="1 expert would be left, and each token uses 2"):
        without_experts(net, {"1": [0]}, x)
    with pytest.raises(PruningError, match="'0' is no mixture of experts of this model; its mixtures: 1"):
        without_experts(net, {"0": [0]}, x)
    with pytest.raises(PruningError, match="numbers of experts from 0 to 3"):
        without_experts(net, {"1": [0, 4]}, x)
