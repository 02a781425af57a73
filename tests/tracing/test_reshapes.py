"""Reshapes that mix channels with positions: what is pruned computes the same at other image sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning import Budget, prune, trace
from pruning.tracing import passes as tracing_passes
from pruning.tracing.reshapes import Reshape, Reshapes, form_of
from pruning.tracing.ties import compact
from pruning.utils.modules import submodule

pytestmark = pytest.mark.quick


class Attention(nn.Module):
    """Position attention between convolutions; subclasses say how its result becomes an image again.

    Args:
        width: channels. keys: channels of the two factors of the map. residual: whether the input is added.
    """

    def __init__(self, width=8, keys=4, residual=True):
        super().__init__()
        self.width, self.residual = width, residual
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.top, self.center = nn.Conv2d(width, keys, 1), nn.Conv2d(width, keys, 1)
        self.bottom = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def image(self, values, b, c, h, w):
        raise NotImplementedError

    def forward(self, x):
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        weights = torch.softmax(self.center(x).flatten(2).transpose(1, 2) @ self.top(x).flatten(2), -1)
        values = weights @ self.bottom(x).flatten(2).transpose(1, 2)  # (b, hw, c)
        found = self.image(values, b, c, h, w)
        return self.head(torch.relu(self.out(x + found if self.residual else found)))


class Mixed(Attention):
    def image(self, values, b, c, h, w):
        return values.reshape(b, c, h, w)


class MixedByAttribute(Attention):
    def image(self, values, b, c, h, w):
        return values.contiguous().view(b, self.width, h, w)


class MixedInferred(Attention):
    def image(self, values, b, c, h, w):
        return values.reshape(b, -1, h, w)


class MixedInTwoSteps(Attention):
    def image(self, values, b, c, h, w):
        return values.reshape(b, c, h * w).unflatten(2, (h, w))


class MixedFlat(Attention):
    def image(self, values, b, c, h, w):
        return values.flatten().view(b, c, h, w)


class Transposed(Attention):
    def image(self, values, b, c, h, w):
        return values.transpose(1, 2).reshape(b, -1, h, w)


class Permuted(Attention):
    def image(self, values, b, c, h, w):
        return values.view(b, h, w, -1).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """Images whose features are taken for tokens, or tokens for heads, without a transposition."""

    def __init__(self, form):
        super().__init__()
        self.stem, self.mlp = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.out, self.head, self.form = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 2, 1), form

    def forward(self, x):
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        if self.form == "tokens":  # (b, c, h, w) -> (b, hw, c)
            y = self.mlp(x.reshape(b, h * w, c)).transpose(1, 2).reshape(b, -1, h, w)
        elif self.form == "heads":  # (b, hw, c) -> (b, 2, hw, c / 2)
            y = self.mlp(x.flatten(2).transpose(1, 2)).reshape(b, 2, h * w, -1)
            y = y.transpose(1, 2).reshape(b, h * w, -1).transpose(1, 2).reshape(b, -1, h, w)
        elif self.form == "rows":  # (b, h, w, c) -> (b, w, c, h)
            y = self.mlp(x.permute(0, 2, 3, 1)).reshape(b, w, c, h).permute(0, 2, 3, 1)
        else:  # the batch along the second dimension, as in `nn.MultiheadAttention`: no channels are mixed
            y = self.mlp(x.flatten(2).permute(2, 0, 1))
            y = y.reshape(h * w, b * 2, -1).transpose(0, 1)
            y = y.transpose(0, 1).reshape(h * w, b, -1).permute(1, 2, 0).reshape(b, -1, h, w)
        return self.head(torch.relu(self.out(y)))


MIXED = [Mixed, MixedByAttribute, MixedInferred, MixedInTwoSteps, MixedFlat]
CLEAN = [Transposed, Permuted]


def zeroed(model, plan, traced):
    """Return a copy whose dropped channels are zero where layers make them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, keep in plan.keep.items():
            for member in traced.groups[name].side("out"):
                drop = member.index[~torch.isin(member.channel, torch.tensor(keep))]
                layer = submodule(model, member.layer)
                layer.weight[drop] = 0
                layer.bias[drop] = 0
    return model


def require_equal_at(net, size, others):
    """Prune at one size, compare with the zeroed network at others; return the widths that could go."""
    inputs = torch.randn(2, 3, *size)
    traced = trace(net, inputs)
    step = prune(net, inputs, Budget(channels="50%"), score="l2") if traced.groups else None
    for other in [size, *others] if step else []:
        x = torch.randn(2, 3, *other)
        with torch.no_grad():
            expected, found = zeroed(net, step.plan, step.trace)(x), step.model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return traced


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("form", MIXED)
@pytest.mark.parametrize(
    ("width", "size", "others"),
    [
        (8, (2, 2), [(3, 5), (4, 4)]),
        (8, (1, 1), [(2, 2), (3, 3)]),
        (16, (4, 4), [(4, 6), (3, 3)]),  # as many channels as positions
        (4, (4, 4), [(5, 5), (8, 6)]),  # more positions than channels
        (8, (4, 2), [(2, 4), (3, 5)]),
        (6, (2, 4), [(3, 5), (4, 4)]),  # neither divides the other
    ],
)
def test_channels_that_a_reshape_mixes_with_positions_stay(form, residual, width, size, others):
    torch.manual_seed(0)
    net = form(width, residual=residual).eval()
    traced = require_equal_at(net, size, others)
    pruned = {member.layer for group in traced.groups.values() for member in group.side("out")}
    assert "bottom" not in pruned and {"out", "top"} <= pruned
    assert not residual or "stem" not in pruned


@pytest.mark.parametrize("form", MIXED)
@pytest.mark.parametrize("size", [(2, 2), (1, 1)])
def test_the_reason_names_the_reshape(form, size):
    skipped = trace(form(16).eval(), torch.randn(2, 3, *size)).skipped
    assert f"({form.__name__}) reshapes it so that channels mix with positions" in skipped["stem"]


@pytest.mark.parametrize("form", CLEAN)
@pytest.mark.parametrize("size", [(2, 2), (1, 1), (4, 4), (2, 4)])
def test_transposed_channels_are_pruned(form, size):
    torch.manual_seed(0)
    traced = require_equal_at(form(16, residual=False).eval(), size, [(3, 5), (4, 4)])
    assert "bottom" in {name.partition("/")[0] for name in traced.groups}


@pytest.mark.parametrize("form", ["tokens", "heads", "rows"])
@pytest.mark.parametrize("size", [(2, 2), (1, 1), (4, 4), (2, 4), (8, 8)])
def test_features_taken_for_tokens_stay(form, size):
    torch.manual_seed(0)
    require_equal_at(Tokens(form).eval(), size, [(3, 5), (4, 4), (6, 2)])


def test_heads_beside_the_batch_are_pruned():
    torch.manual_seed(0)
    traced = require_equal_at(Tokens("batch").eval(), (4, 4), [(3, 5), (2, 2)])
    assert "mlp" in {name.partition("/")[0] for name in traced.groups}


class Table(nn.Module):
    """A table per head that is reshaped by dropping a dimension of size 1, and added to what is read."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2, 1)
        self.table = nn.Parameter(torch.randn(width, 5, 1))

    def forward(self, x):
        table = self.table.reshape(len(self.table), 5).mean(1)
        return self.head(torch.relu(self.stem(x)) + table[:, None, None])


def followed(monkeypatch, net):
    """Return the trace of a network, and how often its channels were followed through a pass."""
    passes = []
    follow = tracing_passes._follow
    monkeypatch.setattr(tracing_passes, "_follow", lambda *a, **k: passes.append(0) or follow(*a, **k))
    return trace(net, torch.randn(1, 3, 8, 8)), len(passes)


def test_shapes_alone_clear_a_reshape_of_a_table(monkeypatch):
    doubtful = []
    check = Reshapes.are_same_at
    monkeypatch.setattr(
        Reshapes, "are_same_at", lambda *args: doubtful.append(found := check(*args)) or found
    )
    traced, passes = followed(monkeypatch, Table())
    assert traced.widths == {"stem": 8} and doubtful == [True, True]
    assert passes == followed(monkeypatch, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)))[1]


@pytest.mark.parametrize(
    ("first", "here", "there", "same"),
    [
        ((1, 8, 1, 1), ((1, 8, 5, 1), (1, 8, 5)), ((1, 8, 9, 1), (1, 8, 9)), True),
        ((1, 8, 1, 1), ((1, 8, 5, 1), (1, 8, 5)), ((1, 8, 9, 2), (1, 8, 18)), True),
        (
            (1, 1, 8),
            ((1, 9, 8), (1, 8, 3, 3)),
            ((1, 16, 8), (1, 8, 4, 4)),
            False,
        ),  # channels mix with positions
        ((1, 8, 1, 1), ((1, 8, 5, 1), (1, 8, 5)), ((1, 9, 8, 1), (1, 9, 8)), False),  # channels lie elsewhere
    ],
)
def test_a_reshape_is_compared_by_where_channels_go(first, here, there, same):
    channels = torch.arange(8).reshape(first)
    form = form_of(compact(channels.expand(here[0]).reshape(here[1])))
    reshape = Reshape(channels, "net", form, here, True)
    assert reshape.is_same_at(*here)
    assert reshape.is_same_at(*there) is same
