"""The demo page in a browser: what it computes, and what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from browser import Browser, needs_browser
from nets import SMALL
from PIL import Image

import data
from pruning import load
from pruning.demo import Images, demo
from pruning.deploy.export import TOLERANCE
from pruning.deploy.runtimes import relative_difference

ROOT = Path(__file__).resolve().parents[2]
YOURNET = ROOT / "checkpoints" / "YourNet" / "best.pth"
LENET = ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth"


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
  const ready = normalized(input());
  return {said, heard: find("said").textContent, pixels: Array.from(input()),
          logits: networks.map((network) => Array.from(network.run(ready)))};
}"""


def drawn(browser, strokes):
    return browser(f"({DRAW})({json.dumps(strokes)})")


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k", quiet=True).test


@pytest.fixture(scope="module")
def page(tmp_path_factory, toolkit):
    """The page of the command, with YourNet, LeNet-5 and digits to click on."""
    path = tmp_path_factory.mktemp("demo") / "page.html"
    words = ["--against", LENET, "--output", path, "--data", "data:loaders", "--data-arg", "name=mnist5k"]
    code, said, err = toolkit("demo", YOURNET, *words)
    assert code == 0, err
    size = f"{path.stat().st_size:,} bytes"
    assert re.fullmatch(f"{path}: LeNet5 and YourNet, {size}; the outputs of its programs .*\n", said)
    return path


@needs_browser
def test_page_classifies_drawn_digits_as_pytorch_does(page, digits, shown):
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
            assert relative_difference(expected.flatten(), torch.tensor(logits)) < TOLERANCE
            assert says == str(expected.argmax().item())
            assert f"{name}: {says}{share}" in found["heard"]
            right += says == str(label)
    assert right >= 0.9 * 2 * 40, right


def assert_like_mnist(pixels):
    """The bounding box of MNIST's digits, and the position of their center of mass."""
    rows, columns = (np.flatnonzero(pixels.sum(axis) > 40) for axis in (1, 0))
    assert 17 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
    across, down = np.meshgrid(np.arange(28), np.arange(28))
    assert abs((pixels * across).sum() / pixels.sum() - 14) < 0.1
    assert abs((pixels * down).sum() / pixels.sum() - 14) < 0.1


SEVEN = [(0.3, 0.22), (0.72, 0.2), (0.6, 0.45), (0.5, 0.85)]


@needs_browser
def test_mouse_touch_keyboard_and_examples_draw_on_the_page(page, shown):
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
    assert np.abs(np.subtract(whole, half)).mean() < 3, "size and position do not matter"

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
    assert browser.until(says + " === '––'") and browser("blank()"), "clearing the canvas ends a stroke"
    for digit in range(10):
        browser(f"find('examples').children[{digit}].click()")
        assert browser.until(says + f" === '{digit}{digit}'")
    assert drawn(browser, [SEVEN])["said"][1][1] == "7", "a stroke replaces an example"
    browser.until("!find('again').disabled")
    browser("find('again').click()")
    assert browser("find('again').disabled") and browser.until("!find('again').disabled")


@needs_browser
def test_page_fits_the_window_and_follows_dark_mode(page, shown):
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
        assert least >= 24, "buttons are large enough for touch"
        shade = browser(
            "(c => (c.drawImage(paper, 0, 0), c.getImageData(0, 0, 1, 1).data[0]))(canvasOf(1, 1))"
        )
        assert (shade < 100) == dark
        beside = browser("find('answers').getBoundingClientRect().left > paper.offsetWidth")
        assert beside == (width == 1400)


#: The preview's pixels, red, green, blue and alpha, read from a copy.
SEEN = """(context => {
  context.drawImage(find("seen"), 0, 0);
  return Array.from(context.getImageData(0, 0, width, height).data);
})(canvasOf(width, height))"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_preview_has_the_colors_of_the_drawing(page, shown, dark):
    browser = shown(page)
    browser.look(1000, 900, dark)
    pixels = np.array(drawn(browser, [SEVEN])["pixels"])
    shown_pixels = browser(SEEN)
    seen = np.array(shown_pixels).reshape(-1, 4)[:, :3]
    ink, paper = (np.array(browser(f"tone('{name}')")) for name in ("--ink", "--soft"))
    assert (seen[pixels == 0] == paper).all() and (seen[pixels == 255] == ink).all()
    assert (ink.mean() > paper.mean()) == dark and {0, 255} <= set(pixels)
    browser("find('examples').children[3].click()")
    browser.until("said[0][1] === '3'")
    shown_pixels = browser(SEEN)
    assert (np.array(shown_pixels).reshape(-1, 4)[:, 0] == browser("Array.from(input())")).all()


@needs_browser
def test_color_network_takes_image_files(tmp_path, shown):
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
            SMALL.normalized(torch.tensor(found, dtype=torch.uint8).view(3, 14, 14))
        )
    got = browser("Array.from(networks[0].run(normalized(input())))")
    assert relative_difference(expected.flatten(), torch.tensor(got)) < TOLERANCE


@needs_browser
def test_page_of_torchvision_networks_shows_the_most_probable_classes(tmp_path, shown):
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
    assert names == order, "the most probable of many classes"


@needs_browser
def test_page_reports_outputs_that_differ_from_pytorch(tmp_path, chromium):
    path = demo({"net": nets.make("lenet")}, tmp_path / "net.html", SMALL).path
    found = re.search(r'"expected":\[\[(-?[\d.e-]+)', path.read_text())
    path.write_text(
        path.read_text().replace(found[0], found[0].replace(found[1], str(float(found[1]) + 0.01)))
    )
    with Browser() as browser:
        browser.open(path)
        assert browser.until("find('check').dataset.agrees") == "false"
        assert "do not trust them" in browser("find('check').textContent")


def test_page_is_self_contained(tmp_path):
    net = nets.make("lenet").train()
    before = nets.snapshot(net)
    path = demo(
        {"net & more": net}, tmp_path / "net.html", SMALL, facts={"net & more": {"command": "<γ>"}}
    ).path
    page = path.read_text()
    assert not re.search(r"""(src|href|action)=["']""", page) and "url(" not in page and "http" not in page
    assert "<h1>net &amp; more</h1>" in page and "&lt;\\u03b3&gt;" in page
    assert "{{" not in page and "{%" not in page and str(ROOT) not in page
    assert net.training and all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["net.html"]
