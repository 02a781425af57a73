"""The report of a run is complete and self-contained, and a browser shows it without overflow."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import nets
import pytest
import torch
from browser import BROWSER
from torch import nn

from pruning import Budget, PruningError, SlimConfig, save, sensitivity, slim
from pruning.checkpoint import provenance
from pruning.report.html import report
from pruning.stages import PruneConfig, Run
from pruning.training import TrainConfig, accuracy

SECTIONS = [
    "Budget and result",
    "Before and after",
    "Figures",
    "Layers",
    "Pruning steps",
    "History",
    "Settings",
]


def finished_run(folder, net, images, labels, layers=True):
    """A short run of a network, with every file that a report can show; `layers`: with trials of layers."""
    batches = [(images, labels)] * 2
    config = SlimConfig(
        Budget(params="60%"), TrainConfig(1, lr=0.01), PruneConfig(2, TrainConfig(1, lr=0.01), layers=layers),
        TrainConfig(1, lr=0.01),
    )  # fmt: skip
    run = Run(folder, {"seed": 3, "data": "noise <&>", "stages": config.to_json()})
    result = slim(net, batches, images[:2], config, validate=lambda m: accuracy(m, batches),
                  calibration=batches, run=run, log=lambda _: None)  # fmt: skip
    save(folder / "best.pth", result.model, arguments={}, provenance=provenance(seed=3))
    sensitivity(net, images[:2], batches, calibration=batches, widths=2, path=folder / "sensitivity.json")
    return folder


@pytest.fixture(scope="module")
def lenet_run(tmp_path_factory):
    torch.manual_seed(0)
    return finished_run(tmp_path_factory.mktemp("runs") / "lenet", nets.make("lenet"), nets.images(32),
                        torch.arange(32) % 4)  # fmt: skip


def images_of(page):
    return [
        ElementTree.fromstring(base64.b64decode(data))
        for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    ]


def scales_of(folder):
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return next(event["scales"] for event in events if event["stage"] == "sparsify" and event.get("scales"))


def test_report_is_complete_and_self_contained(lenet_run, toolkit):
    code, out, err = toolkit("report", lenet_run)
    assert code == 0, err
    path = Path(out.strip())
    page = path.read_text()
    assert path == lenet_run / "report.html"
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert [heading.startswith(name) for heading, name in zip(headings, SECTIONS, strict=True)] == [True] * 7
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "url(" not in page
    assert "noise &lt;&amp;&gt;" in page, "text is escaped"
    events = [json.loads(line) for line in (lenet_run / "history.jsonl").read_text().splitlines()]
    last = [event for event in events if "asked" in event][-1]
    assert f"<td>{last['params']:,}</td>" in page and "met" in page
    for group, width in events[0]["widths"].items():
        kept = last["widths"].get(group, "layer removed")
        assert f"<td>{group}</td><td>{width}</td><td>{kept}</td>" in page
    assert len(images_of(page)) == 5 + len(scales_of(lenet_run))


def test_report_lists_every_group_and_plots_the_scales_of_a_part_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("pruning.report.html.MAX_HISTOGRAMS", 3)
    torch.manual_seed(0)
    layers = [
        layer for inputs in (3, *[4] * 4) for layer in (nn.Conv2d(inputs, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4))
    folder = finished_run(tmp_path / "run", net, torch.randn(4, 3, 2, 2), torch.arange(4), layers=False)
    page = report(folder, tmp_path / "elsewhere.html").read_text()
    groups = json.loads((folder / "history.jsonl").read_text().splitlines()[0])["widths"]
    assert len(groups) == 5 and all(f"<td>{group}</td>" in page for group in groups)
    assert len(scales_of(folder)) == 5 and len(images_of(page)) == 5 + 3


def test_the_report_of_an_interrupted_run_is_written(lenet_run, tmp_path):
    shutil.copytree(lenet_run, tmp_path / "cut", ignore=shutil.ignore_patterns("*.pth", "sensitivity.json"))
    history = (lenet_run / "history.jsonl").read_text().splitlines(keepends=True)
    for lines in (1, 2, 3, 5):
        (tmp_path / "cut" / "history.jsonl").write_text("".join(history[:lines]))
        assert "<h2>Budget and result</h2>" in report(tmp_path / "cut").read_text()


def test_folder_without_a_run_raises(tmp_path, toolkit):
    code, _, err = toolkit("report", tmp_path)
    assert code == 2 and "holds no run: config.json is missing" in err
    assert "Traceback" not in err and not (tmp_path / "report.html").exists()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(PruningError, match="nothing has happened"):
        report(tmp_path)
    (tmp_path / "history.jsonl").write_text("{not json")
    with pytest.raises(PruningError, match="holds no run that can be read"):
        report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("mistakes.json", "[1]"),
        ("indicators.json", '{"accuracy": 1}'),
        ("sensitivity.json", "{}"),
        ("history.jsonl", "3"),
        ("history.jsonl", '{"stage": "dense"}\n{"stage": "stage 2", "asked": {"params": "few"}}'),
    ],
)
def test_error_names_the_file_with_wrong_content(lenet_run, tmp_path, file, content):
    shutil.copytree(lenet_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(PruningError, match=file if content != "3" else "another tool"):
        report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()


CLASSES = ["zebra", "a class with a <long> name", "c", *"defghijklmnopqrstuvwxyzABCD"]


def with_predictions(run, tmp_path, classes=CLASSES):
    """A copy of a run whose networks are compared on images of 30 classes."""
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    saved = torch.load(folder / "best.pth", weights_only=True)
    torch.save({**saved, "provenance": {**saved["provenance"], "classes": classes}}, folder / "best.pth")
    gray = [[[0, 255], [128, 3]]]
    lost = [{"truth": 0, "dense": 0, "small": 1, "image": image} for image in (gray, gray * 3, None)]
    won = [{"truth": 2, "dense": 0, "small": 2, "image": gray}]
    matrix = [[1000 if i == j else (i * j) % 7 for j in range(30)] for i in range(30)]
    found = {"confusion": {"dense": matrix, "small": matrix}, "count": {"lost": 8, "won": 1}, "lost": lost,
             "won": won}  # fmt: skip
    (folder / "mistakes.json").write_text(json.dumps(found))
    return folder


def test_report_names_the_classes_of_wrong_predictions(lenet_run, tmp_path):
    page = report(with_predictions(lenet_run, tmp_path)).read_text()
    assert page.count('src="data:image/png') == 3 and "(2 of 8)" in page and "(1 of 1)" in page
    assert page.count("<figcaption>zebra, not a class with a &lt;long&gt; name</figcaption>") == 2
    assert "<figcaption>c, not zebra</figcaption>" in page
    assert page.count('<th scope="row">zebra</th>') == 1 and page.count(">1000</td>") == 30
    assert '<td style="--share: 100%">6</td>' in page, "the most frequent wrong prediction"
    assert '<td style="--share: 0%">1000</td>' in page, "right predictions have no color"


def test_report_numbers_classes_without_names(lenet_run, tmp_path):
    page = report(with_predictions(lenet_run, tmp_path, classes=["too", "few"])).read_text()
    assert page.count("<figcaption>0, not 1</figcaption>") == 2


PROBE = """<script>
addEventListener("load", () => {
const wide = [...document.body.children].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth);
document.title = JSON.stringify({inner: innerWidth, page: document.documentElement.scrollWidth,
  wide: wide.length, broken: broken.length, images: document.images.length});
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1400])
def test_browser_shows_the_report_without_overflow(lenet_run, tmp_path, width):
    folder = with_predictions(lenet_run, tmp_path)
    page = report(folder, tmp_path / "report.html").read_text()
    (tmp_path / "probe.html").write_text(page.replace("</body>", PROBE))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000",
         "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout).group(1)))
    assert found["images"] == 5 + len(scales_of(lenet_run)) + 3 and found["broken"] == 0
    assert found["inner"] <= width and found["page"] <= found["inner"] and found["wide"] == 0
    assert "CONSOLE" not in done.stderr
