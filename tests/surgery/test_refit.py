"""Refit: closed forms, exactness where the kept channels span the outputs, and what is left alone."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import nets
import pytest
import torch
from torch import nn
from torch.nn.functional import conv_transpose1d

from pruning import Budget, Plan, PruningError, prune, trace
from pruning.surgery.apply import apply, channel_constants
from pruning.surgery.linear_form import weight_uses
from pruning.surgery.refit import refit
from pruning.surgery.sites import Site, find_sites

pytestmark = [pytest.mark.quick, pytest.mark.numerics]

LAYERS = {
    "linear on tokens": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "linear on one row": (lambda: nn.Linear(5, 7, bias=False), (5,)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 11)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), (2, 4, 6, 5)),
    "reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, padding_mode="reflect"), (2, 4, 6, 5)),
    "circular": (
        lambda: nn.Conv3d(4, 8, 2, padding=1, stride=(1, 2, 3), padding_mode="circular"),
        (2, 4, 6, 5, 6),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 6, 5),
    ),
    "transposed, dilated": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, dilation=2), (2, 4, 6)),
    "one example": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_rows_times_its_matrix(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.double)
    with torch.no_grad():
        [use] = weight_uses(layer, x, {layer.weight})
    rows, outputs = next(use.form.rows(use.input, use.output))
    matrix = use.form.matrix(layer.weight)
    bias = 0 if layer.bias is None else layer.bias.view(outputs.shape[1:])
    torch.testing.assert_close(torch.einsum("rgi,gio->rgo", rows, matrix) + bias, outputs)
    assert torch.equal(use.form.as_weight(matrix, layer.weight), layer.weight)


def pruned(net, images, plan):
    traced = trace(net, images)
    return traced, plan, apply(net, traced, plan)


def error(one, other, images):
    with torch.no_grad():
        wanted = other(images)
        return float((one(images) - wanted).norm() / wanted.norm())


def redundant(reader, made=8, rank=4):
    """A network whose 8 inner channels are linear combinations of the first 4."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, made, 1), reader)
    with torch.no_grad():
        mix = torch.randn(made - rank, rank)
        net[0].weight[rank:] = (mix @ net[0].weight[:rank].flatten(1)).view_as(net[0].weight[rank:])
        net[0].bias[rank:] = mix @ net[0].bias[:rank]
    return net.double().eval()


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(8, 5, 3),
        nn.Conv2d(8, 5, 3, padding=1, stride=2),
        nn.ConvTranspose2d(8, 5, 2, stride=2),
        nn.Sequential(nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5)),
    ],
    ids=["conv", "padded", "transposed", "norm behind"],
)
def test_channels_that_are_combinations_of_the_others_are_removed_without_error(reader):
    net, images = redundant(copy.deepcopy(reader)), torch.randn(16, 3, 7, 7, dtype=torch.double)
    traced, plan, small = pruned(net, images, Plan({"0": (0, 1, 2, 3)}))
    assert error(small, net, images) > 0.1
    [fit] = refit(small, net, traced, plan, [images])
    assert error(small, net, torch.randn(4, 3, 7, 7, dtype=torch.double)) < 1e-3
    assert fit.ridge is not None and fit.after < 1e-3 < fit.before


def test_the_weights_are_those_of_ridge_regression():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    images = torch.randn(80, 6, dtype=torch.double)
    traced, plan, small = pruned(net, images, Plan({"0": (1, 2, 4, 6, 7)}))
    old = small[2].weight.detach().clone()
    [fit] = refit(small, net, traced, plan, [images])
    with torch.no_grad():
        x = small[1](small[0](images))
        wrong = net(images) - (x @ old.T + net[2].bias)
        centered, target = x - x.mean(0), wrong - wrong.mean(0)
        gram = centered.T @ centered
        unit = gram.diagonal().diag()
        change = torch.linalg.solve(gram + fit.ridge * unit, centered.T @ target)
    torch.testing.assert_close(small[2].weight, old + change.T)
    torch.testing.assert_close(small(images).mean(0), net(images).mean(0))


@pytest.mark.parametrize(
    "name", ["residual", "inverted", "shuffled", "up_and_down", "tokens", "grouped", "dense", "patches"]
)
def test_no_layer_gets_worse_and_the_network_comes_closer(name):
    net = nets.make(name).eval()
    images = nets.images(32)
    step = prune(net, images[:2], Budget(macs="60%"), score="l2", ranking="group", check=False)
    small = apply(net, step.trace, step.plan)
    before = error(small, net, images)
    fits = refit(small, net, step.trace, step.plan, list(images.split(8)))
    assert error(small, net, images) < before
    assert all(fit.after <= fit.before or fit.reason for fit in fits)


def test_a_layer_is_left_as_it_was_where_refitting_does_not_help():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
    images = torch.randn(8, 4)
    images[6:] = 50 * torch.randn(2, 4)  # the rows held out have nothing in common with the others
    traced, plan, small = pruned(net, images, Plan({"0": tuple(range(199))}))
    before = copy.deepcopy(small.state_dict())
    fits = refit(small, net, traced, plan, [images])
    for fit in fits:
        if fit.ridge is None:
            assert fit.reason and torch.equal(small.state_dict()["2.weight"], before["2.weight"])
        else:
            assert fit.after < fit.before


def test_prune_refits_after_the_check_and_reports_each_layer():
    net, images = nets.make("residual").eval(), nets.images(32)
    calibration = [(part, None) for part in images.split(8)]
    options = {"score": "l2", "ranking": "group", "calibration": calibration}
    plain = prune(net, images[:2], Budget(macs="60%"), **options)
    step = prune(net, images[:2], Budget(macs="60%"), refit=True, **options)
    assert step.plan == plain.plan and step.difference == plain.difference and plain.refits == ()
    assert step.refits and error(step.model, net, images) < error(plain.model, net, images)
    with pytest.raises(PruningError, match="needs calibration batches"):
        prune(net, images[:2], Budget(macs="60%"), score="l2", refit=True)


def test_inputs_that_cannot_be_used_are_rejected():
    net, images = redundant(nn.Conv2d(8, 5, 3)), torch.randn(4, 3, 7, 7, dtype=torch.double)
    traced, plan, small = pruned(net, images, Plan({"0": (0, 1, 2)}))
    with pytest.raises(PruningError, match="there are none"):
        refit(small, net, traced, plan, [])
    for value in (float("nan"), float("inf")):
        broken = images.clone()
        broken[0, 0, 0, 0] = value
        before = copy.deepcopy(small.state_dict())
        with pytest.raises(PruningError, match="'1' has inputs or outputs that are not finite"):
            refit(small, net, traced, plan, [broken])
        assert all(torch.equal(small.state_dict()[key], kept) for key, kept in before.items())


def test_a_layer_used_twice_is_fitted_to_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.shared, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.shared(torch.relu(self.shared(torch.relu(self.into(x))))))

    torch.manual_seed(0)
    net, images = Twice(), torch.randn(64, 4)
    traced = trace(net, images)
    plan = Plan({name: tuple(range(group.channels - 2)) for name, group in traced.groups.items()})
    small = apply(net, traced, plan)
    before = error(small, net, images)
    refit(small, net, traced, plan, [images])
    assert error(small, net, images) < before


class Padded(nn.Conv2d):
    """A convolution with its own code, as in networks that pad like TensorFlow."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, None, self.stride)


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("conv", [nn.Conv2d, Padded])
def test_the_offset_goes_into_the_norm_behind_and_counts_constants_once(conv, constants):
    torch.manual_seed(0)
    reader = conv(8, 5, 1, bias=False)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), reader, nn.BatchNorm2d(5)).double().eval()
    net[3].running_mean.normal_()
    net[3].running_var.uniform_(0.5, 2)
    images = torch.randn(32, 3, 6, 6, dtype=torch.double)
    traced, plan = trace(net, images), Plan({"0": (0, 1, 2, 4, 5)})
    small = apply(net, traced, plan, channel_constants(net, traced, [images]) if constants else None)
    [fit] = refit(small, net, traced, plan, [images])
    assert fit.ridge is not None
    with torch.no_grad():
        torch.testing.assert_close(small(images).mean((0, 2, 3)), net(images).mean((0, 2, 3)))


def test_a_residual_block_mends_the_error_of_its_input():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.first(x)
            return x + self.last(torch.tanh(self.second(x)))

    torch.manual_seed(0)
    net, images = Block().double(), torch.randn(400, 4, dtype=torch.double)
    traced = trace(net, images)
    small = copy.deepcopy(net)
    with torch.no_grad():
        small.first.weight += 0.1 * torch.randn_like(small.first.weight)
        small.second.load_state_dict(net.second.state_dict())
    plan = Plan({"second": (0, 1, 2, 3, 4)})
    small = apply(small, traced, plan)
    before = error(small, net, images)
    sites = find_sites(net, images, {getattr(net, n).weight: n for n in ("first", "second", "last")})
    assert sites == [Site("first"), Site("second"), Site("last", added=True)]
    fits = refit(small, net, traced, plan, [images])
    with torch.no_grad():
        features = torch.tanh(small.second(small.first(images)))
        rows = torch.cat([features, torch.ones(len(features), 1, dtype=torch.double)], 1)
        wanted = net(images) - small.first(images)
        best = rows @ torch.linalg.lstsq(rows, wanted).solution
        least = float((best - wanted).norm() / net(images).norm())
    assert fits[-1].layer == "last" and error(small, net, images) < min(before, 1.02 * least)


def shrinking():
    """A network whose first layers hold the most memory."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [lambda: nets.make("residual").eval(), shrinking], ids=["even", "shrinking"])
def test_layers_are_fitted_alike_in_one_pass_and_in_passes_of_their_own(monkeypatch, make):
    net, images = make(), nets.images(32)
    traced = trace(net, images[:2])
    plan = Plan({name: tuple(range(0, group.channels, 2)) for name, group in traced.groups.items()})
    found, threads = [], threading.active_count()
    weights = {module.weight: name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    sizes = [site.size for site in find_sites(net, images[:8], weights)]
    for most in (1 << 40, 2 * 2 * max(sizes), 2 * max(sizes) - 1, -1):  # all, two, none at first, none
        monkeypatch.setattr("pruning.surgery.refit.MOST_BYTES", most)
        small = apply(net, traced, plan)
        found.append((refit(small, net, traced, plan, list(images.split(8))), small(images)))
    for fits, outputs in found[1:]:
        assert [fit.layer for fit in fits] == [fit.layer for fit in found[0][0]]
        torch.testing.assert_close(outputs, found[0][1], rtol=1e-3, atol=1e-4)
    assert threading.active_count() == threads


def test_an_error_in_the_model_ends_the_passes():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.fails = nn.Linear(4, 6), nn.Linear(6, 2), False

        def forward(self, x):
            x = self.two(torch.relu(self.one(x)))
            if self.fails:
                raise ValueError("of the model")
            return x

    net, images = Fails(), torch.randn(8, 4)
    traced, plan = trace(net, images), Plan({"one": (0, 1)})
    small = apply(net, traced, plan)
    small.fails = True
    with pytest.raises(ValueError, match="of the model"):
        small(images)
    threads = threading.active_count()
    fits = refit(small, net, traced, plan, [images])  # the pass ends at the last layer
    assert [fit.layer for fit in fits] == ["two"] and threading.active_count() == threads


def test_transposed_convolutions_of_torch_and_of_rows_agree_on_padding():
    x, weight = torch.randn(2, 3, 9), torch.randn(3, 4, 5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return conv_transpose1d(x, self.weight, None, 2, 3, 1)

    net = Net()
    with torch.no_grad():
        [use] = weight_uses(net, x, {net.weight})
    rows, outputs = next(use.form.rows(use.input, use.output))
    found = torch.einsum("rgi,gio->rgo", rows, use.form.matrix(weight))
    torch.testing.assert_close(found, outputs, atol=1e-4, rtol=1e-4)


def test_a_layer_whose_weight_is_computed_is_named_and_left_as_it_was():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    net, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), normed), torch.randn(32, 4)
    traced, plan, small = pruned(net, images, Plan({"0": (0, 2, 3, 5)}))
    before = small[2].weight.detach().clone()
    [fit] = refit(small, net, traced, plan, [images])
    assert fit.layer == "2" and fit.ridge is None and "by its weight itself" in fit.reason
    assert torch.equal(small[2].weight, before)


#: Prints by how many bytes refits, with less and less limited memory, raise the peak of the memory in use.
PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
import pruning.surgery.refit as module
from pruning import Plan, trace
from pruning.surgery.apply import apply

def block(inputs, outputs, size=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, size), nn.BatchNorm2d(outputs), nn.ReLU())

def peak():  # not ru_maxrss, which begins with the memory of the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
net = nn.Sequential(block(3, 48), block(48, 48), block(48, 16, 4), block(16, 16), nn.Conv2d(16, 4, 1)).eval()
batches = list(torch.randn(96, 3, 64, 64).split(8))
traced = trace(net, batches[0][:2])
plan = Plan({name: tuple(range(group.channels // 2)) for name, group in traced.groups.items()})
before = peak()
for most in map(int, sys.argv[1:]):
    module.MOST_BYTES = most
    fits = module.refit(apply(net, traced, plan), net, traced, plan, batches)
    print(len(fits), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is that of Linux")
def test_memory_is_limited():
    words = [sys.executable, "-c", PEAK, str(1 << 26), str(1 << 40)]
    done = subprocess.run(words, capture_output=True, check=True, text=True)
    (fits, limited), (others, peak) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert fits == others == 4
    assert limited < 1 << 28 < peak  # which includes the batch that runs and the solution


def test_sites_state_the_bytes_in_use():
    net = shrinking()
    weights = {module.weight: name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    images = torch.randn(4, 3, 16, 16)
    sizes = [site.size for site in find_sites(net, images, weights)]
    pixel, inputs = 4 * 16 * 16 * 4, 4 * 3 * 16 * 16 * 4  # bytes of a channel, and of the inputs
    assert sizes[0] == 16 * pixel + inputs
    assert sizes[1] == 16 * pixel + inputs + 8 * pixel // 16  # the ReLU's input is no longer in use
    assert sizes[2] == inputs + 16 * pixel // 16
