"""Tokens, kernels and states: parameters that code reads in other ways than a layer does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import Plan, trace
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick

WIDTH = 8


def zeroed(net: nn.Module, dropped: list[int], outputs: dict[str, int]) -> nn.Module:
    """Return a copy whose parameters are 0 at the dropped channels, along one dimension each."""
    dense = copy.deepcopy(net)
    with torch.no_grad():
        for name, dim in outputs.items():
            dense.get_parameter(name).index_fill_(dim, torch.tensor(dropped), 0)
    return dense


class Masked(nn.Module):
    """Tokens behind an embedding; a learned token takes the place of those that are masked, if any are."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(5, WIDTH), nn.Parameter(torch.randn(shape))
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.inner, self.last = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU()), nn.Linear(6, 2)

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.view(-1), x)
        return self.last(self.inner(torch.cat([self.registers.expand(len(x), -1, -1), x], 1).relu()))


@pytest.mark.parametrize("shape", [(WIDTH,), (1, 1, WIDTH), (1, WIDTH)])
def test_a_token_that_the_inputs_do_not_reach_goes_with_the_channels_beside_it(shape):
    torch.manual_seed(0)
    net, x = Masked(shape), torch.randn(2, 4, 5)
    found = trace(net, x)
    assert found.widths == {"embed": WIDTH, "inner.0": 6}
    small = apply(net, found, Plan({"embed": (0, 2, 3, 7)}))
    dim = len(shape) - 1
    outputs = {"embed.weight": 0, "embed.bias": 0, "registers": 2, "mask_token": dim}
    dense, masked = zeroed(net, [1, 4, 5, 6], outputs), torch.rand(2, 4) < 0.5
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small(x, masked), dense(x, masked), rtol=1e-4, atol=1e-5)
    assert small.mask_token.shape == (*shape[:-1], 4) and small.registers.shape == (1, 3, 4)


def test_a_token_whose_size_two_layers_beside_it_have_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.token = nn.Parameter(torch.randn(8))

        def forward(self, x, first=None):
            return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    found = trace(Two(), torch.randn(2, 5))
    assert not found.groups and found.skipped["first"].startswith("token does not run on the example inputs")


class Scan(nn.Module):
    """A selective scan: a causal convolution whose kernel code reads, and states of channels times places."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 2 * WIDTH), nn.Linear(WIDTH, 2)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        self.select, self.step = nn.Linear(WIDTH, 2 + 2 * 4), nn.Linear(2, WIDTH)
        self.log, self.skip = nn.Parameter(torch.rand(WIDTH, 4)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.into(x).transpose(1, 2).chunk(2, 1)
        kernel = self.conv.weight.view(x.shape[1], -1)
        x = F.conv1d(F.pad(x, (2, 0)), kernel.unsqueeze(1), self.conv.bias, groups=x.shape[1]).relu()
        low, into, read = self.select(x.transpose(1, 2)).split([2, 4, 4], -1)
        step = F.softplus(self.step(low)).transpose(1, 2)
        decay = torch.exp(-self.log.exp()[None, :, None] * step[..., None])
        added = step[..., None] * into[:, None] * x[..., None]
        state, outputs = torch.zeros(len(x), x.shape[1], 4), []
        for i in range(x.shape[2]):
            state = decay[:, :, i] * state + added[:, :, i]
            outputs.append((state @ read[:, i, :, None])[..., 0])
        x = torch.stack(outputs, -1) + x * self.skip[:, None]
        return self.out((x * gate.sigmoid()).transpose(1, 2))


def test_the_channels_of_a_selective_scan_are_narrowed():
    torch.manual_seed(0)
    net, x = Scan(), torch.randn(2, 5, 5)
    found = trace(net, x)
    assert found.widths == {"into": WIDTH}
    small = apply(net, found, Plan({"into": (0, 1, 4, 5, 6)}))
    like = copy.deepcopy(net)
    with torch.no_grad():  # 0 behind the convolution, and in what the states put out
        like = zeroed(like, [2, 3, 7], {"conv.weight": 0, "conv.bias": 0, "out.weight": 1})
        for images in (x, torch.randn(1, 7, 5)):
            torch.testing.assert_close(small(images), like(images), rtol=1e-4, atol=1e-5)
    assert small.conv.weight.shape == (5, 1, 3) and small.log.shape == (5, 4)


class Positions(nn.Embedding):
    """An embedding that is given the number of positions alone, as in Marian."""

    def forward(self, count: int) -> Tensor:
        return super().forward(torch.arange(count))


class Sines(nn.Module):
    def __init__(self, frozen: bool):
        super().__init__()
        self.embed, self.positions = nn.Linear(5, WIDTH), Positions(9, WIDTH)
        self.table = nn.Parameter(torch.randn(1, 9, WIDTH))
        self.positions.weight.requires_grad_(not frozen)
        self.table.requires_grad_(not frozen)
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.embed(x) + self.positions(x.shape[1]) + self.table[:, : x.shape[1]]).relu())


@pytest.mark.parametrize("frozen", [True, False])
def test_tables_that_are_not_trained_are_narrowed_with_a_layer_that_is(frozen):
    torch.manual_seed(0)
    net, x = Sines(frozen), torch.randn(2, 4, 5)
    found = trace(net, x)
    assert found.widths == {"embed": WIDTH}
    small = apply(net, found, Plan({"embed": (1, 2, 5)}))
    dense = zeroed(net, [0, 3, 4, 6, 7], {"last.weight": 1})
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    assert small.positions.weight.requires_grad is small.table.requires_grad is not frozen
    net.embed.requires_grad_(False)
    assert trace(net, x).widths == {}
