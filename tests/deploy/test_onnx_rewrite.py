"""Rewritten ONNX files: what they compute, which poolings are fused, and which files are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import data
from models import LeNet5, YourNet
from pruning import export
from pruning.deploy import Exported, onnx_rewrite, optimize
from pruning.deploy.onnx_rewrite import TOLERANCE
from pruning.deploy.quantize import quantize
from pruning.deploy.runtimes import relative_difference
from pruning.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def strides(path):
    """Return the larger stride of each convolution of a file."""
    helper = onnx.helper
    how = [
        {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in onnx.load(path).graph.node
        if node.op_type == "Conv"
    ]
    return [max(each.get("strides", [1])) for each in how]


@pytest.fixture
def prefer(monkeypatch):
    """Patch the timing so that the variant with this number of fused poolings is the fastest."""

    def choose(count):
        def measured(variants, *_):
            return {name: 0.5 if name == str(count) else 1.0 for name in variants}

        monkeypatch.setattr(onnx_rewrite, "_ratios", measured)

    return choose


class Net(nn.Module):
    """Two convolutions, each followed by an activation and a pooling."""

    def __init__(self, pool, conv, activation=nn.ReLU, shape=(2, 19, 16)):
        super().__init__()
        first, second = nn.Conv2d(shape[0], 3, **conv), nn.Conv2d(3, 5, 2, bias=False)
        self.features = nn.Sequential(first, activation(), pool, second, activation(), pool)
        self.shape = shape

    def forward(self, x):
        return self.features(x).flatten(1)


NETS = {
    "odd sizes": lambda: Net(nn.MaxPool2d(2), {"kernel_size": 3}),
    "padding": lambda: Net(nn.MaxPool2d(2), {"kernel_size": 3, "padding": (2, 1)}),
    "windows of 2 x 3": lambda: Net(nn.MaxPool2d((2, 3)), {"kernel_size": (3, 1)}),
    "windows of 3 x 3": lambda: Net(nn.MaxPool2d(3), {"kernel_size": 1}, nn.Identity),
    "negative values": lambda: Net(nn.MaxPool2d(2), {"kernel_size": 3}, nn.LeakyReLU),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a network and its file, which is written once."""
    made = {}

    def find(name):
        if name not in made:
            torch.manual_seed(0)
            net, file = NETS[name](), tmp_path_factory.mktemp("nets") / "net.onnx"
            export(net, file, torch.zeros(1, *net.shape), "onnx", metadata={"seed": 1})
            made[name] = net, file
        return made[name]

    return find


@pytest.mark.parametrize("poolings", [0, 1, 2])
@pytest.mark.parametrize("name", NETS)
def test_every_variant_computes_the_same_outputs(name, poolings, prefer, exported, tmp_path):
    net, file = exported(name)
    prefer(poolings)
    made = optimize(file, tmp_path / "fast.onnx")
    assert (made.poolings, made.ratio) == (poolings, 0.5)
    assert made.size == made.path.stat().st_size and f"{poolings} pooling" in str(made)
    assert [stride > 1 for stride in strides(made.path)] == [True] * poolings + [False] * (2 - poolings)
    fast = Exported(made.path, "onnxruntime")
    for size in (1, 2, 5):
        images = torch.randn(size, *net.shape)
        assert relative_difference(net(images).detach(), fast(images)) <= TOLERANCE
    assert fast.metadata["seed"] == 1
    assert fast.metadata.get("optimization", {}).get("poolings in convolutions", 0) == poolings
    onnx.checker.check_model(onnx.load(made.path), full_check=True)


class PooledOutput(Net):
    """A network that also returns the input of its pooling."""

    def forward(self, x):
        x = self.features[:2](x)
        return self.features[2](x).flatten(1), x


NOT_FUSED = {
    "overlapping windows": lambda: Net(nn.MaxPool2d(3, stride=2), {"kernel_size": 3}),
    "a padded pooling": lambda: Net(nn.MaxPool2d(2, padding=1), {"kernel_size": 3}),
    "windows over the edge": lambda: Net(nn.MaxPool2d(2, ceil_mode=True), {"kernel_size": 3}),
    "another reader": lambda: PooledOutput(nn.MaxPool2d(2), {"kernel_size": 3}),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_poolings_are_not_fused(name, tmp_path):
    net = NOT_FUSED[name]()
    export(net, tmp_path / "net.onnx", torch.zeros(1, *net.shape), "onnx")
    before = (tmp_path / "net.onnx").read_bytes()
    made = optimize(tmp_path / "net.onnx", tmp_path / "net.onnx", seconds=0.01)
    assert (made.poolings, made.ratio) == (0, 1.0)
    assert made.path.read_bytes() == before


@pytest.mark.parametrize("conv", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"out": 32}])
def test_other_convolutions_are_not_fused(conv, tmp_path):
    out = conv.pop("out", 4)
    net = nn.Sequential(nn.Conv2d(2, out, 3, **conv), nn.ReLU(), nn.MaxPool2d(2))
    export(net, tmp_path / "net.onnx", torch.zeros(1, 2, 20, 20), "onnx")
    assert optimize(tmp_path / "net.onnx", tmp_path / "fast.onnx", seconds=0.01).poolings == 0


def test_a_variant_that_is_hardly_faster_is_not_chosen(prefer, tmp_path, monkeypatch):
    export(YourNet((4, 5), ()), tmp_path / "net.onnx", torch.zeros(1, 1, 28, 28), "onnx")
    monkeypatch.setattr(onnx_rewrite, "_ratios", lambda variants, *_: {"0": 1.0, "1": 0.99, "2": 0.985})
    assert optimize(tmp_path / "net.onnx", tmp_path / "fast.onnx").poolings == 0


def test_the_fastest_variant_is_measured(tmp_path):
    export(YourNet((4, 5), ()).eval(), tmp_path / "net.onnx", torch.zeros(1, 1, 28, 28), "onnx")
    made = optimize(tmp_path / "net.onnx", tmp_path / "fast.onnx", seconds=0.1)
    assert made.ratio <= 1 and made.poolings in (0, 1, 2)
    assert (made.poolings == 0) == (made.ratio == 1)


def test_a_rewritten_file_can_be_quantized(prefer, tmp_path):
    torch.manual_seed(0)
    digits = data.load("mnist5k", quiet=True)
    net = LeNet5((4, 5), ()).eval()
    export(net, tmp_path / "net.onnx", torch.zeros(1, 1, 28, 28), "onnx")
    prefer(2)
    optimize(tmp_path / "net.onnx", tmp_path / "net.onnx")
    training = [images for images, _ in digits.batches("train", 100)][:3]
    made = quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", training)
    assert made.agreement > 0.9
    stored = Exported(made.path, "onnxruntime").metadata
    assert stored["optimization"] == {"poolings in convolutions": 2} and stored["quantization"]["bits"] == 8


def test_files_that_cannot_be_optimized_are_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    export(Two(), tmp_path / "two.onnx", [torch.zeros(1, 3), torch.zeros(1, 3)], "onnx")
    with pytest.raises(ExportError, match="a single float32 input"):
        optimize(tmp_path / "two.onnx", tmp_path / "fast.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(ExportError, match="damaged"):
        optimize(tmp_path / "broken.onnx", tmp_path / "fast.onnx")
    with pytest.raises(ExportError, match="cannot be read"):
        optimize(tmp_path / "none.onnx", tmp_path / "fast.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "two.onnx"]
