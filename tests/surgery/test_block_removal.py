"""Whole blocks of a transformer: deleted from their list, with the numbers that they hold of themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, load, prune, save, trace
from pruning.load_pruned import load_pruned
from pruning.surgery import block_influence, removable, without_layer

pytestmark = pytest.mark.quick


class Block(nn.Module):
    """Takes the stream by keyword, returns a tuple, and keeps what it has seen under its number."""

    def __init__(self, number: int, post_norm: bool):
        super().__init__()
        self.inner = nn.Module()
        self.inner.number, self.post_norm = number, post_norm
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, shift, hidden, cache=None):
        if cache is not None:
            assert self.inner.number == len(cache)
            cache.append(hidden)
        if self.post_norm:
            return self.norm(hidden + self.down(torch.relu(self.up(hidden + shift)))), None
        return hidden + self.down(torch.relu(self.up(self.norm(hidden) + shift))), None


class Net(nn.Module):
    def __init__(self, post_norm=False):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Block(i, post_norm) for i in range(4)])

    def forward(self, x):
        hidden, cache = self.embed(x), []
        for block in self.blocks:
            hidden = block(0.5, hidden=hidden, cache=cache)[0]
        return self.head(hidden)


def network(post_norm=False):
    torch.manual_seed(0)
    return Net(post_norm).eval(), torch.randn(7, 5)


def shorter(net, numbers):
    """Compute the model without blocks from a list that was cut by hand."""
    small = copy.deepcopy(net)
    small.blocks = nn.ModuleList([block for i, block in enumerate(small.blocks) if i not in numbers])
    for i, block in enumerate(small.blocks):
        block.inner.number = i
    return small


@pytest.mark.parametrize("post_norm", [False, True])
def test_blocks_have_the_names_of_the_dense_model_and_reload(post_norm, tmp_path):
    net, x = network(post_norm)
    step = prune(
        net, x, Budget(params="90%"), score="l2", remove=["blocks.1", "blocks.2"], widths={"*": "100%"}
    )
    assert step.plan.removed == ("blocks.1", "blocks.2") and len(net.blocks) == 4
    expected = shorter(net, (1, 2))(x)
    assert torch.equal(step.model(x), expected)
    assert [block.inner.number for block in step.model.blocks] == [0, 1]
    assert step.after.params == sum(p.numel() for p in shorter(net, (1, 2)).parameters())
    save(tmp_path / "small.pth", step.model)
    assert torch.equal(load(tmp_path / "small.pth", lambda: Net(post_norm))(x), expected)
    again = load_pruned(tmp_path / "small.pth", lambda: Net(post_norm))
    left = removable(again, trace(again, x), x)
    assert [name for name, layer in left.items() if layer.block] == ["blocks.0", "blocks.3"]
    last = without_layer(again, trace(again, x), left["blocks.3"])
    assert torch.equal(last(x), shorter(net, (1, 2, 3))(x))


def test_blocks_that_the_code_counts_on_cannot_go():
    class Fixed(Net):
        def forward(self, x):
            hidden = self.embed(x)
            for i in (0, 1, 2, 3):
                hidden = self.blocks[i](0.5, hidden)[0]
            return self.head(hidden)

    net, x = Fixed(), torch.randn(2, 5)
    assert not any(layer.block for layer in removable(net, trace(net, x), x).values())
    with pytest.raises(PruningError, match=r"layer 'blocks.1' cannot be removed from Fixed"):
        prune(net, x, Budget(params="90%"), score="l2", remove=["blocks.1"])


def test_layers_without_a_shortcut_and_ignored_blocks_stay():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    net, x = Plain(), torch.randn(2, 6)
    assert not any(layer.block for layer in removable(net, trace(net, x), x).values())
    net, x = network()
    found = removable(net, trace(net, x, ["blocks.2.up"]), x)
    assert [name for name, layer in found.items() if layer.block] == ["blocks.0", "blocks.1", "blocks.3"]


def test_block_influence_is_the_mean_of_one_minus_the_cosine():
    net, x = network()
    with torch.no_grad():
        net.blocks[1].down.weight.zero_()
        net.blocks[1].down.bias.zero_()
    found = block_influence(net, ["blocks.0", "blocks.1"], [x[:4], x[4:]])
    before = net.embed(x).double()
    after = net.blocks[0](0.5, net.embed(x))[0].double()
    cosine = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
    assert found["blocks.0"] == pytest.approx(1 - cosine.mean().item(), abs=1e-6)
    assert found["blocks.1"] == pytest.approx(0, abs=1e-6) and min(found, key=found.get) == "blocks.1"
