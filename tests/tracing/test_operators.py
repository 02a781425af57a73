"""How channels are followed operator by operator: which pass them on, and which tie them, with the reason."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from pruning import trace
from pruning.graph.plan import Plan
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify
from pruning.tracing.cures import with_cure
from pruning.utils.compare import TOLERANCE

pytestmark = pytest.mark.quick


class Case(nn.Module):
    """A stem of 8 channels, an operation on them, and a head."""

    def __init__(self, middle, width=8, head=None):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 1), middle
        self.extra = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(width, 3) if head is None else head

    def forward(self, x):
        x = self.middle(self, torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)) if x.ndim == 4 else x)


def fixed(self, x):
    return x + torch.arange(8.0, device=x.device)[:, None, None]


def filled(self, x):
    return x + torch.ones(8, 1, 1, device=x.device)


def written(self, x):
    mask = torch.ones(x.shape[1], device=x.device)
    mask[0] = 0
    return x * mask[:, None, None]


def over_channels(self, x):
    return self.extra(x.softmax(1))


def by_position(self, x):
    return self.extra(torch.cat([x[:, 3:], x[:, :3]], 1))


def rolled(self, x):
    return self.extra(x.roll(1, 1))


def hard_split(self, x):
    left, right = x.split([4, 4], 1)
    return self.extra(torch.cat([left, right], 1))


def added_to_channels(self, x):
    places = torch.tensor([0, 1] * 4, device=x.device)
    return self.extra(x.new_zeros(x.shape).index_add(1, places, x))


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (fixed, "fixed size"),
        (filled, "tied to its width"),
        (written, "fixed size"),
        (over_channels, "over its channels"),
        (by_position, "by position"),
        (rolled, "by position"),
        (hard_split, "tied to its width"),
        (added_to_channels, "index_add"),
    ],
)
def test_channels_that_cannot_be_pruned_are_skipped_with_the_reason(middle, reason):
    traced = trace(Case(middle), nets.images())
    assert "stem" not in traced.groups and reason in traced.skipped["stem"]
    assert "to let it be pruned" in traced.skipped["stem"]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("Net combines it (add) with a tensor of fixed size", "torch.zeros"),
        ("Net uses it in aten::fft, an operation without a rule", "register_operator"),
        ("ignored, as asked by '0'", "--ignore"),
        ("something that nobody foresaw", "to let it be pruned"),
    ],
)
def test_every_reason_names_a_cure_once(reason, told):
    cured = with_cure(reason)
    assert cured.startswith(reason) and told in cured.removeprefix(reason)
    assert with_cure(cured) == cured


def halves(self, x):
    left, right = x.chunk(2, 1)
    return self.extra(torch.cat([right, left * right.sigmoid()], 1))


def excited(self, x):
    return x * self.extra(x.mean((2, 3), keepdim=True)).sigmoid()


def masked(self, x):
    return self.extra(x * x.mean(2, keepdim=True).sigmoid().masked_fill(x[:, :, :1] < 0, 0.5))


def padded(self, x):
    return self.extra(nn.functional.interpolate(nn.functional.pad(x, (1, 1)), scale_factor=2))


def stacked(self, x):
    return torch.stack([x, self.extra(x)]).amax(0)


def windows(self, x):
    n, c, h, w = x.shape
    x = x.view(n, c, h // 7, 7, w // 7, 7).permute(0, 2, 4, 3, 5, 1).reshape(-1, 49, c)
    return x.roll(1, 1).mean(1).reshape(n, -1, c).transpose(1, 2)[..., None]


def twice(self, x):
    return torch.relu(self.extra(torch.relu(self.extra(x))))


def gated(self, x):
    return nn.functional.glu(torch.cat([x, self.extra(x)], 1), 1)


def accumulated(self, x):
    total = x.new_zeros(len(x), self.extra.out_channels, *x.shape[2:])
    for _ in range(2):
        total += self.extra(x)
    return total


def remembered(self, x):
    state = x.new_zeros(x.shape)
    for _ in range(2):
        state = torch.tanh(x + self.extra(state))
    return state


def restyled(self, x):
    style = self.extra(x).mean((2, 3), keepdim=True)
    return nn.functional.instance_norm(input=x) * style


def assigned(self, x):
    moved = torch.zeros_like(x)
    moved[:, :, 1:] = x[:, :, :-1]
    return self.extra(moved)


def assigned_beside(self, x):
    moved = torch.zeros(x.shape, device=x.device)
    moved[:, :, 1:] = x[:, :, :-1]
    return self.extra(moved)


def assigned_parts(self, x):
    both = torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:], device=x.device)
    both[:, : x.shape[1]], both[:, x.shape[1] :] = x, torch.relu(x)
    first, second = both.chunk(2, 1)
    return self.extra(first * second)


def spread_out(self, x):
    wide = torch.empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], device=x.device).zero_()
    wide[:, :, ::2, ::2] = x
    return self.extra(wide)


def assigned_rows(self, x):
    rows = x.permute(0, 2, 3, 1)
    moved = torch.zeros_like(rows)
    moved[torch.arange(len(x), device=x.device).flip(0)] = rows
    return self.extra(moved.permute(0, 3, 1, 2))


def added_by_index(self, x):
    places = torch.tensor([0, 1] * (x.shape[2] // 2), device=x.device)
    total = x.new_zeros(len(x), x.shape[1], 2, x.shape[3]).index_add(2, places, x)
    return self.extra(total)


def scattered(self, x):
    places = torch.arange(x.shape[2], device=x.device)[:, None].remainder(3).expand_as(x)
    return self.extra(torch.zeros_like(x).scatter_add(2, places, x))


def largest(self, x):
    values, places = x.flatten(2).topk(3, -1)
    return self.extra(values[..., None]) + x.flatten(2).gather(2, places)[..., None]


def ordered(self, x):
    return self.extra(x.sort(2)[0])


FOLLOWED = [
    assigned,
    assigned_beside,
    assigned_parts,
    spread_out,
    assigned_rows,
    added_by_index,
    scattered,
    largest,
    ordered,
    halves,
    excited,
    masked,
    padded,
    stacked,
    windows,
    twice,
    gated,
    accumulated,
    remembered,
    restyled,
]


@pytest.mark.parametrize("middle", FOLLOWED)
def test_channels_are_followed_through_operators(middle):
    net, images = Case(middle).eval(), nets.images()
    traced = trace(net, images)
    assert "stem" in traced.groups, traced.skipped
    plan = Plan({name: tuple(range(group.channels - 1)) for name, group in traced.groups.items()})
    assert verify(net, apply(net, traced, plan), traced, plan, images) <= TOLERANCE
