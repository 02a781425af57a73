"""Attributes of modules follow the widths of layers; laws 2 and 4 hold with them."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, Plan, PruningError, count, doctor, load, prune, save, trace
from pruning.checkpoint import read, write
from pruning.errors import CheckpointError, GroupsLeftOut
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel
from pruning.surgery.apply import apply
from pruning.tracing.left_out import without_groups

pytestmark = pytest.mark.quick


class Sized(nn.Module):
    """A convolution, the operation `middle` on its channels, and a linear layer."""

    def __init__(self, channels=12, reads=12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(reads, 4)

    def forward(self, x):
        x = self.middle(self.stem(x))
        return self.head(x if x.ndim == 2 else x.mean((2, 3)))


class Halves(Sized):
    """Splits channels as YOLO's C2f does."""

    def __init__(self):
        super().__init__(reads=18)
        self.width = 6
        self.more = nn.Conv2d(6, 6, 3, padding=1)

    def middle(self, x):
        left, right = x.split((self.width, self.width), 1)
        return torch.cat([left, right, self.more(right)], 1)


class Parts(Sized):
    """Splits channels as MixNet and Res2Net do; kernel sizes and widths are both 3."""

    def __init__(self):
        super().__init__()
        self.kernels, self.splits = (1, 3, 3, 3), [3, 3, 3, 3]
        self.mixed = nn.ModuleList(nn.Conv2d(3, 3, k, padding=k // 2, groups=3) for k in self.kernels)

    def middle(self, x):
        pieces = zip(self.mixed, x.split(self.splits, 1), strict=True)
        return torch.cat([layer(piece) for layer, piece in pieces], 1)


class Flat(Sized):
    def __init__(self):
        super().__init__(reads=12 * 4)
        self.features, self.pool = 12 * 2 * 2, nn.AdaptiveAvgPool2d(2)

    def middle(self, x):
        return self.pool(x).view(-1, self.features)


class Decoder(Sized):
    """Uses torch's own module for the same operation."""

    def __init__(self):
        super().__init__(reads=5)
        self.decode = nn.Sequential(
            nn.Linear(12, 10 * 4 * 4), nn.Unflatten(1, (10, 4, 4)), nn.ReLU(), nn.ConvTranspose2d(10, 5, 2)
        )

    def middle(self, x):
        return self.decode(x.mean((2, 3)))


class Spread(Sized):
    channels = 12  # a class attribute, which must not change

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(12, 1, 1)

    def middle(self, x):
        return x * self.map(x).sigmoid().expand(-1, self.channels, -1, -1)


class Gated(Sized):
    """Two attributes that must both follow the width."""

    def __init__(self):
        super().__init__(reads=6)
        self.value, self.gate = 6, 6

    def middle(self, x):
        value, gate = x.split([self.value, self.gate], 1)
        return value * gate.sigmoid()


class Remembers(Sized):
    """A convolutional recurrent cell whose initial state is created by the model."""

    def __init__(self):
        super().__init__(reads=6)
        self.hidden, self.cell = 6, nn.Conv2d(12 + 6, 2 * 6, 3, padding=1)

    def middle(self, x):
        state = torch.zeros(len(x), self.hidden, *x.shape[2:], device=x.device)
        for _ in range(2):
            gate, value = self.cell(torch.cat([x, state], 1)).chunk(2, 1)
            state = state * gate.sigmoid() + value.tanh()
        return state


KINDS = [Halves, Parts, Flat, Decoder, Gated, Remembers]


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_follow_the_widths_and_are_stored_in_checkpoints(kind, tmp_path):
    net = kind()
    attributes = {k: v for module in net.modules() for k, v in vars(module).items() if type(v) is not dict}
    before = copy.deepcopy(attributes)
    traced = trace(net, nets.images())
    assert set(traced.skipped) == {"head"} and traced.sizes
    once = prune(net, nets.images(), Budget(channels="70%"), score="l2", ranking="group").model
    twice = prune(once, nets.images(), Budget(channels="60%"), score="l2", ranking="group").model
    assert {k: attributes[k] for k in before} == attributes and not hasattr(net, "_pruned_sizes")
    images = nets.images(3)
    for small in (once, twice):
        assert small.stem[0].out_channels < 12
        save(tmp_path / "net.pth", small)
        for loader in (load, load_pruned):
            again = loader(tmp_path / "net.pth", kind)
            assert torch.equal(again(images), small.eval()(images))
        save(tmp_path / "again.pth", again)  # save a loaded network
        assert torch.equal(load(tmp_path / "again.pth", kind)(images), small(images))


def test_each_attribute_follows_the_channels_that_it_counts():
    step = prune(Halves(), nets.images(), Budget(channels=11), score="l2")
    assert step.model.width * 2 == step.model.stem[0].out_channels
    mixed = prune(Parts(), nets.images(), Budget(channels=2), score="l2").model
    assert mixed.splits == [2, 2, 2, 2] and mixed.kernels == (1, 3, 3, 3)
    flat = prune(Flat(), nets.images(), Budget(channels=7), score="l2").model
    assert flat.features == 28 and flat.head.in_features == 28
    decoder = prune(Decoder(), nets.images(), Budget(channels="50%"), score="l2", ranking="group").model
    kept = decoder.decode[0].out_features // 16
    assert kept < 10 and decoder.decode[1].unflattened_size == (kept, 4, 4)


def test_a_class_attribute_is_unchanged_and_shadowed_by_an_instance_attribute():
    step = prune(Spread(), nets.images(), Budget(channels=5), score="l2")
    assert (step.model.channels, Spread.channels) == (5, 12) and step.difference < 1e-5


def test_channels_counted_by_an_attribute_that_also_scales_the_output_are_not_pruned():
    class Scaled(Flat):
        def middle(self, x):
            return super().middle(x) / self.features

    class Written(Flat):
        def middle(self, x):
            return self.pool(x).view(-1, 48)

    for kind in (Scaled, Written):
        traced = trace(kind(), nets.images())
        assert "tied to its width" in traced.skipped["stem.0"] and not traced.sizes


def test_channels_that_a_view_of_another_tensor_counts_are_not_pruned():
    """As in VOLO, the channels of one layer's input determine the heads of another's output."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.value = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x):
            x = torch.relu(self.stem(x)).mean((2, 3), keepdim=True)
            heads = self.value(x).reshape(len(x), 2, x.shape[1] // 2)
            return self.head(self.mix(heads).flatten(1))

    traced = trace(Heads(), nets.images())
    assert set(traced.groups) == {"mix"} and "tied to its width" in traced.skipped["stem"]


def test_doctor_lists_the_attributes_and_their_groups():
    found = doctor(Halves(), nets.images())
    assert "stem.0" in {group.name for group in found.groups} and found.sizes == ["width"]
    assert "attributes that pruning updates to the new widths: width" in str(found) and not found.trial


@pytest.mark.parametrize("value", [[5, 4], 99, "7", [7.5], -1])
def test_a_damaged_attribute_in_a_checkpoint_is_refused(value, tmp_path):
    save(tmp_path / "net.pth", prune(Halves(), nets.images(), Budget(channels="50%"), score="l2").model)
    content = read(tmp_path / "net.pth")
    assert content["sizes"][""]["width"] < 6
    content["sizes"][""]["width"] = value
    write(tmp_path / "net.pth", content)
    with pytest.raises(CheckpointError, match=r"does not fit Halves"):
        load(tmp_path / "net.pth", Halves)
    content["sizes"] = {"": {"forward": 3}}
    write(tmp_path / "net.pth", content)
    with pytest.raises(ValueError, match="does not fit Halves"):
        load_pruned(tmp_path / "net.pth", Halves)


class Checked(nn.Module):
    """Its code compares the number of channels with an attribute, or with a constant."""

    def __init__(self, check, channels=16):
        super().__init__()
        self.check, self.channels, self.conv = check, channels, nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x):
        self.check(self, x)
        return self.conv(nn.functional.interpolate(x, scale_factor=2))


def asserts(module, x):
    assert x.shape[1] == module.channels


def asserts_size(module, x):
    assert x.size(1) == module.channels, "wrong width"


def raises(module, x):
    if x.shape[1] != module.channels:
        raise ValueError(f"expected {module.channels} channels")


def needs_sixteen(module, x):
    if x.shape[1] != 16:
        raise AssertionError


@pytest.mark.parametrize("check", [asserts, asserts_size, raises])
def test_an_attribute_follows_with_which_a_width_is_compared(check):
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), Checked(check), nn.ReLU(), nn.Conv2d(16, 3, 1)]
    net = nn.Sequential(*layers).eval()
    step = prune(net, torch.randn(2, 3, 8, 8), Budget(macs="50%"), score="l2", widths={"0": 5})
    assert step.model[2].channels == 5 == step.model[2].conv.in_channels and net[2].channels == 16


def test_a_width_that_is_compared_with_a_constant_is_left_with_a_reason_that_can_be_read():
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), Checked(needs_sixteen), nn.Conv2d(16, 3, 1)]
    net = nn.Sequential(*layers).eval()
    found = trace(net, torch.randn(2, 3, 8, 8))
    assert found.widths == {"2.conv": 16}
    assert "AssertionError at `raise AssertionError`" in found.skipped["0"]


class Scaled(nn.Module):
    """Divides by the square root of the number of channels."""

    def forward(self, x):
        return x / x.shape[1] ** 0.5


def test_a_width_that_is_used_as_a_number_is_left_out_and_planning_goes_on():
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), Scaled(), nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 2, 1)]
    net, images = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(GroupsLeftOut, match="group '0' keeps all channels"):
        step = prune(net, images, Budget(macs="75%"), score="l2")
    assert step.plan.widths["3"] < 12 and step.model[0].out_channels == 16 and step.difference < 1e-4
    assert step.after.macs <= 0.75 * step.before.macs
    for reason in (step.left_out["0"], step.trace.skipped["0"]):
        assert "its code may use the width as a number" in reason
    found = doctor(net, images)
    assert [group.name for group in found.groups] == ["3"] and "as a number" in found.skipped["0"]
    assert found.trial == ""
    with pytest.raises(PruningError, match=r"cannot be reached.*Groups were left out \(0: .*as a number"):
        prune(net, images, Budget(macs="30%"), score="l2")
    with pytest.raises(PruningError, match="no prunable group"):
        prune(net, images, Budget(macs="90%"), score="l2", ignored=["3"])


class Alike(nn.Module):
    """Attention whose queries are its keys."""

    def __init__(self):
        super().__init__()
        self.stem, self.value, self.head = nn.Linear(5, 16), nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x):
        key = torch.tanh(self.stem(x))
        return self.head((key @ key.transpose(1, 2) / 4).softmax(-1) @ self.value(x))


def test_products_of_a_group_that_is_left_out_count_at_full_width():
    net, x = Alike().eval(), torch.randn(1, 7, 5)
    traced = trace(net, x)
    assert traced.widths == {"stem": 16, "value": 12}
    left = without_groups(traced, {"stem": "as an example"})
    assert left.widths == {"value": 12} and left.skipped["stem"] == "as an example"
    small = apply(net, left, Plan({"value": range(5)}))
    assert CostModel(net, left)({"value": 5}) == count(small, x) != count(net, x)
