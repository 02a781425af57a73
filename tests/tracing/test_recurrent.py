"""Hidden units of recurrent layers: a group of their own, across gates, levels, directions and states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pruning
from pruning import Plan, trace
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel, count
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:LSTM with projections")]

KINDS = ("LSTM", "GRU", "RNN")


class Tagger(nn.Module):
    """A label for each step of two levels in two directions; `packed` takes lengths, `cells` projects."""

    def __init__(self, kind: str = "LSTM", levels: int = 2, packed: bool = False, cells: int = 0):
        super().__init__()
        sizes = {"hidden_size": cells, "proj_size": 6} if cells else {"hidden_size": 6}
        self.read = getattr(nn, kind)(
            5, num_layers=levels, batch_first=True, bidirectional=levels > 1, **sizes
        )
        self.head, self.packed = nn.Linear(12 if levels > 1 else 6, 4), packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.head(self.read(x)[0])
        packed = pack_padded_sequence(x, torch.tensor([2, 3]), batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.read(packed)[0], batch_first=True)[0])


class Translator(nn.Module):
    """The states of one layer start another; the first layer starts from zeros of a size of the module."""

    def __init__(self, cells: int = 0) -> None:
        super().__init__()
        sizes = {"hidden_size": cells, "proj_size": 6} if cells else {"hidden_size": 6}
        self.hidden, self.cells, self.encode = 6, cells, nn.LSTM(5, batch_first=True, **sizes)
        self.decode, self.head = nn.LSTM(5, batch_first=True, **sizes), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(1, len(x), self.hidden)
        cells = torch.zeros(1, len(x), self.cells) if self.cells else start
        _, state = self.encode(x, (start, cells))
        return self.head(self.decode(x, state)[0])


class Cells(nn.Module):
    """A cell that starts from no state, or from one that `start` makes for a batch and a hidden size."""

    def __init__(self, kind: str, start: Callable[[int, int], Tensor] | None = None):
        super().__init__()
        self.cell, self.head, self.start = getattr(nn, f"{kind}Cell")(5, 6), nn.Linear(6, 4), start

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.start is not None:
            state = self.start(len(x), self.cell.hidden_size)
            state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def networks():
    yield from ((f"{kind}-{n}", lambda kind=kind, n=n: Tagger(kind, n)) for kind in KINDS for n in (1, 2))
    yield from ((f"{kind}Cell", lambda kind=kind: Cells(kind)) for kind in KINDS)
    yield "refilled", lambda: Cells("GRU", lambda n, size: torch.empty(n, size).zero_())
    yield "refilled-states", lambda: Cells("LSTM", lambda n, size: torch.empty(n, size).fill_(0.5))
    yield "packed", lambda: Tagger(packed=True)
    yield "states", Translator
    yield from ((f"projected-{n}", lambda n=n: Tagger(levels=n, cells=12 - n)) for n in (1, 2))
    yield "projected-packed", lambda: Tagger(packed=True, cells=12)
    yield "projected-states", lambda: Translator(9)


NETWORKS = dict(networks())


def silenced(net: nn.Module, drop: list[int]) -> None:
    """Set the weights that read hidden units to 0 by hand, in place."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias") or parameter.ndim < 2 or "weight_hr" in name:
                continue
            if "weight_hh" in name or "_l1" in name or name == "head.weight":
                parameter.unflatten(1, (-1, 6))[:, :, drop] = 0


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_units_are_removed_from_gates_levels_directions_and_states(name, tmp_path):
    torch.manual_seed(0)
    net, x = NETWORKS[name]().eval(), torch.randn(2, 3, 5)
    traced = trace(net, x)
    (group,) = traced.widths
    assert traced.widths[group] == 6
    plan, before = Plan({group: (0, 2, 5)}), net(x)
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, x) < 1e-4 and torch.equal(net(x), before)
    layers = [m for m in small.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    widths = {getattr(m, "proj_size", 0) or m.hidden_size for m in layers}
    assert widths == {3}

    cost_model = CostModel(net, traced)
    for model, width in ((net, 6), (small, 3)):
        expected, counted = cost_model({group: width}), count(model, x)
        assert (counted.params, counted.macs) == (expected.params, expected.macs)
        assert expected.params == sum(p.numel() for p in model.parameters())

    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        assert torch.equal(load(tmp_path / "small.pth", NETWORKS[name])(x), small(x))
    silenced(net, [1, 3, 4])
    torch.testing.assert_close(small(x), net(x))


def test_scores_of_hidden_units_are_over_all_gates_levels_and_directions():
    torch.manual_seed(0)
    net, x = Tagger(), torch.randn(2, 3, 5)
    rows = [p.detach() for n, p in net.read.named_parameters() if n.startswith("weight")]
    expected = torch.cat([p.unflatten(0, (4, 6)).transpose(0, 1).flatten(1) for p in rows], 1).square().sum(1)
    scores = pruning.planning.scores.l2(net, trace(net, x), [], None)["read"]
    shares = [value / expected[expected >= value].sum() for value in expected]
    torch.testing.assert_close(scores, torch.stack(shares))


def test_states_that_are_given_keep_the_hidden_size():
    class Given(Tagger):
        def forward(self, x, state):
            return self.head(self.read(x, state)[0])

    x, state = torch.randn(2, 3, 5), torch.ones(1, 2, 6)
    assert "initial state" in trace(Given("GRU", 1), (x, state)).skipped["read"]
    literal = Cells("GRU", lambda n, _: torch.zeros(n, 6))
    assert "new tensors from those of their inputs" in trace(literal, x).skipped["cell"]
