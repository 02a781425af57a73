"""The page in which a network says what is drawn: what it computes, what it shows, what is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import BROWSER, Browser
from PIL import Image
from torch import nn

import data
from models import CompactNet
from pruning import ExportError, PruningError, cli, load, save
from pruning.__main__ import main
from pruning.commands import parse
from pruning.demo import Images, demo, program
from pruning.demo.lowering import program_of
from pruning.export import TOLERANCE, folded
from pruning.runtimes import difference

ROOT = Path(__file__).resolve().parent.parent
YOURNET = ROOT / "checkpoints" / "YourNet" / "best.pth"
LENET = ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth"
SMALL = Images((3, 14, 14), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
needs_browser = pytest.mark.skipif(BROWSER is None or os.name != "posix", reason="needs Chromium")


# --- networks that together need every operation ----------------------------------------


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


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page with all of them; writing it compares each program with its network."""
    path = tmp_path_factory.mktemp("demo") / "all.html"
    return demo(crafted(), path, SMALL, classes=["</script>", "<b>&amp;", "c@data@", "d"])


def test_every_operation_is_needed(everything):
    assert everything.difference < TOLERANCE and len(everything.networks) == len(crafted())
    written = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', everything.path.read_text()
    )
    made = json.loads(written[1])["networks"]
    seen = {(op["kind"], op.get("name")) for each in made for op in each["program"]["ops"]}
    tables = {"map": program._MAPS, "zip": program._ZIPS, "rows": [*program._ROWS, "normalise"]}
    known = {(kind, name) for kind, names in tables.items() for name in names}
    assert seen == known | {
        ("conv", None),
        ("matmul", None),
        ("place", None),
        ("pool", "max"),
        ("pool", "mean"),
    }
    assert all(each["bytes"] == 4 * sum(each["program"]["constants"]) for each in made)


def test_a_program_takes_any_example():
    net = nets.make("residual")
    images = torch.randn(3, 3, 14, 14)
    made = program_of(folded(net.requires_grad_(False), [images]), images[:1])
    for x in images.split(1):
        assert difference(net(x).flatten(), made(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "resnet18", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_have_programs(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net, x = torchvision.models.get_model(name, num_classes=10).eval(), torch.randn(1, 3, 64, 64)
    made = program_of(folded(net.requires_grad_(False), [x]), x)
    with torch.no_grad():
        assert difference(net(x).flatten(), made(x)) < TOLERANCE
    assert not {"multiply", "normalise"} & {op.get("name") for op in made.ops}, "norms are folded"


# --- in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    with Browser() as browser:
        yield browser


@pytest.fixture
def shown(chromium):
    """Opens a page, which must find itself right and never complain."""

    def show(path):
        chromium.look()
        chromium.complaints.clear()
        chromium.open(path)
        said = chromium.until("find('check').dataset.agrees && find('check').textContent")
        assert said.startswith("Checked in this browser: on "), said
        return chromium

    yield show
    assert chromium.complaints == []


@pytest.fixture
def run(monkeypatch, capsys):
    """`python -m pruning demo …` in this process: exit code, output and errors."""
    threads = torch.get_num_threads()

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pruning", "demo", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.run(main)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    yield call
    torch.set_num_threads(threads)


def thinned(ink):
    """The medial lines of a boolean image (Zhang and Suen 1984)."""
    ink, before = np.pad(ink, 1), None
    around = [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)]
    while before is None or (ink != before).any():
        before = ink
        for turn in (0, 4):  # from one side, then from the other
            near = [np.roll(ink, shift, (0, 1)) for shift in around[turn:] + around[:turn]]
            count = np.sum(near, 0)
            edges = np.sum([~a & b for a, b in zip(near, near[1:] + near[:1], strict=True)], 0)
            up, right, down, left = near[::2]
            inside = (up & right & down) | (right & down & left)
            ink = ink & ~((count >= 2) & (count <= 6) & (edges == 1) & ~inside)
    return ink[1:-1, 1:-1]


def strokes_of(image):
    """Short strokes along the middle of a digit's lines, in units of its width."""
    line = thinned(image > 100)
    strokes = []
    for y, x in np.argwhere(line).tolist():
        ahead = [(y, x + 1), (y + 1, x), (y + 1, x + 1), (y + 1, x - 1)]
        there = [(b, a) for a, b in ahead if a < 28 and 0 <= b < 28 and line[a, b]]
        strokes += [[(x, y), end] for end in there] or [[(x, y)]]
    return [[[(x + 0.5) / 28, (y + 0.5) / 28] for x, y in stroke] for stroke in strokes]


DRAW = """async (strokes) => {
  find("clear").click();
  const box = paper.getBoundingClientRect();
  for (const points of strokes) {
    const fire = (name, [x, y]) => paper.dispatchEvent(new PointerEvent(name, {
      bubbles: true, pointerId: 7, clientX: box.left + x * box.width, clientY: box.top + y * box.width}));
    fire("pointerdown", points[0]);
    points.slice(1).forEach((point) => fire("pointermove", point));
    fire("pointerup", points.at(-1));
  }
  await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  const ready = normalised(input());
  return {said, heard: find("said").textContent, pixels: Array.from(input()),
          logits: networks.map((network) => Array.from(network.run(ready)))};
}"""


def drawn(browser, strokes):
    return browser(f"({DRAW})({json.dumps(strokes)})")


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k", quiet=True).test


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """YourNet beside LeNet-5, with digits to click on, as the command writes it."""
    path = tmp_path_factory.mktemp("demo") / "page.html"
    words = ["--against", LENET, "--output", path, "--data", "data:loaders", "--data-arg", "name=mnist5k"]
    args, command = parse(["demo", *map(str, [YOURNET, *words])])
    threads, said = torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(said):
        command(args)
    torch.set_num_threads(threads)
    size = f"{path.stat().st_size:,} bytes"
    assert re.fullmatch(f"{path}: LeNet5 and YourNet, {size}; the page's operations .*\n", said.getvalue())
    return path


@needs_browser
def test_the_page_reads_drawn_digits_as_pytorch_does(page, digits, shown):
    models = [load(LENET), load(YOURNET)]
    right = 0
    browser = shown(page)
    assert float(browser("find('check').dataset.difference")) < 1e-6
    for image, label in zip(digits.images[::25, 0].numpy(), digits.labels[::25].tolist(), strict=True):
        found = drawn(browser, strokes_of(image))
        pixels = torch.tensor(found["pixels"], dtype=torch.float32).reshape(1, 1, 28, 28)
        assert_like_mnist(pixels[0, 0].numpy())
        for model, logits, (name, says, share) in zip(models, found["logits"], found["said"], strict=True):
            with torch.no_grad():
                expected = model((pixels / 255 - 0.1307) / 0.3081)
            assert difference(expected.flatten(), torch.tensor(logits)) < TOLERANCE
            assert says == str(expected.argmax().item())
            assert f"{name}: {says}{share}" in found["heard"]
            right += says == str(label)
    assert right >= 0.9 * 2 * 40, right


def assert_like_mnist(pixels):
    """The box of MNIST's digits, and the place of their centre of mass."""
    rows, columns = (np.flatnonzero(pixels.sum(axis) > 40) for axis in (1, 0))
    assert 17 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
    across, down = np.meshgrid(np.arange(28), np.arange(28))
    assert abs((pixels * across).sum() / pixels.sum() - 14) < 0.1
    assert abs((pixels * down).sum() / pixels.sum() - 14) < 0.1


SEVEN = [(0.3, 0.22), (0.72, 0.2), (0.6, 0.45), (0.5, 0.85)]


@needs_browser
def test_mouse_finger_keyboard_and_examples(page, shown):
    browser = shown(page)
    browser.look(400, 800)
    left, top, size = browser("(box => [box.left, box.top, box.width])(paper.getBoundingClientRect())")
    places = [(left + size * x, top + size * y) for x, y in SEVEN]
    says = "said.map(each => each[1]).join('')"
    browser.mouse("mousePressed", *places[0])
    for place in places[1:]:
        browser.mouse("mouseMoved", *place)
    browser.mouse("mouseReleased", *places[-1])
    browser.mouse("mouseMoved", left, top)  # without the button: nothing is drawn
    assert browser.until(says + " === '77'")
    assert "LeNet5: 7, " in browser.until("find('said').textContent")
    whole = browser("Array.from(input())")
    half = drawn(browser, [[[0.4 + x / 2, 0.3 + y / 2] for x, y in SEVEN]])["pixels"]
    assert np.abs(np.subtract(whole, half)).mean() < 3, "neither size nor place matters"

    browser("find('clear').focus()")
    browser.key("Enter")
    browser.until(says + " === '––'")
    browser.touch("touchStart", places[0])
    for place in places[1:]:
        browser.touch("touchMove", place)
    browser.touch("touchEnd")
    assert browser.until(says + " === '77'") and browser("scrollY") == 0

    browser("paper.focus()")
    browser.key("Escape")
    browser.until(says + " === '––'")
    for key in ["ArrowUp"] * 8 + [" "] + ["ArrowDown"] * 16 + [" "]:
        browser.key(key)
    assert browser.until(says + " === '11'")
    browser.mouse("mousePressed", *places[0])
    browser("find('clear').click()")
    browser.mouse("mouseMoved", *places[1])
    browser.mouse("mouseReleased", *places[1])
    assert browser.until(says + " === '––'") and browser("blank()"), "clearing ends a stroke"
    for digit in range(10):
        browser(f"find('examples').children[{digit}].click()")
        assert browser.until(says + f" === '{digit}{digit}'")
    assert drawn(browser, [SEVEN])["said"][1][1] == "7", "a stroke takes the place of an example"
    browser.until("!find('again').disabled")
    browser("find('again').click()")
    assert browser("find('again').disabled") and browser.until("!find('again').disabled")


@needs_browser
def test_the_page_fits_its_window_and_follows_the_setting(page, shown):
    browser = shown(page)
    drawn(browser, [SEVEN])
    browser.until("!find('again').disabled")
    cells = "[...find('facts').tBodies[0].rows].map(row => +row.cells[2].dataset.value)"
    assert browser(cells)[:3] == [1485, 47366, 5940] and 0 < browser(cells)[3] < 10
    for width, dark in [(400, False), (400, True), (1400, False), (1400, True)]:
        browser.look(width, 900, dark)
        browser("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        assert browser("document.documentElement.scrollWidth") <= width
        wide = browser("[...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)")
        assert wide == [0], "no table needs scrolling"
        least = browser("Math.min(...[...document.querySelectorAll('button')].map(b => b.offsetHeight))")
        assert least >= 24, "large enough for a finger"
        shade = browser(
            "(c => (c.drawImage(paper, 0, 0), c.getImageData(0, 0, 1, 1).data[0]))(canvasOf(1, 1))"
        )
        assert (shade < 100) == dark
        beside = browser("find('answers').getBoundingClientRect().left > paper.offsetWidth")
        assert beside == (width == 1400)


@needs_browser
def test_every_operation_in_the_browser(everything, shown):
    browser = shown(everything.path)
    assert float(browser("find('check').dataset.difference")) < TOLERANCE
    for name, table in (("MAPS", program._MAPS), ("ZIPS", program._ZIPS), ("LOOPS", program._LOOPS)):
        assert set(browser(f"Object.keys({name})")) == set(table) - {"clamp"}, "clamp has its own loop"
    names = browser("[...find('bars').tBodies[0].rows].map(row => row.cells[0].textContent)")
    assert names == ["</script>", "<b>&amp;", "c@data@", "d"]
    sums = browser(
        "networks.map(n => probabilities(n, n.run(normalised(noise(1)[0]))).reduce((a, b) => a + b))"
    )
    assert sums == pytest.approx([1] * len(sums), abs=1e-5)


@needs_browser
def test_a_colour_network_takes_pictures(tmp_path, shown):
    made = demo({"net": nets.make("residual")}, tmp_path / "net.html", SMALL)
    pixels = torch.randint(256, (14, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "same.png")
    Image.new("RGB", (60, 28), (10, 200, 30)).save(tmp_path / "wide.png")
    (tmp_path / "no.png").write_text("not a picture")
    browser = shown(made.path)

    def choose(name):
        root = browser.send("DOM.getDocument")["root"]["nodeId"]
        node = browser.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / name)])

    assert browser("getComputedStyle(find('file').parentElement).display") != "none"
    choose("same.png")
    assert browser.until("input() && Array.from(input())") == pixels.permute(2, 0, 1).flatten().tolist()
    choose("wide.png")
    assert browser.until("input()[0] === 10 && Array.from(input())") == [10] * 196 + [200] * 196 + [30] * 196
    choose("no.png")
    assert "not a picture" in browser.until("find('trouble').textContent")
    choose("same.png")
    assert browser.until("find('trouble').textContent === '' && input()[0]") == int(pixels[0, 0, 0])
    browser("find('ink').value = '#ff0000'")
    found = drawn(browser, [[[0.1, 7.5 / 14], [0.9, 7.5 / 14]]])["pixels"]
    red, green = np.array(found).reshape(3, 14, 14)[:2]
    assert red.min() > 250 and green[0].min() == 255 and green[7, 7] < 100, "red on white"
    with torch.no_grad():
        expected = nets.make("residual")(
            SMALL.normalised(torch.tensor(found, dtype=torch.uint8).view(3, 14, 14))
        )
    got = browser("Array.from(networks[0].run(normalised(input())))")
    assert difference(expected.flatten(), torch.tensor(got)) < TOLERANCE


@needs_browser
def test_torchvisions_networks_in_the_browser(tmp_path, shown):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    made = {
        name: torchvision.models.get_model(name, num_classes=30) for name in ("squeezenet1_1", "mobilenet_v2")
    }
    images = Images((3, 64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    path = demo(made, tmp_path / "two.html", images, title="Two").path
    browser = shown(path)
    assert browser("find('bars').tBodies[0].rows.length") == 10
    found = drawn(browser, [SEVEN])
    order = np.argsort(-np.array(found["logits"][1]))[:10].tolist()
    names = browser("[...find('bars').tBodies[0].rows].map(row => +row.cells[0].textContent)")
    assert names == order, "of many classes the likeliest"


@needs_browser
def test_a_page_that_computes_something_else_says_so(tmp_path, chromium):
    path = demo({"net": nets.make("lenet")}, tmp_path / "net.html", SMALL).path
    found = re.search(r'"expected":\[\[(-?[\d.e-]+)', path.read_text())
    path.write_text(
        path.read_text().replace(found[0], found[0].replace(found[1], str(float(found[1]) + 0.01)))
    )
    with Browser() as browser:
        browser.open(path)
        assert browser.until("find('check').dataset.agrees") == "false"
        assert "do not trust them" in browser("find('check').textContent")


# --- without one ------------------------------------------------------------------------


def test_a_page_needs_nothing_else(tmp_path):
    net = nets.make("lenet").train()
    before = nets.snapshot(net)
    path = demo(
        {"net & more": net}, tmp_path / "net.html", SMALL, facts={"net & more": {"command": "<γ>"}}
    ).path
    page = path.read_text()
    assert not re.search(r"""(src|href|action)=["']""", page) and "url(" not in page and "http" not in page
    assert "<h1>net &amp; more</h1>" in page and "&lt;\\u03b3&gt;" in page
    assert not re.search(r"@\w+@", page) and str(ROOT) not in page
    assert net.training and all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["net.html"]


def test_what_the_package_installs_holds_the_parts_of_the_page():
    settings = cli.tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts): p.parent for p in ROOT.glob("pruning/**/__init__.py")
    }
    assert set(settings["packages"]) == set(folders)
    for package, folder in folders.items():
        others = {p.name for p in folder.iterdir() if p.suffix not in (".py", ".pyc") and p.is_file()}
        patterns = settings["package-data"].get(package, [])
        assert others == {p.name for each in patterns for p in folder.glob(each) if p.suffix != ".py"}


class Lacking(nn.Module):
    """What cannot be shown, by name."""

    def __init__(self, how="operation"):
        super().__init__()
        self.how, self.layer = how, nn.Linear(9, 3)

    def forward(self, x):
        y = self.layer(x.flatten(1)[:, :9])
        if self.how == "operation":
            return torch.special.bessel_j0(y)
        if self.how == "random":
            return y + torch.rand(1, 3)
        if self.how == "by data":
            return y if y.sum() > 0 else -y
        if self.how == "whole numbers":
            return y.argmax(1, keepdim=True) * y
        if self.how == "image":
            return x
        if self.how == "number":
            return y * float("nan")
        return {"several": (y, y), "transposed": y}[self.how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("operation", r"no rule for .*bessel_j0"),
        ("random", r"no rule for rand, which draws at random"),
        ("by data", r"cannot be traced by torch.export: .*data-dependent"),
        ("whole numbers", r"no rule for argmax of int64"),
        ("image", r"is no classifier: outputs \(N, classes\) were expected, it gives \(1, 3, 14, 14\)"),
        ("number", r"differ from the model by inf"),
        ("several", r"is no classifier.*it gives tuple"),
    ],
)
def test_what_cannot_be_shown_is_named_and_leaves_nothing(how, message, tmp_path):
    (tmp_path / "old.html").write_text("as it was")
    for name in ("new.html", "old.html"):
        with pytest.raises(PruningError, match=message):
            demo({"net": Lacking(how)}, tmp_path / name, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "as it was"


def test_bad_networks_classes_and_images_are_named(tmp_path, monkeypatch):
    for net, message in [
        (
            nn.Sequential(nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(512, 3)),
            "transposed convolution",
        ),
        (
            nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 2, 3), nn.Flatten(), nn.Linear(388, 3)),
            "1-d convolution",
        ),
    ]:
        with pytest.raises(ExportError, match=message):
            demo({"net": net}, tmp_path / "net.html", SMALL)
    with pytest.raises(PruningError, match=r"numbers of classes differ: a: 4, b: 9"):
        demo(
            {"a": nets.make("lenet"), "b": nn.Sequential(nn.Flatten(), nn.Linear(588, 9))},
            tmp_path / "x",
            SMALL,
        )
    monkeypatch.setattr("pruning.demo.writer.LARGEST", 5000)
    with pytest.raises(PruningError, match=r"[\d,]+ bytes of weights are too many for a page"):
        demo({"a": nets.make("lenet"), "b": nets.make("lenet")}, tmp_path / "x", SMALL)
    monkeypatch.undo()
    with pytest.raises(PruningError, match="names: 2"):
        demo({"a": nets.make("lenet")}, tmp_path / "x", SMALL, classes=["one", "two"])
    with pytest.raises(PruningError, match="more classes than the networks"):
        images = Images((3, 14, 14), SMALL.mean, SMALL.std, [(torch.zeros(3, 14, 14, dtype=torch.uint8), 9)])
        demo({"a": nets.make("lenet")}, tmp_path / "x", images)
    with pytest.raises(PruningError, match="2x14x14: a page can draw images of 1 or 3 channels"):
        Images((2, 14, 14), (0, 0), (1, 1))
    with pytest.raises(PruningError, match="positive standard deviation for each channel"):
        Images((3, 14, 14), (0, 0, 0), (1, 1, 0))
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses(tmp_path, run, monkeypatch):
    def refused(*words):
        code, _, err = run(*words)
        said = [line for line in err.splitlines() if not line.startswith("NOTICE: these are 5,000")]
        assert code == 2 and len(said) == 1, err
        return said[0]

    net, other = tmp_path / "net.pth", tmp_path / "other.pth"
    assert "no such file" in refused(net)
    other.write_bytes(YOURNET.read_bytes()[:3000])
    assert "damaged" in refused(other)
    assert "damaged" in refused(YOURNET, "--against", other, "--output", tmp_path / "page.html")
    save(net, nets.make("residual"))
    assert "give --input-shape" in refused(net)
    assert "give --mean and --std" in refused(net, "--input-shape", "3x14x14")
    shape = ("--input-shape", "3x14x14", "--mean", 0, 0, 0, "--std", 1, 1, 1)
    assert "go together" in refused(net, *shape[:5])
    assert "does not run on inputs of shape" in refused(
        net, "--input-shape", "1x14x14", "--mean", 0, "--std", 1
    )
    assert "is a checkpoint; give another name" in refused(net, *shape, "--output", net)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(net, *shape, "--output", tmp_path / "file" / "page.html")
    words = ("--data", "data:loaders", "--data-arg", "name=mnist5k")
    assert "gives (1, 28, 28), the network takes (3, 14, 14)" in refused(net, *shape, *words)
    away = ("--mean", 0.5, "--std", 1)
    assert "its pixels are not from 0 to 1" in refused(
        YOURNET, *away, *words, "--output", tmp_path / "page.html"
    )
    save(net, Lacking())
    assert "no rule for special_bessel_j0" in refused(net, *shape)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "net.pth", "other.pth"]


def test_the_command_names_networks_and_classes(tmp_path, run):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=3)
    made = {"name": "squeezenet1_1", "arguments": {"num_classes": 3}}
    save(tmp_path / "small.pth", net, provenance={"model": made})
    torch.save(net.state_dict(), tmp_path / "dense.pt")
    for i, name in enumerate(["<i>", "a - b", "ant"]):
        for folder in (tmp_path / "pictures" / split / name for split in ("train", "val")):
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 40), (200, 10 * i, 30)).save(folder / "one.png")
    words = ["--model", "squeezenet1_1", "--model-arg", "num_classes=3", "--against", tmp_path / "dense.pt"]
    words += ["--data", tmp_path / "pictures", "--image-size", 33]
    code, out, err = run(tmp_path / "small.pth", *words)
    assert code == 0, err
    page = (tmp_path / "small.html").read_text()
    assert "dense and pruned" in out and "<h1>squeezenet1_1, pruned and dense</h1>" in page
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert shown["classes"] == ["<i>", "a - b", "ant"] and shown["input"]["shape"] == [3, 33, 33]
    assert shown["input"]["mean"] == [0.485, 0.456, 0.406]
    pixels = [list(base64.b64decode(each["pixels"]))[:: 33 * 33] for each in shown["examples"]]
    assert pixels == [[200, 0, 30], [200, 10, 30], [200, 20, 30]]
    (tmp_path / "small.html").unlink()
    assert run(tmp_path / "small.pth", *words, "--classes", "a", "b")[0] == 2
    code, _, err = run(tmp_path / "small.pth", *words, "--classes", "a", "b", "c")
    assert code == 0 and '"classes":["a","b","c"]' in (tmp_path / "small.html").read_text()
