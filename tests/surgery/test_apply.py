"""Laws 1 to 3 and 5: equivalence, exactness, purity, nothing silent."""

from __future__ import annotations

import copy
import random

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, Plan, PruningError, load, prune, save, trace
from pruning.graph.layers import layer_width
from pruning.planning import count
from pruning.surgery import channel_constants
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify
from pruning.utils.compare import TOLERANCE

pytestmark = [pytest.mark.quick, pytest.mark.numerics]


def some_plan(traced, names=None, seed=0):
    """Return a plan that keeps a random, non-empty, proper subset of the channels of each named group."""
    draw = random.Random(seed)
    keep = {}
    for name in names or traced.groups:
        channels = traced.groups[name].channels
        keep[name] = tuple(draw.sample(range(channels), draw.randint(1, channels - 1)))
    return Plan(keep)


@pytest.mark.parametrize("name", nets.NETS)
def test_pruning_each_group_alone_and_all_together_is_equivalent_to_masking(name):
    net, images = nets.make(name), nets.images()
    traced = trace(net, images)
    assert traced.groups, traced.skipped
    for groups in [[group] for group in traced.groups] + [list(traced.groups)]:
        for seed in range(3):
            plan = some_plan(traced, groups, seed)
            small = apply(net, traced, plan)
            assert verify(net, small, traced, plan, images) <= TOLERANCE
            constants = channel_constants(net, traced, [images])
            folded = apply(net, traced, plan, constants)
            assert verify(net, folded, traced, plan, images, constants) <= TOLERANCE


@pytest.mark.parametrize("name", nets.NETS)
def test_widths_equal_the_plan_and_a_second_plan_can_be_applied(name):
    net, images = nets.make(name), nets.images()
    traced = trace(net, images)
    plan = some_plan(traced, seed=1)
    small = apply(net, traced, plan)
    shares: dict[str, float] = {}
    for group, kept in plan.widths.items():  # a layer of attention has heads and positions
        layer = group.partition("/")[0]
        shares[layer] = shares.get(layer, 1.0) * kept / traced.groups[group].channels
    for layer, share in shares.items():
        before, after = net.get_submodule(layer), small.get_submodule(layer)
        if isinstance(before, nn.Linear):
            assert after.out_features == before.out_features * share == len(after.weight)
        else:
            assert layer_width(after, "out") == layer_width(before, "out") * share
            assert small(images).shape == net(images).shape
    again = trace(small, images)
    if again.groups:
        second = some_plan(again)
        assert verify(small, apply(small, again, second), again, second, images) <= TOLERANCE


@pytest.mark.parametrize(("name", "group"), [("lenet", "features.conv1"), ("lenet", "classifier.fc1"),
                                             ("yournet", "features.conv1")])  # fmt: skip
def test_folding_the_constant_of_a_dead_channel_changes_no_output(name, group):
    """γ = 0 leaves relu(β) behind: without zero padding, folding it changes no output."""
    net, images = nets.make(name), nets.images()
    traced = trace(net, images)
    norm = net.get_submodule(group.replace("conv", "bn").replace("fc", "bn"))
    with torch.no_grad():
        norm.weight[1] = 0
        norm.bias[1] = 0.7
    plan = Plan({group: tuple(c for c in range(len(norm.weight)) if c != 1)})
    constants = channel_constants(net, traced, [images], exact_only=True)
    small, lossy = apply(net, traced, plan, constants), apply(net, traced, plan)
    expected = net(images)
    torch.testing.assert_close(small(images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lossy(images), expected, atol=1e-3), "without folding, the output changes"


def test_prune_folds_the_constant_of_a_channel_with_zero_weights():
    """A channel with zero weights has a constant after its BatchNorm."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(),
        nn.Linear(4 * 12 * 12, 5),
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        net[0].weight[2] = 0
        net[1].bias[2] = 3
    small = prune(net, images, Budget(channels=9), score="l2", widths={"0": 5, "3": 4}).model
    assert small[0].out_channels == 5 and not (small[0].weight == 0).all((1, 2, 3)).any()
    torch.testing.assert_close(small(images), net(images), rtol=1e-4, atol=1e-5)


def test_constants_are_folded_into_recurrent_layers():
    """A bidirectional recurrent layer and a recurrent cell."""
    net, images = nets.make("lines"), nets.images()
    with torch.no_grad():
        net.columns[5].weight[2], net.columns[5].bias[2] = 0, 0.7
        net.mix.weight[1], net.mix.bias[1] = 0, 0.7
    traced = trace(net, images)
    plan = Plan({"columns.4": (0, 1, 3), "mix": (0, 2, 3, 4, 5)})
    constants = channel_constants(net, traced, [images], exact_only=True)
    small = apply(net, traced, plan, constants)
    assert small.read.input_size == 3 * 7 and small.cell.input_size == 5
    torch.testing.assert_close(small(images), net(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(apply(net, traced, plan)(images), net(images), atol=1e-3)


def test_channels_that_are_constant_for_a_single_example_only_are_not_treated_as_constants():
    net = nets.make("plain")
    traced = trace(net, nets.images(1))
    constants = channel_constants(net, traced, [nets.images(1)], exact_only=True)
    assert not any(value.any() for value in constants.values())


def test_constants_are_not_folded_through_zero_padding():
    net, images = nets.make("residual"), nets.images()
    traced = trace(net, images)
    constants = channel_constants(net, traced, [images])
    padded = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and any(m.padding)}
    assert padded and not padded & constants.keys()


def test_apply_changes_neither_the_model_nor_its_mode_nor_its_gradients():
    net, images = nets.make("lenet").train(), nets.images(4)
    net.features.bn1.eval()
    net(images).sum().backward()
    before = copy.deepcopy(net.state_dict())
    gradients = [p.grad.clone() for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    step = prune(net, images, Budget(params="40%"), score="l2")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, net.parameters(), strict=True))
    assert [m.training for m in net.modules()] == modes == [m.training for m in step.model.modules()]
    assert not any(hook for m in net.modules() for hook in (m._forward_hooks, m._forward_pre_hooks))
    assert all(p.grad is None and p.requires_grad for p in step.model.parameters())
    ours = {p.data_ptr() for p in net.parameters()}
    assert not any(p.data_ptr() in ours for p in step.model.parameters())


@pytest.mark.parametrize(("dtype", "difference"), [(torch.float64, 1e-12), (torch.bfloat16, 0.125)])
def test_apply_keeps_the_dtype(dtype, difference):
    net, images = nets.make("residual").to(dtype), nets.images().to(dtype)
    step = prune(net, images, Budget(macs="50%"), score="l1")
    assert {p.dtype for p in step.model.parameters()} == {dtype}
    assert step.difference < difference


def test_apply_keeps_the_memory_format():
    net, images = nets.make("residual").to(memory_format=torch.channels_last), nets.images()
    small = prune(net, images, Budget(macs="50%"), score="l1").model
    weights = [p for p in small.parameters() if p.ndim == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_inputs_may_be_a_tuple_or_a_dict():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, left, right):
            return self.head(torch.relu(self.a(left) + self.b(right)))

    left, right = torch.randn(2, 3), torch.randn(2, 4)
    for inputs in ((left, right), {"left": left, "right": right}):
        step = prune(Sum(), inputs, Budget(params="70%"), score="l2")
        assert step.model.a.out_features == step.model.b.out_features == step.model.head.in_features < 5


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nowhere": (0,)}, "group 'nowhere'"),
        ({"features.conv1": (9,)}, "channel 9"),
    ],
)
def test_a_plan_for_another_model_is_refused(keep, message):
    net = nets.make("lenet")
    with pytest.raises(PruningError, match=message):
        apply(net, trace(net, nets.images()), Plan(keep))


@pytest.mark.parametrize("channels", [(), (0, 0), (-1, 2)])
def test_a_plan_that_empties_a_group_or_repeats_a_channel_is_refused(channels):
    with pytest.raises(PruningError):
        Plan({"conv": channels})


def test_layers_may_be_called_with_keyword_arguments():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
            self.second, self.read, self.head = nn.Conv2d(8, 8, 3), nn.GRU(8, 5), nn.Linear(5, 4)

        def forward(self, x):
            hidden = torch.relu(self.norm(input=self.first(input=x)))
            rows = torch.relu(self.second(input=hidden)).mean(3).permute(2, 0, 1)
            return self.head(input=self.read(input=rows)[0][-1])

    net = Keywords()
    batches = [(nets.images(), torch.zeros(len(nets.images()), dtype=torch.int64))]
    step = prune(net, nets.images(), Budget(params="50%"), calibration=batches)
    assert step.after.params <= 0.5 * step.before.params and step.difference < 1e-5
    assert count(step.model, nets.images()) == step.after


class Keeps(nn.Module):
    """A model that stores an activation as an attribute."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.seen = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), []

    def forward(self, x):
        self.features = torch.relu(self.stem(x))
        self.seen.append({"features": self.features})
        return self.head(self.features.mean((2, 3)))


def test_a_model_that_stores_tensors_of_a_training_step_is_pruned():
    net = Keeps()
    net(nets.images()).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    step = prune(net, nets.images(), Budget(params="50%"), score="l2")
    assert step.difference < 1e-5 and step.after.params <= 0.5 * step.before.params


def test_rms_norms_are_narrowed(tmp_path):
    net = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 2))
    nn.init.normal_(net[1].weight)
    step = prune(net, torch.randn(4, 5, 6), Budget(channels=7), score="l2")
    assert step.model[1].normalized_shape == (7,) and step.model[1].weight.shape == (7,)
    assert step.difference < 1e-5
    save(tmp_path / "small.pth", step.model)
    fresh = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(2, 5, 6)
    assert torch.equal(load(tmp_path / "small.pth", lambda: fresh)(x), step.model(x))


def test_a_shared_copy_leaves_the_model_as_it_is():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3)),
        nn.Conv2d(6, 5, 1),
    ).eval()
    images = nets.images()
    traced = trace(net, images)
    before = {name: values.clone() for name, values in net.state_dict().items()}
    net[0].weight.grad = torch.ones_like(net[0].weight)
    plan = Plan({name: tuple(range(1, group.channels)) for name, group in traced.groups.items()})
    small, own = apply(net, traced, plan, shared=True), apply(net, traced, plan)
    torch.testing.assert_close(small(images), own(images))
    assert small[3].bias is net[3].bias and own[3].bias is not net[3].bias
    assert net[0].weight.grad is not None and plan.keep.keys() == {"0", "2"}
    for name, values in net.state_dict().items():
        assert torch.equal(values, before[name])
