"""Folding and equalizing BatchNorm change no output; recalibration changes statistics alone."""

from __future__ import annotations

import dataclasses

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, load, prune, save, trace
from pruning.surgery import equalize, fold_batchnorm, recalibrate
from pruning.training import accuracy
from pruning.utils.compare import compare
from pruning.utils.tree import tensors

pytestmark = [pytest.mark.quick, pytest.mark.numerics]


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


class Folding(nn.Module):
    """A convolution, a norm and a head; the first two may be of any class."""

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1)
        lively(self.norm)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


def lively(norm):
    """Randomize the statistics, scales and shifts of norms, so that losing them changes the outputs."""
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


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class ReadsWeight(Folding):
    def forward(self, x):
        return super().forward(x) * self.conv.weight.norm()


class ReadsOutput(Folding):
    def forward(self, x):
        seen = self.conv(x)
        return nets.Answer(self.head(torch.relu(self.norm(seen))), seen)


class OverTime(nn.Module):
    """BatchNorm1d normalizes dimension 1; the channels of the linear layer lie along the last."""

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
        lambda: Folding(conv=Standardized),
        lambda: Folding(conv=lambda *sizes: nn.utils.parametrizations.weight_norm(nn.Conv2d(*sizes))),
        ReadsWeight,
        ReadsOutput,
        OverTime,
        with_a_hook,
    ],
)
def test_a_norm_whose_folding_would_change_outputs_is_kept_and_counted(make):
    torch.manual_seed(0)
    net, images = make().eval(), nets.images()
    traced = trace(net, images)
    assert traced.foldable == {}
    assert compare(tensors(net(images)), tensors(fold_batchnorm(net, traced)(images)))[0] == ""


class ByTheSide(nn.Module):
    """A network that reads the weight of its middle convolution by numpy, which tracing cannot see."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Folding(), Folding(), Folding()

    def forward(self, x):
        scale = float(abs(self.middle.conv.weight.detach().numpy()).sum()) if x.device.type == "cpu" else 1
        return [block(x) * scale for block in (self.first, self.middle, self.last)]


def test_folding_is_checked_and_only_the_norm_at_fault_is_not_folded():
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


def test_a_layer_with_two_names_is_treated_as_one(tmp_path):
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


@pytest.mark.parametrize("name", nets.NETS)
def test_equalized_networks_compute_the_same(name):
    net, x = nets.make(name), nets.images()
    before = nets.snapshot(net)
    equal = equalize(net, trace(net, x), x)
    fresh = nets.images(8)
    torch.testing.assert_close(equal(fresh), net(fresh), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_equalized_channels_have_mean_square_one_behind_relu_and_are_unchanged_behind_others():
    net = nets.make("lenet")
    first, last = net.features.bn1, net.classifier.bn1
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0, 0
        first.weight[1], first.bias[1] = 1e-3, -0.5  # nearly constant: it must not become huge
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


def test_equalize_keeps_the_weight_norm_of_a_layer_before_a_norm_and_scales_other_layers():
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


# --- recalibration


def test_recalibrated_statistics_equal_those_of_the_data():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    nn.init.normal_(net[1].running_mean)
    batches = [torch.randn(32, 3) for _ in range(3)]
    assert recalibrate(net, batches).training and net[1].momentum == 0.1
    values = [net[0](x).detach() for x in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack([v.mean(0) for v in values]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([v.var(0) for v in values]).mean(0))


def test_one_calibration_image_changes_no_statistics():
    net = nets.make("lenet")
    before = nets.snapshot(net)
    recalibrate(net, [nets.images(1)])
    recalibrate(net, [])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    step = prune(net, nets.images(), Budget(params="50%"), calibration=[(nets.images(1), torch.tensor([1]))])
    assert accuracy(step.model, [(nets.images(), torch.tensor([0, 1]))]) >= 0


def test_norms_that_do_not_run_keep_their_statistics():
    """The auxiliary head does not run during calibration."""

    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.aux = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x, aux=False):
            return self.aux(x) if aux else self.norm(x)

    net = Aux()
    net.aux(torch.randn(8, 3))
    net.aux.running_mean.fill_(5)
    before = nets.snapshot(net.aux)
    recalibrate(net, [torch.randn(8, 3) + 2])
    assert all(torch.equal(before[key], value) for key, value in net.aux.state_dict().items())
    assert (net.norm.running_mean > 1).all()


def test_a_failed_recalibration_changes_nothing():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    nn.init.normal_(net[0].running_mean)
    before = nets.snapshot(net)
    with pytest.raises(RuntimeError):
        recalibrate(net, [torch.randn(8, 3), torch.randn(8, 4)])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net[0].momentum == 0.1


def test_frozen_norms_keep_their_statistics():
    net = nets.make("residual")
    frozen = net.stem[1].requires_grad_(False).running_mean.clone()
    others = net.blocks[0].inner[1].running_mean.clone()
    recalibrate(net, [nets.images(16)])
    assert torch.equal(net.stem[1].running_mean, frozen)
    assert not torch.equal(net.blocks[0].inner[1].running_mean, others)
