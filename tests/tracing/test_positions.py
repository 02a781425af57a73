"""Channels that a model's code takes by position: attributes follow them, or they are skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning import Budget, Plan, prune, trace
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick


class Takes(nn.Module):
    """Two convolutions that read slices of the output of a third one."""

    def __init__(self, pieces, width, first, second, **attributes):
        super().__init__()
        self.pieces = pieces
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.one, self.two = nn.Conv2d(first, 6, 3, padding=1), nn.Conv2d(second, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)
        for name, value in attributes.items():
            setattr(self, name, value)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        one, two, *rest = self.pieces(self, self.norm(self.stem(x)).relu())
        return self.head((self.one(one) + self.two(two) + sum(rest)).relu()).mean((2, 3))


def made(*arguments, **attributes):
    torch.manual_seed(0)
    return Takes(*arguments, **attributes).eval()


FOLLOWED = {
    "slices": (made(lambda s, x: (x[:, : s.k], x[:, s.k :]), 12, 5, 7, k=5), {"k"}),
    "from the end": (made(lambda s, x: (x[:, -s.k :], x[:, : -s.k]), 12, 5, 7, k=5), {"k"}),
    "narrow": (
        made(lambda s, x: (x.narrow(1, 0, s.k), x.narrow(1, s.k, len(x[0]) - s.k)), 12, 5, 7, k=5),
        {"k"},
    ),
    "two sizes": (made(lambda s, x: x.split([s.k, s.m], 1), 12, 5, 7, k=5, m=7), {"k", "m"}),
    "a list": (made(lambda s, x: x.split(s.sizes, 1), 18, 5, 7, sizes=[5, 7, 6]), {"sizes"}),
    "three slices": (
        made(lambda s, x: (x[:, : s.k], x[:, s.k : s.k + s.m], x[:, s.k + s.m :]), 18, 5, 7, k=5, m=7),
        {"k", "m"},
    ),
    "shares of the input": (
        made(lambda s, x: (x[:, : len(x[0]) // 3], x[:, len(x[0]) // 3 :]), 12, 4, 8),
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWED)
def test_positions_from_attributes_or_computed_sizes_follow_the_widths(case):
    model, attributes = FOLLOWED[case]
    images, others = torch.randn(2, 3, 8, 8), ["one", "two", "head"]
    traced = trace(model, images, others)
    assert {size.attribute for size in traced.sizes} == attributes and "stem" not in traced.skipped
    half = sum(group.channels for group in traced.groups.values()) // 2
    step = prune(model, images, Budget(channels=half), score="l2", ignored=others)
    assert step.model.stem.out_channels <= model.stem.out_channels - half and step.difference < 1e-5
    assert step.model(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("pieces", "width", "first", "second", "k"),
    [
        (lambda s, x: (x[:, :4], x[:, 4:]), 8, 4, 4, 0),
        (lambda s, x: (x[:, :4], x[:, 4:]), 8, 4, 4, 4),  # an attribute with the same value by chance
        (lambda s, x: (x[:, :4].relu(), torch.cat(x.split(4, 1)[::-1], 1)), 8, 4, 8, 0),
        (lambda s, x: (x[:, 1:6], x[:, 3:]), 8, 5, 5, 0),
        (lambda s, x: (x[:, : int(0.4 * len(x[0]))], x[:, int(0.4 * len(x[0])) :]), 10, 4, 6, 0),
    ],
)
def test_channels_at_constant_positions_are_not_pruned(pieces, width, first, second, k):
    model, images = made(pieces, width, first, second, k=k), torch.randn(2, 3, 8, 8)
    traced = trace(model, images)
    assert "stem" not in traced.groups and not traced.sizes
    assert "in attributes of the module" in traced.skipped.get("stem", "in attributes of the module")
    assert prune(model, images, Budget(macs="90%"), score="l2").difference < 1e-5


@pytest.mark.parametrize("share", [16, 0])
def test_an_empty_slice_of_channels_holds_none(share):
    class Partial(nn.Module):
        """Treats a share of the channels differently: here all of them, or none."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
            self.last = nn.Conv2d(16, 3, 1)

        def forward(self, x):
            x = torch.relu(self.first(x))
            x = torch.cat((torch.tanh(x[:, :share]), x[:, share:]), 1)
            return self.last(torch.relu(self.second(x)))

    net, images = Partial().eval(), torch.randn(2, 3, 8, 8)
    step = prune(net, images, Budget(macs="50%"), score="l2", widths={"first": 7, "second": 5})
    assert step.model.first.out_channels == 7 and step.difference < 1e-4


def test_interleaved_parts_lose_neighbors_together():
    """The gate and the value of a channel lie side by side, as in the experts of GPT-OSS."""

    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 3)

        def forward(self, x):
            both = self.up(x)
            return self.down(both[..., ::2].sigmoid() * both[..., 1::2])

    torch.manual_seed(0)
    net, x = Interleaved(), torch.randn(4, 5)
    traced = trace(net, x)
    assert traced.widths == {"up": 8}
    small = apply(net, traced, Plan({"up": (1, 4, 6)}))
    gate, value = (net.up.weight[i::2][[1, 4, 6]] for i in (0, 1))
    a, b = (net.up.bias[i::2][[1, 4, 6]] for i in (0, 1))
    hidden = (x @ gate.T + a).sigmoid() * (x @ value.T + b)
    torch.testing.assert_close(small(x), hidden @ net.down.weight[:, [1, 4, 6]].T + net.down.bias)
