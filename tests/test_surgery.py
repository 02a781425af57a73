"""Laws 1 to 3 and 5: equivalence, exactness, purity, nothing silent."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
import types

import nets
import pytest
import torch
from torch import nn

from pruning import (
    Budget,
    Plan,
    PruningError,
    apply,
    channel_constants,
    doctor,
    equalize,
    fold_batchnorm,
    load,
    prune,
    recalibrate,
    save,
    trace,
    verify,
)
from pruning.agreement import TOLERANCE, compare
from pruning.graph import tensors


def some_plan(traced, names=None, seed=0):
    """Keep a random, non-empty, proper subset of each named group's channels."""
    draw = random.Random(seed)
    keep = {}
    for name in names or traced.groups:
        channels = traced.groups[name].channels
        keep[name] = tuple(draw.sample(range(channels), draw.randint(1, channels - 1)))
    return Plan(keep)


@pytest.mark.parametrize("name", nets.NETS)
def test_every_group_alone_and_all_together_are_equivalent(name):
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
def test_widths_are_those_of_the_plan_and_a_second_step_composes(name):
    net, images = nets.make(name), nets.images()
    traced = trace(net, images)
    plan = some_plan(traced, seed=1)
    small = apply(net, traced, plan)
    for group, kept in plan.widths.items():
        before, after = net.get_submodule(group), small.get_submodule(group)
        share = kept / traced.groups[group].channels
        if isinstance(before, nn.Linear):
            assert after.out_features == before.out_features * share == len(after.weight)
        else:
            assert after.out_channels == before.out_channels * share
            assert small(images).shape == net(images).shape
    again = trace(small, images)
    if again.groups:
        second = some_plan(again)
        assert verify(small, apply(small, again, second), again, second, images) <= TOLERANCE


def test_a_wrong_surgery_is_found_out():
    net, images = nets.make("lenet"), nets.images()
    traced = trace(net, images)
    plan = some_plan(traced)
    small = apply(net, traced, plan)
    with torch.no_grad():
        small.features.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(PruningError, match="not equivalent"):
        verify(net, small, traced, plan, images)


@pytest.mark.parametrize(("name", "group"), [("lenet", "features.conv1"), ("lenet", "classifier.fc1"),
                                             ("yournet", "features.conv1")])  # fmt: skip
def test_the_constant_of_a_dead_channel_is_folded_without_loss(name, group):
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
    assert not torch.allclose(lossy(images), expected, atol=1e-3), "the constant was there to lose"


def test_the_constant_of_a_channel_without_weights_is_folded_by_prune():
    """A convolution without bias whose row is 0, and a BatchNorm with a scale: the norm gives a constant."""
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


def test_a_single_example_is_not_taken_for_a_constant():
    net = nets.make("plain")
    traced = trace(net, nets.images(1))
    constants = channel_constants(net, traced, [nets.images(1)], exact_only=True)
    assert not any(value.any() for value in constants.values())


def test_constants_do_not_go_through_zero_padding():
    net, images = nets.make("residual"), nets.images()
    traced = trace(net, images)
    constants = channel_constants(net, traced, [images])
    padded = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and any(m.padding)}
    assert padded and not padded & constants.keys()


def test_surgery_leaves_the_model_its_mode_and_its_gradients_alone():
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


class Restless(nn.Module):
    """It counts its passes, normalises its input in place and draws random numbers in eval mode."""

    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
        self.b, self.c, self.d = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, batch):
        self.passes += 1
        x = batch.pop("images")
        x -= 0.5
        x = torch.relu(self.b(self.a(x)))
        x = x + self.c(x).sigmoid() * torch.randn_like(x)
        return self.d(nn.functional.dropout(x, 0.5, training=True))


def test_a_restless_model_is_pruned_and_neither_it_nor_its_inputs_change():
    torch.manual_seed(0)
    net, images = Restless().train(), nets.images()
    batch = {"images": images.clone()}
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    calibration = [(({"images": images.clone()},), torch.zeros(2, 10, 10).long())]
    assert not doctor(net, (batch,)).trial
    assert torch.equal(torch.get_rng_state(), state)
    for score, data in (("l2", []), ("taylor", calibration)):
        step = prune(net, (batch,), Budget(macs="70%"), score=score, calibration=data)
        assert step.plan.widths["b"] < 8 and step.model.c.out_channels == step.plan.widths["b"]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(batch["images"], images) and torch.equal(calibration[0][0][0]["images"], images)
    small = step.model
    with torch.no_grad():
        small.c.weight.zero_()  # what scales the noise is compared, too
    traced = trace(net, (batch,))
    with pytest.raises(PruningError, match="not equivalent"):
        verify(net, small, traced, step.plan, (batch,))


@pytest.mark.parametrize(("dtype", "difference"), [(torch.float64, 1e-12), (torch.bfloat16, 0.125)])
def test_dtype_is_kept(dtype, difference):
    net, images = nets.make("residual").to(dtype), nets.images().to(dtype)
    step = prune(net, images, Budget(macs="50%"), score="l1")
    assert {p.dtype for p in step.model.parameters()} == {dtype}
    assert step.difference < difference


def test_layout_in_memory_is_kept():
    net, images = nets.make("residual").to(memory_format=torch.channels_last), nets.images()
    small = prune(net, images, Budget(macs="50%"), score="l1").model
    weights = [p for p in small.parameters() if p.ndim == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("name", nets.NETS)
def test_folding_batchnorm_changes_nothing(name):
    net, images = nets.make(name), nets.images()
    folded = fold_batchnorm(net, trace(net, images))
    torch.testing.assert_close(folded(images), net(images), rtol=1e-4, atol=1e-5)
    if name in ("lenet", "residual", "inverted"):
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_an_output_read_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.head(self.norm(x) + x)

    net = Twice().eval()
    nn.init.normal_(net.norm.bias)
    images = nets.images()
    traced = trace(net, images)
    assert traced.foldable == {}
    assert trace(net, images).groups.keys() == {"conv"}


@dataclasses.dataclass
class Answer:
    logits: object
    features: object


class Folding(nn.Module):
    """A convolution, a norm behind it and a head; the first two may be of any kind."""

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1)
        lively(self.norm)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


def lively(norm):
    """Statistics, scales and shifts that folding cannot leave out unseen."""
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.gelu(super().forward(x))


class BatchStatistics(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


class ConvAndActivation(nn.Conv2d):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class ReadsWeight(Folding):
    def forward(self, x):
        return super().forward(x) * self.conv.weight.norm()


class ReadsOutput(Folding):
    def forward(self, x):
        seen = self.conv(x)
        return Answer(self.head(torch.relu(self.norm(seen))), seen)


class OverTime(nn.Module):
    """BatchNorm1d takes dimension 1 for channels; those of the linear layer lie along the last."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(14, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        lively(self.norm)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.first(x.flatten(1, 2)[:, :4]))))


def with_a_hook():
    net = Folding()
    net.norm.register_forward_hook(lambda _, __, output: output * 2)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: Folding(norm=NormAndActivation),
        lambda: Folding(norm=BatchStatistics),
        lambda: Folding(conv=ConvAndActivation),
        lambda: Folding(conv=Standardised),
        lambda: Folding(conv=lambda *sizes: nn.utils.parametrizations.weight_norm(nn.Conv2d(*sizes))),
        ReadsWeight,
        ReadsOutput,
        OverTime,
        with_a_hook,
    ],
)
def test_a_norm_that_does_not_fold_without_change_is_left_and_counted(make):
    torch.manual_seed(0)
    net, images = make().eval(), nets.images()
    traced = trace(net, images)
    assert traced.foldable == {}
    assert compare(tensors(net(images)), tensors(fold_batchnorm(net, traced)(images)))[0] == ""


class ByTheSide(nn.Module):
    """A middle convolution whose weight is read where no trace sees it: through numpy."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Folding(), Folding(), Folding()

    def forward(self, x):
        scale = float(abs(self.middle.conv.weight.detach().numpy()).sum()) if x.device.type == "cpu" else 1
        return [block(x) * scale for block in (self.first, self.middle, self.last)]


def test_folding_is_checked_and_only_the_norm_at_fault_is_left():
    net, images = ByTheSide().eval(), nets.images()
    traced = trace(net, images)
    pairs = {f"{block}.conv": f"{block}.norm" for block in ("first", "middle", "last")}
    traced = dataclasses.replace(traced, foldable=pairs)
    with pytest.warns(UserWarning, match=r"middle\.norm cannot be folded"):
        folded = fold_batchnorm(net, traced)
    assert compare(net(images), folded(images))[0] == ""
    assert isinstance(folded.middle.norm, nn.BatchNorm2d)
    assert isinstance(folded.first.norm, nn.Identity) and isinstance(folded.last.norm, nn.Identity)
    with pytest.raises(PruningError, match="does not run on the example inputs"):
        fold_batchnorm(net, traced, torch.randn(2, 5))


def test_a_layer_with_two_names_is_one_layer(tmp_path):
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.block = nn.Sequential(self.conv, self.norm, nn.ReLU())
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(self.block(x))

    torch.manual_seed(0)
    net, images = Alias().eval(), nets.images()
    lively(net.norm)
    traced = trace(net, images)
    assert set(traced.groups) == {"conv"}
    assert set(trace(net, images, ["block.0"]).groups) == set()  # by its other name
    step = prune(net, images, Budget(params="60%"), score="l2")
    folded = fold_batchnorm(step.model, trace(step.model, images))
    assert folded.conv is folded.block[0] and isinstance(folded.block[1], nn.Identity)
    assert sum(p.numel() for p in folded.parameters()) == step.after.params
    torch.testing.assert_close(folded(images), step.model(images), rtol=1e-4, atol=1e-5)
    save(tmp_path / "small.pth", folded)
    assert torch.equal(load(tmp_path / "small.pth", Alias)(images), folded(images))


def test_the_output_layer_is_kept_and_named():
    traced = trace(nets.make("lenet"), nets.images())
    assert "output" in traced.skipped["classifier.fc3"]


def test_features_that_are_an_output_too_are_kept():
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            features = self.a(x)
            return {"features": features, "logits": self.c(torch.relu(self.b(features)))}

    traced = trace(TwoOutputs(), nets.images())
    assert set(traced.groups) == {"b"} and "output" in traced.skipped["a"]
    step = prune(TwoOutputs(), nets.images(), Budget(params="80%"), score="l2")
    assert step.plan.widths["b"] < 5


class Slotted:
    __slots__ = ("features", "logits")

    def __init__(self, logits, features):
        self.logits, self.features = logits, features


class Answers(nn.Module):
    """Its outputs lie in an object that torch's pytree does not know."""

    def __init__(self, hold):
        super().__init__()
        self.a, self.b, self.c, self.hold = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1), hold

    def forward(self, x):
        features = torch.relu(self.a(x))
        return self.hold(self.c(torch.relu(self.b(features))), features)


@pytest.mark.parametrize(
    "hold",
    [
        Answer,
        Slotted,
        lambda logits, features: types.SimpleNamespace(found=[{"a": features}], logits=logits),
        lambda logits, features: collections.UserDict(logits=logits, features=features),
    ],
)
def test_outputs_in_objects_are_kept_and_compared(hold):
    net, images = Answers(hold), nets.images()
    traced = trace(net, images)
    assert set(traced.groups) == {"b"} and "output" in traced.skipped["a"]
    plan = some_plan(traced)
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, images) <= TOLERANCE
    with torch.no_grad():
        small.a.weight.add_(1)
    with pytest.raises(PruningError, match="not equivalent"):
        verify(net, small, traced, plan, images)


def test_outputs_without_a_tensor_are_refused():
    net = Answers(lambda logits, features: Answer(logits.sum().tolist(), None))
    with pytest.raises(PruningError, match="returns no tensor"):
        prune(net, nets.images(), Budget(params="80%"), score="l2")


def test_complex_outputs_are_compared():
    assert compare([torch.ones(3) * 1j], [torch.zeros(3) * 1j])[1] == 1
    assert compare([torch.ones(3) * 1j], [torch.ones(3) * 1j]) == ("", 0)


def test_infinite_outputs_agree_with_themselves_alone():
    masked = torch.tensor([1.0, -float("inf")])
    assert compare([masked], [masked.clone()]) == ("", 0)
    assert compare([masked], [-masked])[0] and compare([masked], [torch.zeros(2)])[0]
    assert compare([masked * 0], [masked * 0])[0], "NaN agrees with nothing"


def test_what_cannot_be_pruned_is_named_with_the_reason():
    net = nets.make("lenet")
    net.features.conv2.weight.requires_grad_(False)
    traced = trace(net, nets.images(), ignored=["classifier.fc1"])
    assert set(traced.groups) == {"classifier.fc2"}
    assert "features.conv2.weight is frozen" in traced.skipped["features.conv2"]
    assert "features.conv2.weight is frozen" in traced.skipped["features.conv1"]
    assert "ignored" in traced.skipped["classifier.fc1"]


@pytest.mark.parametrize("ignored", ["classifier.*", nn.Linear])
def test_ignored_by_pattern_and_by_type(ignored):
    net = nets.make("lenet")
    assert set(trace(net, nets.images(), [ignored]).groups) == {"features.conv1", "features.conv2"}


def test_ignored_by_instance():
    net = nets.make("lenet")
    kept = trace(net, nets.images(), [net.features]).groups
    assert set(kept) == {"classifier.fc1", "classifier.fc2"}


def test_an_ignored_layer_that_is_not_there_is_an_error():
    with pytest.raises(PruningError, match=r"'clasifier\.\*' matches no layer"):
        trace(nets.make("lenet"), nets.images(), ["clasifier.*"])


def test_a_shared_weight_is_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    traced = trace(net, torch.randn(2, 4))
    assert "same tensor" in traced.skipped["0"] and "same tensor" in traced.skipped["2"]
    assert traced.groups == {}


def test_a_hard_coded_view_is_named_and_the_rest_is_pruned():
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
            self.head = nn.Linear(4 * 14 * 14, 2)

        def forward(self, x):
            return self.head(self.conv(torch.relu(self.first(x))).view(-1, 4 * 14 * 14))

    net = Rigid()
    before = copy.deepcopy(net.state_dict())
    traced = trace(net, nets.images())
    assert set(traced.groups) == {"first"}
    assert "tied to its width" in traced.skipped["conv"] and "invalid for input" in traced.skipped["conv"]
    step = prune(net, nets.images(), Budget(macs="70%"), score="l2")
    assert step.model.first.out_channels < 5 and step.model.conv.out_channels == 4
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_model_without_prunable_groups_says_why():
    with pytest.raises(PruningError, match=r"no prunable group.*output"):
        prune(nn.Linear(4, 2), torch.randn(2, 4), Budget(params="50%"), score="l2")


def test_a_model_that_does_not_run_on_the_inputs():
    with pytest.raises(PruningError, match="does not run on the example inputs"):
        trace(nets.make("lenet"), torch.randn(2, 1, 14, 14))


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
def test_a_plan_that_empties_a_group_or_repeats_a_channel_cannot_be_made(channels):
    with pytest.raises(PruningError):
        Plan({"conv": channels})


@pytest.mark.parametrize("name", nets.NETS)
def test_equalized_networks_compute_the_same(name):
    net, x = nets.make(name), nets.images()
    before = nets.snapshot(net)
    equal = equalize(net, trace(net, x), x)
    fresh = nets.images(8)
    torch.testing.assert_close(equal(fresh), net(fresh), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_equalized_channels_have_mean_square_one_behind_relu_and_are_as_they_were_behind_others():
    net = nets.make("lenet")
    first, last = net.features.bn1, net.classifier.bn1
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0, 0
        first.weight[1], first.bias[1] = 1e-3, -0.5  # nearly constant: it must not become a huge one
        first.weight[2], first.bias[2] = -0.3, 0
        last.weight[3], last.bias[3] = 0, 0.2
    equal = equalize(net, trace(net, nets.images()), nets.images())
    size = [torch.hypot(norm.weight, norm.bias) for norm in (equal.features.bn1, equal.classifier.bn1)]
    torch.testing.assert_close(size[0], torch.tensor([0.0] + [1.0] * (len(first.weight) - 1)))
    torch.testing.assert_close(size[1], torch.ones_like(last.weight))
    assert equal.features.bn1.weight[2] == -1 and equal.classifier.bn1.bias[3] == 1
    assert (equal.features.bn1.weight.sign() == first.weight.sign()).all()
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 2)).eval()
    nn.init.normal_(net[1].weight)
    x = torch.randn(8, 4)
    assert torch.equal(equalize(net, trace(net, x), x)[1].weight, net[1].weight)


def test_a_layer_before_a_norm_keeps_the_size_of_its_weights_and_another_takes_on_the_scales():
    net, x = nets.make("lenet"), nets.images()
    with torch.no_grad():
        for norm in (net.features.bn1, net.classifier.bn2):
            norm.weight.mul_(0.01)
            norm.bias.mul_(0.01)
    recalibrate(net, [x])
    equal = equalize(net, trace(net, x), x)
    torch.testing.assert_close(torch.hypot(equal.features.bn1.weight, equal.features.bn1.bias), torch.ones(4))
    torch.testing.assert_close(equal.features.conv2.weight.norm(), net.features.conv2.weight.norm())
    consumer = list(equal.classifier.children())[-1].weight.norm()
    assert consumer < 0.1 * list(net.classifier.children())[-1].weight.norm()
    torch.testing.assert_close(equal(x), net(x), rtol=1e-4, atol=1e-5)


def test_layers_may_be_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
            self.second, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            hidden = torch.relu(self.norm(input=self.first(input=x)))
            return self.head(input=torch.relu(self.second(input=hidden)).mean((2, 3)))

    net = Keywords()
    batches = [(nets.images(), torch.zeros(len(nets.images()), dtype=torch.int64))]
    step = prune(net, nets.images(), Budget(params="50%"), calibration=batches)
    assert step.after.params <= 0.5 * step.before.params and step.difference < 1e-5


class Keeps(nn.Module):
    """A model that keeps an activation, as those do whose features are looked at later."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.seen = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), []

    def forward(self, x):
        self.features = torch.relu(self.stem(x))
        self.seen.append({"features": self.features})
        return self.head(self.features.mean((2, 3)))


def test_what_a_training_step_left_in_a_model_does_not_keep_it_from_being_pruned():
    net = Keeps()
    net(nets.images()).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    step = prune(net, nets.images(), Budget(params="50%"), score="l2")
    assert step.difference < 1e-5 and step.after.params <= 0.5 * step.before.params


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_hooks_compute_is_left_alone_and_named():
    normed = nn.utils.weight_norm(nn.Conv2d(3, 8, 3))
    net = nn.Sequential(normed, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    step = prune(net, nets.images(), Budget(params="70%"), score="l2")
    assert set(step.plan.keep) == {"2"} and "computed from others" in step.trace.skipped["0"]


def test_layers_that_do_not_run_on_the_inputs_are_named():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.heads = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
            self.memory = nn.LSTM(8, 8)

        def forward(self, x, task=0):
            return self.heads[task](torch.relu(self.stem(x)).mean((2, 3)))

    skipped = trace(Heads(), (nets.images(), 1)).skipped
    assert "does not run on the example inputs" in skipped["heads.0"]
    assert "output" in skipped["heads.1"] and "recurrent" in skipped["memory"]
    assert not [
        why for why in trace(nets.make("attention"), nets.images()).skipped.values() if "not run" in why
    ]


def test_root_mean_square_norms_are_narrowed(tmp_path):
    net = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 2))
    nn.init.normal_(net[1].weight)
    step = prune(net, torch.randn(4, 5, 6), Budget(channels=7), score="l2")
    assert step.model[1].normalized_shape == (7,) and step.model[1].weight.shape == (7,)
    assert step.difference < 1e-5
    save(tmp_path / "small.pth", step.model)
    fresh = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(2, 5, 6)
    assert torch.equal(load(tmp_path / "small.pth", lambda: fresh)(x), step.model(x))
