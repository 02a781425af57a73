"""Errors and names of `demo`, by the command `python -m pruning demo` and from Python."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import nets
import pytest
import torch
from nets import SMALL
from PIL import Image
from torch import nn

from pruning import PruningError, save
from pruning.demo import Images, demo
from pruning.errors import ExportError

YOURNET = Path(__file__).resolve().parents[2] / "checkpoints" / "YourNet" / "best.pth"


class Unsupported(nn.Module):
    """A network that the page cannot run, for the reason `how`."""

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
        ("random", r"no rule for rand, which draws random numbers"),
        ("by data", r"cannot be traced by torch.export: .*data-dependent"),
        ("whole numbers", r"no rule for argmax of int64"),
        ("image", r"is not a classifier: outputs \(N, classes\) were expected, it returns \(1, 3, 14, 14\)"),
        ("number", r"differ from the model.s by inf"),
        ("several", r"is not a classifier.*it returns tuple"),
    ],
)
def test_unsupported_network_raises_and_writes_nothing(how, message, tmp_path):
    (tmp_path / "old.html").write_text("as it was")
    for name in ("new.html", "old.html"):
        with pytest.raises(PruningError, match=message):
            demo({"net": Unsupported(how)}, tmp_path / name, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "as it was"


def test_wrong_networks_classes_and_images_raise(tmp_path, monkeypatch):
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
    monkeypatch.setattr("pruning.demo.writer.MAX_BYTES", 5000)
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


def test_command_reports_errors_in_one_line(tmp_path, toolkit):
    def refused(*words):
        code, _, err = toolkit("demo", *words)
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
    save(net, Unsupported())
    assert "no rule for special_bessel_j0" in refused(net, *shape)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "net.pth", "other.pth"]


def test_command_sets_the_names_of_networks_and_classes(tmp_path, toolkit):
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
    words = ["demo", tmp_path / "small.pth", "--against", tmp_path / "dense.pt"]
    words += ["--model", "squeezenet1_1", "--model-arg", "num_classes=3"]
    words += ["--data", tmp_path / "pictures", "--image-size", 33]
    code, out, err = toolkit(*words)
    assert code == 0, err
    page = (tmp_path / "small.html").read_text()
    assert "dense and pruned" in out and "<h1>squeezenet1_1, pruned and dense</h1>" in page
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert shown["classes"] == ["<i>", "a - b", "ant"] and shown["input"]["shape"] == [3, 33, 33]
    assert shown["input"]["mean"] == [0.485, 0.456, 0.406]
    pixels = [list(base64.b64decode(each["pixels"]))[:: 33 * 33] for each in shown["examples"]]
    assert pixels == [[200, 0, 30], [200, 10, 30], [200, 20, 30]]
    (tmp_path / "small.html").unlink()
    assert toolkit(*words, "--classes", "a", "b")[0] == 2
    code, _, err = toolkit(*words[:2], *words[4:], "--classes", "a", "b", "c")
    assert code == 0 and '"classes":["a","b","c"]' in (tmp_path / "small.html").read_text()
