"""Layers that share a parameter are narrowed together, and share it afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning import Budget, Plan, count, load, prune, save, trace
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick


class Language(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


class Twins(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3)
        self.second.weight = self.first.weight
        self.out = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        return self.out(torch.relu(torch.cat([self.first(x), self.second(x.flip(3))], 1)))


TOKENS, IMAGES = torch.randint(0, 30, (4, 7)), torch.randn(2, 3, 8, 8)


def test_a_narrowed_embedding_and_its_head_compute_what_slices_of_their_weight_do():
    torch.manual_seed(0)
    net, kept = Language().eval(), [0, 3, 4, 7]
    traced = trace(net, TOKENS)
    small = apply(net, traced, Plan({"embedding": kept}))
    assert small.head.weight is small.embedding.weight and small.head.weight.shape == (30, 4)
    assert net.head.weight is net.embedding.weight and net.head.weight.shape == (30, 16)
    by_hand = copy.deepcopy(net)
    by_hand.up.weight = nn.Parameter(net.up.weight[:, kept])
    by_hand.down.weight, by_hand.down.bias = (nn.Parameter(x[kept]) for x in net.down.parameters())
    by_hand.norm.weight, by_hand.norm.bias = (nn.Parameter(x[kept]) for x in net.norm.parameters())
    by_hand.embedding.weight = by_hand.head.weight = nn.Parameter(net.embedding.weight[:, kept])
    by_hand.norm.normalized_shape = (4,)
    torch.testing.assert_close(small(TOKENS), by_hand(TOKENS))
    cost = CostModel(net, traced)
    assert cost({}) == count(net, TOKENS) and cost({"embedding": 4}) == count(small, TOKENS)


@pytest.mark.parametrize(
    ("factory", "inputs", "places", "widths"),
    [
        (Language, TOKENS, ("embedding", "head"), {"embedding": 6, "up": 11}),
        (Twins, IMAGES, ("first", "second"), {"first": 5}),
    ],
)
@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_layers_with_one_weight_are_narrowed_together(factory, inputs, places, widths, score, tmp_path):
    net = factory().eval()
    assert trace(net, inputs).widths.keys() == widths.keys()
    loss = lambda outputs, _: outputs.square().mean()  # noqa: E731
    budget = Budget(params="90%")
    calibration = [(inputs, torch.zeros(len(inputs)))]
    step = prune(net, inputs, budget, score=score, calibration=calibration, loss=loss, widths=widths)
    one, other = (step.model.get_submodule(name).weight for name in places)
    assert one is other and step.difference < 1e-4
    assert (
        step.after.params
        == count(step.model, inputs).params
        == sum(p.numel() for p in step.model.parameters())
    )
    save(tmp_path / "small.pth", step.model)
    for again in (load(tmp_path / "small.pth", factory), load_pruned(tmp_path / "small.pth", factory)):
        assert torch.equal(again(inputs), step.model(inputs))
        one, other = (again.get_submodule(name).weight for name in places)
        assert one is other
    step.model(inputs).square().mean().backward()
    assert one.shape == other.shape


def test_the_channels_of_a_dimension_that_only_one_layer_has_are_fixed():
    class Read(Language):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(30, 2)

        def forward(self, tokens):
            return self.last(super().forward(tokens))

    found = trace(Read(), TOKENS)
    assert found.widths == {"embedding": 16, "up": 32}
    assert "is the same tensor as" in found.skipped["head"] and "untie" in found.skipped["head"]


def test_a_refit_leaves_shared_weights():
    net, batches = Language().eval(), [(TOKENS, None)] * 2
    step = prune(net, TOKENS, Budget(macs="60%"), score="l2", calibration=batches, refit=True)
    assert step.model.embedding.weight is step.model.head.weight
    assert (
        next(fit for fit in step.refits if fit.layer == "head").reason == "another layer has the same weight"
    )


@pytest.mark.parametrize("first", [True, False])
def test_the_input_channels_of_layers_with_one_weight_are_tied(first):
    """If one of them reads the model's input, both keep their input channels."""
    layers = [nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)]
    net = nn.Sequential(*layers if first else [nn.Linear(5, 10), *layers]).eval()
    shared = (0, 2) if first else (1, 3)
    net[shared[1]].weight = net[shared[0]].weight
    x = torch.randn(3, 10 if first else 5)
    found = trace(net, x)
    if first:
        assert found.widths == {} and "one of the two layers has a fixed size" in found.skipped["0"]
        assert "untie them" in found.skipped["0"] and "untie them" in found.skipped["2"]
        return
    step = prune(net, x, Budget(macs="50%"), score="l2")
    assert step.plan.widths.keys() == {"0"} and step.difference < 1e-4
    assert step.model[1].weight is step.model[3].weight


class Depthwise(nn.Module):
    """Two depthwise convolutions with one weight, on the same channels or each on channels of its own."""

    def __init__(self, same: bool):
        super().__init__()
        self.same = same
        self.stem, self.other, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))
        self.second.weight = self.first.weight
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = torch.relu(self.first(self.stem(x)))
        return self.out(y) + self.last(self.second(y if self.same else self.other(x)))


def test_depthwise_layers_with_one_weight_are_narrowed_where_they_lose_the_same_channels():
    step = prune(Depthwise(True).eval(), IMAGES, Budget(macs="50%"), score="l2")
    assert step.plan.widths["stem"] < 8 and step.difference < 1e-4
    assert step.model.first.weight is step.model.second.weight
    found = trace(Depthwise(False).eval(), IMAGES)
    assert not found.groups and all("untie them" in found.skipped[name] for name in ("first", "second"))


def test_a_layer_that_only_lends_its_weight_goes_with_those_that_use_it():
    """As in encoder-decoder models: a third embedding holds the weight, and does not run."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.first, self.second = (nn.Embedding(9, 8) for _ in range(3))
            self.first.weight = self.second.weight = self.shared.weight
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.first(x) + self.second(x.flip(1)))

    torch.manual_seed(0)
    net, x = Net(), torch.randint(0, 9, (2, 5))
    step = prune(net, x, Budget(channels=5), score="l2")
    kept = torch.tensor(step.plan.keep["shared"])
    assert step.model.shared.weight is step.model.second.weight and step.model.shared.embedding_dim == 5
    weight = net.shared.weight[:, kept]
    expected = (weight[x] + weight[x.flip(1)]) @ net.head.weight[:, kept].T + net.head.bias
    torch.testing.assert_close(step.model(x), expected)


class Averaged(nn.Module):
    """BYOL: a frozen target beside the encoder, which runs in training mode alone."""

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x):
        return (self.online(x), self.target(x)) if self.training else self.online(x)


def test_a_frozen_twin_is_named_with_the_encoder_that_it_averages():
    net, x = Averaged(), torch.randn(2, 4)
    traced = trace(net, x)
    assert traced.widths == {"online.0": 8}
    assert "deepcopy of the pruned online" in traced.skipped["target.0"]
    small = apply(net, traced, Plan({"online.0": (0, 3)}))
    small.target = copy.deepcopy(small.online).requires_grad_(False)
    assert [p.shape for p in small.train().target.parameters()] == [
        p.shape for p in small.online.parameters()
    ]
