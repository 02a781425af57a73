"""Programs of networks: their loops, in torch and in a browser, give the same outputs as PyTorch."""

from __future__ import annotations

import json
import re

import nets
import pytest
import torch
import torch.nn.functional as F
from browser import needs_browser
from nets import SMALL
from torch import nn

from models import CompactNet
from pruning.demo import demo, program
from pruning.demo.lowering import program_of
from pruning.deploy.export import TOLERANCE, folded
from pruning.deploy.runtimes import relative_difference

# --- networks that together contain every operation -------------------------------------


class Elementwise(nn.Module):
    """Activations and arithmetic, with numbers and with broadcasting."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(14, 1))

    def forward(self, x):
        x = self.conv(x)
        kinds = [
            F.elu,
            F.selu,
            F.hardswish,
            F.hardsigmoid,
            F.silu,
            F.mish,
            F.gelu,
            F.relu6,
            F.hardtanh,
            torch.erf,
        ]
        activations = [F.leaky_relu(x, 0.2), F.gelu(x, approximate="tanh"), *(kind(x) for kind in kinds)]
        x = torch.stack(activations).sum(0) / 12 - torch.sigmoid(x) * self.scale
        positive = x.abs() + 0.3
        x = x + positive.sqrt() - positive.rsqrt() + positive.log() * 0.1 + torch.reciprocal(positive + 1)
        x = torch.maximum(x, -x * 0.5) + torch.minimum(x, 1 - x) + (0.1 * x) ** 2 + 1.1**x
        x = x - x.mean()
        ties, capped = F.relu(x), x.clamp(max=0.3)  # comparisons that matter where both sides are equal
        pieces = (
            torch.where(ties > 0, x, x * x) + (ties >= 0) * x - (ties <= 0) * 0.5 + (capped < 0.3) * x.exp()
        )
        masked = torch.where(torch.logical_not(ties), 0.5, x) + (ties == 0) * 0.1
        return (pieces + masked + (ties != 0) * torch.tanh(x)).mean((2, 3))


class Pooling(nn.Module):
    """Windows with padding, dilation and ceilings; global and adaptive ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=(2, 1), dilation=(2, 3))

    def forward(self, x):
        x = F.pad(self.conv(x), (1, -1, 2, 0), value=0.3)
        found = [
            F.max_pool2d(x, 3, 2, 1),
            F.max_pool2d(x, 2, 2, ceil_mode=True),
            F.max_pool2d(x, (3, 2), 1, 1, dilation=2),
            F.avg_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            F.avg_pool2d(x, (2, 3), divisor_override=5),
            F.adaptive_avg_pool2d(x, (3, 5)),
            F.adaptive_max_pool2d(x, 3),
        ]
        return sum(each.sum((2, 3)) / each[0, 0].numel() for each in found)


class Moving(nn.Module):
    """Views, copies, reductions over inner dimensions, a product of activations, norms."""

    def __init__(self):
        super().__init__()
        self.norm, self.instance = nn.BatchNorm2d(3, affine=False), nn.InstanceNorm2d(3, affine=True)
        self.group, self.layer, self.prelu = nn.GroupNorm(3, 6), nn.LayerNorm(14), nn.PReLU(6)
        self.head = nn.Linear(27, 4)

    def forward(self, x):
        x = self.norm(x) + self.instance(x) + self.norm(F.relu(x))
        x = torch.cat([x, x.roll(1, 1)], 1)
        x = self.prelu(self.layer(self.group(x)))
        x = x.transpose(1, 2).unflatten(2, (2, 3))[:, ::3, :, 1:].permute(0, 3, 1, 2, 4)
        similar = (x[:, 0] @ x[:, 1].transpose(-1, -2)).softmax(1)
        last = similar @ x[:, 1]
        parts = similar.amax(1), similar.amin(2), last.max(1).values.mean(-1), last.min(-1).values
        x = torch.cat([part.flatten(1) for part in parts] + [x.new_full((1, 1), 0.5)], 1)
        x = x.expand(2, -1).sum(0, keepdim=True) + last.max()
        return self.head(x) + F.log_softmax(self.head(x), 1)


def crafted():
    torch.manual_seed(0)
    made = {"elementwise": Elementwise(), "pooling": Pooling(), "moving": Moving()}
    made["separable"] = CompactNet(
        ((4,), (6, 5)), separable=True, batch_norm=True, image_shape=(3, 14, 14), classes=4
    )
    made["probabilities"] = nn.Sequential(nets.make("plain"), nn.Softmax(1))
    names = ("residual", "dense", "inverted", "grouped", "tokens", "shuffled", "scaled", "attention")
    whole = {name: nets.make(name) for name in names}
    return {name: net.eval() for name, net in {**whole, **made}.items()}


# --- their outputs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page with all networks; writing it compares each program with its network."""
    path = tmp_path_factory.mktemp("demo") / "all.html"
    return demo(crafted(), path, SMALL, classes=["</script>", "<b>&amp;", "c@data@", "d"])


def test_the_networks_contain_every_operation(everything):
    assert everything.difference < TOLERANCE and len(everything.networks) == len(crafted())
    written = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', everything.path.read_text()
    )
    made = json.loads(written[1])["networks"]
    seen = {(op["kind"], op.get("name")) for each in made for op in each["program"]["ops"]}
    tables = {"map": program.MAPS, "zip": program.ZIPS, "rows": [*program.ROWS, "normalize"]}
    known = {(kind, name) for kind, names in tables.items() for name in names}
    assert seen == known | {
        ("conv", None),
        ("matmul", None),
        ("place", None),
        ("pool", "max"),
        ("pool", "mean"),
    }
    assert all(each["bytes"] == 4 * sum(each["program"]["constants"]) for each in made)


def test_a_program_computes_the_outputs_of_its_network():
    net = nets.make("residual")
    images = torch.randn(3, 3, 14, 14)
    made = program_of(folded(net.requires_grad_(False), [images]), images[:1])
    for x in images.split(1):
        assert relative_difference(net(x).flatten(), made(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "resnet18", "shufflenet_v2_x0_5"])
def test_torchvision_networks_are_lowered_to_programs(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net, x = torchvision.models.get_model(name, num_classes=10).eval(), torch.randn(1, 3, 64, 64)
    made = program_of(folded(net.requires_grad_(False), [x]), x)
    with torch.no_grad():
        assert relative_difference(net(x).flatten(), made(x)) < TOLERANCE
    assert not {"multiply", "normalize"} & {getattr(op.loop, "name", None) for op in made.ops}, (
        "norms are folded"
    )


@needs_browser
def test_the_browser_computes_every_operation(everything, shown):
    browser = shown(everything.path)
    assert float(browser("find('check').dataset.difference")) < TOLERANCE
    for name, table in (
        ("MAPS", program.MAPS),
        ("ZIPS", program.ZIPS),
        ("LOOPS", [loop.kind for loop in program.LOOPS]),
    ):
        assert set(browser(f"Object.keys({name})")) == set(table) - {"clamp"}, "clamp has its own loop"
    names = browser("[...find('bars').tBodies[0].rows].map(row => row.cells[0].textContent)")
    assert names == ["</script>", "<b>&amp;", "c@data@", "d"]
    sums = browser(
        "networks.map(n => probabilities(n, n.run(normalized(noise(1)[0]))).reduce((a, b) => a + b))"
    )
    assert sums == pytest.approx([1] * len(sums), abs=1e-5)
