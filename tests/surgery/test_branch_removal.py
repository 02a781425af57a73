"""Residual branches: the attention or the MLP of a block alone is removed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pruning import Budget, load, prune, save, trace
from pruning.load_pruned import NoBranch
from pruning.surgery.layer_removal import removable, without_layer

pytestmark = pytest.mark.quick

WIDTH = 8


class Attention(nn.Module):
    """Attention with one head, which returns a tuple, as in transformers, and a position beside it."""

    def __init__(self, index: int):
        super().__init__()
        self.qkv, self.out, self.layer_idx = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), index

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(hidden).chunk(3, -1)
        shares = (scale * q @ k.transpose(-2, -1)).softmax(-1)
        return self.out(shares @ v), shares


class Block(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.gamma = Attention(index), nn.Parameter(torch.rand(WIDTH))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor, scale: float) -> Tensor:
        x = x + self.gamma * self.attention(hidden=self.norm1(x), scale=scale)[0]
        return self.mlp(self.norm2(x)) + x


class Net(nn.Module):
    """Blocks behind an embedding that is no branch, though positions are added to it."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.positions, self.last = nn.Parameter(torch.randn(5, WIDTH)), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList([Block(i) for i in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, 0.5)
        return self.last(x.mean(1))


def without(net: Net, *branches: str) -> Net:
    """Return a copy whose branches put out 0, as their last layers have no weights."""
    dense = copy.deepcopy(net)
    with torch.no_grad():
        for name in branches:
            branch = dense.get_submodule(name)
            last = branch.out if isinstance(branch, Attention) else branch[2]
            last.weight.zero_(), last.bias.zero_()
    return dense.eval()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_attention_and_mlp_of_each_block_are_branches(net):
    """The attention of the first block holds the number 0, by which a cache counts tokens, and stays."""
    x = torch.randn(2, 4, WIDTH)
    found = removable(net, trace(net, x), x)
    branches = {name: layer.branch.norm for name, layer in found.items() if layer.branch is not None}
    assert branches == {
        **{f"blocks.{i}.mlp": f"blocks.{i}.norm2" for i in range(3)},
        **{f"blocks.{i}.attention": f"blocks.{i}.norm1" for i in (1, 2)},
    }
    for name in ("blocks.1.attention", "blocks.2.mlp"):
        small = without_layer(net, trace(net, x), found[name])
        assert isinstance(small.get_submodule(name), NoBranch)
        for images in (x, torch.randn(3, 5, WIDTH)):
            torch.testing.assert_close(small(images), without(net, name)(images))
    assert (
        removable(net, trace(net, x, ["blocks.1.attention.out"]), x).keys().isdisjoint(["blocks.1.attention"])
    )


def test_branches_have_the_names_of_the_dense_model_and_reload(net, tmp_path):
    x, removed = torch.randn(2, 4, WIDTH), ["blocks.0", "blocks.2.attention", "blocks.1.mlp"]
    small = prune(net, x, Budget(params="100%"), score="l2", remove=removed).model
    dense = without(net, "blocks.2.attention", "blocks.1.mlp")
    del dense.blocks[0]
    torch.testing.assert_close(small(x), dense(x))
    narrow = prune(small, x, Budget(params="60%"), score="l2").model
    save(tmp_path / "small.pth", narrow, arguments={})
    again = load(tmp_path / "small.pth", Net)
    assert torch.equal(again(x), narrow.eval()(x))
    assert removable(again, trace(again, x), x).keys().isdisjoint(["blocks.2.attention", "blocks.1.mlp"])


def test_a_module_whose_code_reads_other_outputs_of_the_branch_is_kept():
    class Shares(Net):
        def forward(self, x):
            x, total = self.embed(x), 0.0
            for block in self.blocks:
                made, shares = block.attention(block.norm1(x))
                x, total = x + made, total + shares.square().mean((1, 2))
            return self.last(x.mean(1)) + total[:, None]

    net, x = Shares().eval(), torch.randn(2, 4, WIDTH)
    assert not [name for name, layer in removable(net, trace(net, x), x).items() if layer.branch]
