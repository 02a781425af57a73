"""Widths that only other code reads follow where a call proves it, and are listed otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning import Budget, doctor, load, prune, save, trace

pytestmark = pytest.mark.quick

IMAGES = torch.randn(2, 3, 8, 8)


class Split(nn.Module):
    """Chunks by default; with a flag, or in another method, it splits by an attribute."""

    def __init__(self, into, out):
        super().__init__()
        self.part, self.exports, self.first = out // 2, False, nn.Conv2d(into, out, 1)
        self.middle, self.last = nn.Conv2d(out // 2, out // 2, 3, 1, 1), nn.Conv2d(3 * (out // 2), out, 1)

    def forward(self, x):
        y = self.first(x)
        return self.joined(list(y.split((self.part, self.part), 1) if self.exports else y.chunk(2, 1)))

    def forward_split(self, x):
        return self.joined(list(self.first(x).split((self.part, self.part), 1)))

    def joined(self, parts):
        return self.last(torch.cat([*parts, torch.relu(self.middle(parts[-1]))], 1))


class Flagged(Split):
    forward_split = None


class Method(Split):
    def forward(self, x):
        return self.joined(list(self.first(x).chunk(2, 1)))


def by_flag(model):
    model[0].exports = True


def by_method(model):
    model[0].forward = model[0].forward_split


@pytest.mark.parametrize(("kind", "change"), [(Flagged, by_flag), (Method, by_method), (Split, by_flag)])
def test_attributes_follow_that_a_flag_or_another_forward_method_reads(kind, change, tmp_path):
    factory = lambda: nn.Sequential(kind(3, 16), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()  # noqa: E731
    net = factory()
    step = prune(net, IMAGES, Budget(macs="60%"), score="l2", widths={"0.first": 5})
    assert step.model[0].part == 5 and net[0].part == 8 and not step.stale
    expected = step.model(IMAGES)
    save(tmp_path / "small.pth", step.model)
    for small in (step.model, load(tmp_path / "small.pth", factory)):
        change(small)
        assert torch.allclose(small(IMAGES), expected, atol=1e-5)


class Grid(nn.Module):
    """Stores a grid for images of one size, as heads of detectors do: no parameter, and no buffer."""

    size = None

    def forward(self, x):
        if self.size != x.shape[2:]:
            self.size, self.grid = x.shape[2:], torch.linspace(0, 1, x.shape[3], device=x.device)
        return x + self.grid


def test_attributes_follow_in_a_model_that_stores_tensors_of_its_passes():
    net = nn.Sequential(Method(3, 16), Grid(), nn.Conv2d(16, 2, 1)).eval()
    step = prune(net, IMAGES, Budget(macs="60%"), score="l2", widths={"0.first": 5})
    assert step.model[0].part == 5 and not step.stale


class Trains(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.first = 16, nn.Conv2d(3, 16, 3, 1, 1)
        self.second, self.head = nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 4)

    def forward(self, x):
        y = torch.relu(self.second(torch.relu(self.first(x))))
        if self.training:
            y = y.reshape(len(x), self.channels(), -1).unflatten(2, x.shape[2:])
        return self.head(y.mean((2, 3)))

    def channels(self):
        return self.width


class TrainsBySixteen(Trains):
    def channels(self):
        return 16


def test_attributes_follow_that_only_training_reads():
    step = prune(Trains(), IMAGES, Budget(macs="50%"), score="l2", widths={"second": 7})
    assert step.model.width == 7
    step.model.train()(IMAGES).sum().backward()


def test_groups_that_fail_in_training_alone_are_left_with_the_reason():
    found = trace(TrainsBySixteen(), IMAGES)
    assert found.widths == {"first": 16}
    assert "in training mode, the model's code is tied to its width" in found.skipped["second"]


def test_a_model_that_does_not_train_on_the_inputs_is_pruned_as_before():
    class Never(Trains):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    assert trace(Never(), IMAGES).widths == {"first": 16, "second": 16}


class Latent(nn.Module):
    """Other methods read widths: one computes only, the other also writes."""

    def __init__(self):
        super().__init__()
        self.latent, self.hidden = 12, 24
        self.encoder, self.decoder, self.out = nn.Linear(20, 12), nn.Linear(12, 24), nn.Linear(24, 20)

    def forward(self, x):
        return self.decoded(torch.relu(self.encoder(x)))

    def decoded(self, z):
        return self.out(torch.relu(self.decoder(z)))

    def sample(self, n):
        return self.decoded(torch.randn(n, self.latent))

    def log(self, path):
        with open(path, "w") as file:
            file.write(str(self.hidden))


def test_attributes_follow_that_a_method_reads_which_only_computes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, x = Latent(), torch.randn(2, 20)
    step = prune(net, x, Budget(macs="50%"), score="l2", widths={"encoder": 5, "decoder": 11})
    assert step.model.latent == 5 and step.model.sample(3).shape == (3, 20)
    assert step.model.hidden == 24 and not [*tmp_path.iterdir()], "a method that writes is never called"
    (listed,) = step.stale
    assert listed.startswith("hidden = 24 was the width of decoder and is not read") and "also=" in listed
    found = doctor(net, x)
    assert found.stale == step.stale and listed in str(found)
    kept = prune(net, x, Budget(macs="80%"), score="l2", ignored=["decoder"])
    assert kept.stale == [], "its width did not change"
    followed = prune(net, x, Budget(macs="50%"), score="l2", also=[lambda m: torch.zeros(1, m.hidden).sum()])
    assert followed.stale == [], "it is read in a traced call"


def test_attributes_that_only_make_the_model_are_not_listed():
    class Planes(nn.Module):
        def __init__(self):
            super().__init__()
            self.planes = 3
            self.layers = nn.Sequential(self.layer(16), self.layer(8), nn.Conv2d(8, 2, 1))

        def layer(self, planes):
            made = nn.Conv2d(self.planes, planes, 3)
            self.planes = planes
            return made

        def forward(self, x):
            return self.layers(x)

    assert trace(Planes(), IMAGES).stale == ()


class Domains(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
        self.offset, self.last = nn.Parameter(torch.zeros(1, 8, 1, 1)), nn.Conv2d(8, 2, 1)

    def forward(self, x, domain=0):
        y = self.out(torch.relu(self.norms[domain](self.conv(x))))
        return self.last(y + self.offset if domain else y)


def test_norms_that_no_call_reaches_are_named_and_never_pruned_around():
    net = Domains().eval()
    found = trace(net, IMAGES)
    assert found.widths == {"out": 8}, "the offset goes along"
    assert found.skipped["conv"].startswith("norms.1 does not run on the example inputs")
    assert "also=" in found.skipped["conv"]
    assert trace(net, IMAGES, ["norms.1"]).widths == {"conv": 16, "out": 8}
    reached = trace(net, IMAGES, also=[(IMAGES, 1)])
    assert reached.widths == {"conv": 16, "out": 8}
    small = prune(net, IMAGES, Budget(macs="50%"), score="l2", also=[(IMAGES, 1)]).model
    assert copy.deepcopy(small)(IMAGES, 1).shape == net(IMAGES, 1).shape


class Heads(nn.Module):
    """Attention; only training reads the number of heads, and only `blank` the width of all of them."""

    def __init__(self):
        super().__init__()
        self.heads, self.depth, self.inner = 4, 6, 24
        self.qkv, self.out = nn.ModuleList(nn.Linear(12, 24) for _ in range(3)), nn.Linear(24, 12)

    def forward(self, x):
        heads = self.heads if self.training else -1
        q, k, v = (y(x).view(*x.shape[:2], heads, self.depth).transpose(1, 2) for y in self.qkv)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def blank(self, n):
        return self.out(torch.ones(n, self.inner))


def test_attributes_follow_that_count_heads_and_positions_of_heads():
    net, x = nn.Sequential(nn.Linear(5, 12), Heads(), nn.Linear(12, 3)), torch.randn(2, 7, 5)
    found = trace(net, x)
    widths = {name: 3 if width == 4 else 5 for name, width in found.widths.items() if width in (4, 6)}
    small = prune(net, x, Budget(macs="90%"), score="l2", widths=widths).model
    assert sorted(widths.values()) == [3, 5] and found.stale == ()
    assert (small[1].heads, small[1].depth, small[1].inner) == (3, 5, 15)
    small.train()(x).sum().backward()
    assert small[1].blank(2).shape == small[1](small[0](x))[:, 0].shape


class Branches(nn.Module):
    """RepVGG's block, depthwise: a convolution and an identity with norms, which `reparameterize` merges."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.groups, self.merged = channels, channels, None
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.norm, self.skip = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.skip(x) if self.merged is None else self.merged(x)

    def reparameterize(self):
        identity = torch.zeros_like(self.conv.weight)
        for i in range(self.channels):
            identity[i, i % (self.channels // self.groups), 1, 1] = 1
        self.merged = nn.Conv2d(self.channels, self.channels, 3, 1, 1, groups=self.groups)
        weight, bias = 0, 0
        for kernel, norm in ((self.conv.weight, self.norm), (identity, self.skip)):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = weight + kernel * scale.view(-1, 1, 1, 1)
            bias = bias + norm.bias - norm.running_mean * scale
        self.merged.weight.data, self.merged.bias.data = weight, bias


class Wave(nn.Module):
    """WaveNet's gates: one attribute holds the width of the stream and of the gates."""

    def __init__(self):
        super().__init__()
        self.channels, self.first = 8, nn.Conv1d(2, 8, 1)
        self.gates, self.mix, self.last = nn.Conv1d(8, 16, 3), nn.Conv1d(8, 16, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        gates = self.gates(x)
        mixed = self.mix(gates[:, : self.channels].tanh() * gates[:, self.channels :].sigmoid())
        return self.last(x[:, :, 2:] + mixed[:, : self.channels] + mixed[:, self.channels :].relu())


def test_numbers_that_a_reparameterization_reads_follow():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Branches(8), nn.ReLU(), Branches(8), nn.Conv2d(8, 2, 1))
    with torch.random.fork_rng():
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
    small = prune(net, IMAGES, Budget(macs="50%"), score="l1").model.eval()
    before = small(IMAGES)
    assert small[1].channels == small[1].groups == small[0].out_channels < 8
    small[1].reparameterize(), small[3].reparameterize()
    assert torch.allclose(small(IMAGES), before, atol=1e-5)


def test_an_attribute_that_holds_several_widths_follows_them_together():
    net, x = Wave(), torch.randn(2, 2, 9)
    small = prune(net, x, Budget(macs="50%"), score="l1").model
    assert small.channels == small.first.out_channels == small.gates.out_channels // 2 < 8


class Paths(nn.Module):
    """Splits by a part of an attribute, as timm's SelectiveKernel does."""

    def __init__(self):
        super().__init__()
        self.channels, self.first, self.last = 8, nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        first, second = self.first(x).split(self.channels // 2, 1)
        return self.last(first * second)


def test_an_attribute_of_which_code_takes_a_part_follows():
    small = prune(Paths(), IMAGES, Budget(macs="50%"), score="l1").model
    assert small.channels == small.first.out_channels == 2 * small.last.in_channels < 8
