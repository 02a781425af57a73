"""The prefix cache: what it skips, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pruning.planning.prefix_cache import PrefixCache

pytestmark = pytest.mark.quick


class Block(nn.Module):
    """A residual block in which one activation runs twice, in place."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.norm(self.one(x)))
        y = self.two(y)
        x += y
        return self.act(x)


class Net(nn.Module):
    """Two blocks; the first input is changed in place, and read again at the end."""

    def __init__(self, reads_input):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block())
        self.reads_input = reads_input

    def forward(self, x):
        x.mul_(2)
        y = self.blocks(self.stem(x)).mean((2, 3))
        return y + x.mean() if self.reads_input else y


class Convolutions(TorchFunctionMode):
    """Count the convolutions that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is nn.functional.conv2d
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", ["stem", "blocks.0.two", "blocks.1.one", "blocks.1.two"])
def test_layers_before_the_changed_one_do_not_run_and_outputs_are_the_same(layer):
    torch.manual_seed(0)
    net = Net(reads_input=False).eval()
    batches = [torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4)]
    kept = [x.clone() for x in batches]
    order = ["stem", "blocks.0.one", "blocks.0.two", "blocks.1.one", "blocks.1.two"]
    cache = PrefixCache(net, {layer}, batches)
    assert {name for name in order if name in cache.unchanged} == set(order[: order.index(layer)])
    for change in (0.0, 0.5):
        with torch.no_grad():
            net.get_submodule(layer).weight.add_(change)
            for number, x in enumerate(batches):
                wanted = net(x.clone())
                given = x.clone()
                with Convolutions() as counted, cache.replayed(number):
                    found = net(given)
                assert torch.equal(found, wanted)
                assert counted.count == len(order) - order.index(layer)
    assert all(map(torch.equal, batches, kept))


def test_nothing_is_skipped_where_that_would_change_the_outputs():
    """The inputs that the prefix changes are read after it: a replayed prefix does not change them."""
    net, x = Net(reads_input=True).eval(), torch.randn(2, 3, 4, 4)
    cache = PrefixCache(net, {"blocks.1.two"}, [x])
    with torch.no_grad(), Convolutions() as counted:
        wanted = net(x.clone())
        given = x.clone()
        with cache.replayed(0):
            assert torch.equal(net(given), wanted)
    assert counted.count == 10
