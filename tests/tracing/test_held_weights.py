"""Weights that are parameters of any module: tied decoders, parameters of the model itself, LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pruning
from pruning import Plan, trace
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel, count
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify, with_random_weights

pytestmark = pytest.mark.quick


class Tied(nn.Module):
    """An autoencoder whose decoder has the transposed weights of its encoder."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 6)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.second(torch.tanh(self.first(x))))
        hidden = torch.tanh(F.linear(code, self.second.weight.t(), self.bias))
        return hidden @ self.first.weight


class Root(nn.Module):
    """A network that multiplies by a parameter of its own."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(10, 8), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 8) if how == "linear" else torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.how == "matmul":
            x = x @ self.w
        elif self.how == "einsum":
            x = torch.einsum("bi,io->bo", x, self.w)
        else:
            x = F.linear(x, self.w if self.how == "linear" else self.w.t())
        return self.last(torch.tanh(x))


class Adapted(nn.Linear):
    """A linear layer with an update of low rank, as in loralib."""

    def __init__(self, into: int, out: int):
        super().__init__(into, out)
        self.a, self.b = nn.Parameter(torch.randn(4, into)), nn.Parameter(torch.randn(out, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + (x @ self.a.T @ self.b.T) * 0.5


class Beside(nn.Module):
    """A linear layer and beside it a product of two raw parameters."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.base = nn.Linear(into, out)
        self.a, self.b = nn.Parameter(torch.randn(into, 4)), nn.Parameter(torch.randn(4, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


def low_rank(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(kind(10, 8), nn.Tanh(), kind(8, 6), nn.Tanh(), nn.Linear(6, 3))


NETWORKS = {
    "tied": (Tied, {12, 6}),
    **{how: (lambda how=how: Root(how), {8, 6}) for how in ("matmul", "einsum", "linear", "transposed")},
    "adapted": (lambda: low_rank(Adapted), {8, 6, 4}),
    "beside": (lambda: low_rank(Beside), {8, 6, 4}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_any_module_are_narrowed(name, tmp_path):
    torch.manual_seed(0)
    build, widths = NETWORKS[name]
    x = torch.randn(5, 10)
    net = with_random_weights(build(), x)
    traced = trace(net, x)
    assert set(traced.widths.values()) == widths
    plan = Plan({group: tuple(range(0, width, 2)) for group, width in traced.widths.items()})
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, x) < 1e-4

    cost_model = CostModel(net, traced)
    for model, at in ((net, traced.widths), (small, plan.widths)):
        expected, counted = cost_model(at), count(model, x)
        assert (counted.params, counted.macs) == (expected.params, expected.macs)

    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        assert torch.equal(load(tmp_path / "small.pth", build)(x), small(x))


def test_a_tied_decoder_computes_the_dense_one_without_the_dropped_code():
    torch.manual_seed(0)
    net, x, keep = Tied().eval(), torch.randn(5, 10), [0, 3, 5]
    traced = trace(net, x)
    small = apply(net, traced, Plan({"second": tuple(keep)}))
    code = torch.tanh(net.second(torch.tanh(net.first(x))))[:, keep]
    expected = torch.tanh(F.linear(code, net.second.weight[keep].t(), net.bias)) @ net.first.weight
    torch.testing.assert_close(small(x), expected)


@pytest.mark.parametrize("kind", [Adapted, Beside])
def test_the_rank_of_an_update_is_a_group_of_its_own(kind):
    torch.manual_seed(0)
    net, x = low_rank(kind).eval(), torch.randn(5, 10)
    traced = trace(net, x)
    assert traced.widths["0.a"] == 4
    small = apply(net, traced, Plan({"0.a": (1, 2)}))
    rank = 0 if kind is Adapted else 1
    with torch.no_grad():
        net[0].a.index_fill_(rank, torch.tensor([0, 3]), 0)
    torch.testing.assert_close(small(x), net(x))
    assert small[0].a.shape[rank] == small[0].b.shape[1 - rank] == 2


def test_frozen_weights_of_the_model_are_kept():
    net = Root("matmul")
    net.w.requires_grad_(False)
    traced = trace(net, torch.randn(5, 10))
    assert traced.widths == {} and "w is frozen" in traced.skipped["first"]


def test_an_ignored_module_keeps_its_raw_parameters():
    traced = trace(low_rank(Beside), torch.randn(5, 10), ignored=["0"])
    assert set(traced.widths) == {"2.a", "2.b"}
    assert "ignored, as asked by" in traced.skipped["0.a"] and "ignored" in traced.skipped["0.b"]


@pytest.mark.parametrize("score", ["l2", "taylor", "reconstruction"])
def test_every_kind_of_score_ranks_such_channels(score):
    torch.manual_seed(0)
    net, x = Root("matmul"), torch.randn(16, 10)
    batches = [(x, torch.randint(3, (16,)))]
    step = pruning.prune(net, x, pruning.Budget(params="60%"), score=score, calibration=batches)
    assert step.model.w.shape != net.w.shape


@pytest.mark.filterwarnings("ignore")  # torch deprecates it
def test_layers_with_fake_quantization_are_kept_with_the_cure():
    quantization = torch.ao.quantization
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(net)
    traced = trace(prepared, torch.randn(2, 3, 9, 9))
    assert traced.widths == {} and "prune first and call prepare_qat" in traced.skipped["0"]


class TiedConv(nn.Module):
    """An autoencoder of convolutions whose decoder has the weights of its encoder."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.second(torch.tanh(self.first(x))))
        hidden = F.conv_transpose2d(code, self.second.weight, stride=2, padding=1, output_padding=1)
        return F.conv_transpose2d(hidden.tanh(), self.first.weight, stride=2, padding=1, output_padding=1)


def test_transposed_convolutions_with_tied_weights_are_counted_by_their_inputs():
    net, x = TiedConv(), torch.randn(2, 3, 16, 16)
    traced, plan = trace(net, x), Plan({"first": (0, 4, 7), "second": (1, 2)})
    costs = CostModel(net, traced)
    assert costs({}).macs == count(net, x).macs
    small = apply(net, traced, plan)
    assert costs(plan.widths).macs == count(small, x).macs and verify(net, small, traced, plan, x) < 1e-5


class LookedUp(nn.Module):
    """A network that looks up rows of a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(7, 6)), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(F.embedding(tokens, self.table)))


def test_a_parameter_whose_rows_code_looks_up_is_an_embedding(tmp_path):
    torch.manual_seed(0)
    net, tokens = LookedUp(), torch.tensor([[1, 4, 0], [6, 2, 2]])
    traced, plan = trace(net, tokens), Plan({"table": (0, 3, 5)})
    assert traced.widths == {"table": 6}
    small = apply(net, traced, plan)
    with torch.no_grad():
        net.last.weight[:, [1, 2, 4]] = 0
    torch.testing.assert_close(small(tokens), net(tokens))

    costs = CostModel(net, traced)
    for model, at in ((net, traced.widths), (small, plan.widths)):
        assert (count(model, tokens).params, count(model, tokens).macs) == (costs(at).params, costs(at).macs)
    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        assert torch.equal(load(tmp_path / "small.pth", LookedUp)(tokens), small(tokens))

    net.table.requires_grad_(False)
    assert "frozen" in trace(net, tokens).skipped["table"]
