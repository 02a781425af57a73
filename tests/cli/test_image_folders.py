"""Image folders and what checkpoints remember: preprocessing, classes, shapes, accuracy."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from user import image_folder

from pruning.checkpoint import read
from pruning.cli.preprocessing import Preprocessing
from pruning.cli.sources import make_data

pytestmark = pytest.mark.quick

NET = ("--model", "photos:Net")
MODULE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, width=6, classes=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.out = nn.Linear(width, classes)
    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
"""
CHOSEN = ("--crop", 12, "--resize", 16, "--mean", 0.25, "--std", 0.5, "--augment", "none")


@pytest.fixture
def photos(run, tmp_path):
    """Run commands in a folder with a network and an image folder of three classes."""
    (tmp_path / "photos.py").write_text(MODULE)
    image_folder(tmp_path / "pictures", ["a", "bb", "cccc"])
    return run


def test_preprocessing_is_computed_as_stated(tmp_path):
    image_folder(tmp_path / "train", ["a", "b"])
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    for number in range(12):
        Image.fromarray(pixels).save(tmp_path / "train" / "a" / f"{number}.png")
    image_folder(tmp_path / "val", ["a", "b"])
    Image.fromarray(pixels).save(tmp_path / "val" / "a" / "0.png")
    chosen = Preprocessing(20, 12, (0.1, 0.2, 0.3), (0.5, 1, 2), "none")
    data = make_data(str(tmp_path), preprocessing=chosen)
    crop = torch.from_numpy(pixels[4:16, 4:16]).permute(2, 0, 1) / 255
    expected = (crop - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    assert torch.allclose(next(iter(data.validation))[0][0], expected, atol=1e-6)
    images, targets = next(iter(data.train))
    assert torch.allclose(images[targets == 0], expected.expand(12, 3, 12, 12), atol=1e-6)
    flipped = make_data(str(tmp_path), preprocessing=Preprocessing(20, 12, chosen.mean, chosen.std, "flip"))
    for image in next(iter(flipped.train))[0][targets == 0]:
        assert image.shape == (3, 12, 12)


@pytest.mark.slow
def test_a_checkpoint_needs_no_flags_again(photos, tmp_path):
    words = (*NET, "--model-arg", "width=7", "--data", "pictures", *CHOSEN)
    code, out, err = photos("prune", *words, "--max-params", "80%", "--score", "l1")
    assert code == 0, err
    stated = "3 classes (a, bb, cccc), 33 train, 3 validation images; shorter side resized to 16"
    assert stated in out and "12 x 12, mean 0.25 0.25 0.25, std 0.5 0.5 0.5; training images: as" in out
    facts = read(tmp_path / "small.pth")["provenance"]
    assert facts["classes"] == ["a", "bb", "cccc"] and facts["preprocessing"]["crop"] == 12
    assert facts["inputs"] == [{"shape": [3, 12, 12], "dtype": "float32"}]
    code, out, err = photos("test", "--weights", "small.pth", "--seconds", 0.1)
    assert code == 0 and "no test split: measured on validation" in out and stated in out, err
    assert photos("test", "--weights", "small.pth", "--seconds", 0.1, "--split", "test")[0] == 2
    code, out, err = photos("finetune", "--weights", "small.pth", "--epochs", 0, "--augment", "flip",
                            "--output", "run")  # fmt: skip
    assert code == 0 and stated in out and "random flips" in out, err
    code, out, err = photos("doctor", "--weights", "small.pth")
    assert code == 0 and "Net: " in out and "trial passed" in out, err
    assert photos("export", "run/best.pth", "--to", "torchscript")[0] == 0
    with zipfile.ZipFile(tmp_path / "run" / "best.torchscript") as archive:
        name = next(n for n in archive.namelist() if n.endswith("metadata.json"))
        stored = json.loads(archive.read(name))
    assert stored["class_names"] == ["a", "bb", "cccc"] and stored["input_shape"] == [3, 12, 12]
    assert stored["preprocessing"]["augment"] == "flip" and 0 <= stored["given_accuracy"] <= 1
    code, out, err = photos("export", "run/best.pth", "--to", "onnx", "--int8")
    assert code == 0 and stated in out and "best.int8.onnx: validation accuracy" in out, err
    code, out, err = photos("demo", "run/best.pth")
    assert code == 0 and "cccc" in (tmp_path / "run" / "best.html").read_text(), err


def test_the_report_of_a_run_names_the_classes_of_the_folder(photos, tmp_path):
    epochs = ("--sparsify-epochs", 1, "--iterations", 1, "--recover-epochs", 0, "--finetune-epochs", 1)
    words = ("--data", "pictures", *CHOSEN, "--max-macs", "80%", *epochs, "--output", "run")
    assert photos("slim", *NET, *words)[0] == 0 and photos("report", "run")[0] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in ("a", "bb", "cccc"))


def test_the_number_of_outputs_is_that_of_the_classes(photos):
    words = ("--data", "pictures", "--crop", 33)
    code, out, err = photos("doctor", "--model", "squeezenet1_1", *words)
    assert code == 0 and "724,035 params" in out, err
    wrong = ("--model-arg", "num_classes=10")
    code, _, err = photos("doctor", "--model", "squeezenet1_1", *wrong, *words)
    assert code == 2 and "10 outputs, data 'pictures' has 3 classes: give --model-arg num_classes=3" in err
    code, _, err = photos("slim", *NET, "--model-arg", "classes=4", *words, "--max-macs", "50%")
    assert code == 2 and "--model-arg classes=3" in err


@pytest.mark.slow
def test_costs_are_the_same_in_every_command(photos, tmp_path):
    words = (*NET, "--data", "pictures", "--crop", 12)
    params = 6 * 28 + 7 * 3  # BatchNorm folded
    _, out, _ = photos("doctor", *words)
    assert f"{params} params" in out
    _, out, _ = photos("test", *words, "--seconds", 0.1, "--json", "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())[0]["params"] == params
    _, out, _ = photos("finetune", *words, "--epochs", 0, "--no-fold", "--output", "run")
    assert f"{params} params" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--crop", 12, "--resize", 8), "--crop 12 is above --resize 8"),
        (("--crop", 12, "--mean", 0.5), "go together"),
        (("--crop", 12, "--mean", 123.7, 116.3, 103.5, "--std", 58), "go together"),
        (("--crop", 12, "--mean", 128, "--std", 58), "--mean 128 128 128: expected numbers from 0 to 1"),
        (("--crop", 12, "--mean", 0.5, "--std", 0), "above 0"),
        (("--crop", 12, "--mean", 1, 2, "--std", 1, 2), "three numbers each"),
        (("--crop", 12, "--image-size", 13), "give one of them"),
        (("--model-arg", "wdith=8"), "takes no argument 'wdith' (did you mean width?)"),
    ],
)
def test_wrong_flags_of_images_are_refused(photos, words, message):
    code, _, err = photos("doctor", *NET, "--data", "pictures", *words)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_a_folder_without_classes_or_with_an_empty_one_is_refused(photos, tmp_path):
    words = ("doctor", "--model", "squeezenet1_1", "--data")
    code, _, err = photos(*words, "pictures/a")
    assert code == 2 and "pictures/a is no image folder: it has no subfolders; expected images in" in err
    assert "pictures/a/CLASS/*.jpg, and found 0 folders, " in err and "0 other files in it" in err
    assert len(err.splitlines()) == 1, err
    (tmp_path / "pictures" / "d").mkdir()
    code, _, err = photos(*words, "pictures")
    assert (
        code == 2
        and "no valid file for the classes d" in err
        and "4 folders (a, bb, cccc, d), 0 images" in err
    )
    code, _, err = photos(*words, "picturse/a")
    assert code == 2 and "did you mean pictures/a?" in err


def test_flags_of_images_are_refused_for_other_data(run):
    code, _, err = run("doctor", "--model", "mine:Net", "--data", "mine:digits", "--crop", 12)
    assert code == 2 and "--crop is for images of a folder" in err


def test_classes_that_a_split_lacks_are_named(photos, tmp_path):
    image_folder(tmp_path / "split" / "train", ["a", "bb", "cccc"])
    image_folder(tmp_path / "split" / "val", ["a", "cccc", "d"])
    code, _, err = photos("doctor", *NET, "--data", "split")
    assert code == 2 and "it lacks bb and train lacks d" in err, err


def test_channels_last_shapes_are_recognized(photos):
    code, _, err = photos("doctor", *NET, "--input-shape", "24x20x3")
    assert code == 2 and "did you mean 3x24x20?" in err


def test_a_weight_that_is_not_finite_is_named(photos, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("conv", torch.nn.Conv2d(3, 6, 3))
    net.add_module("norm", torch.nn.BatchNorm2d(6))
    net.add_module("out", torch.nn.Linear(6, 3))
    state = net.state_dict()
    state["norm.bias"][2] = float("inf")
    torch.save(state, tmp_path / "weights.pth")
    code, _, err = photos("doctor", *NET, "--weights", "weights.pth", "--input-shape", "3x12x12")
    assert code == 2 and "weights.pth: 1 of 6 values of the parameter norm.bias are not finite (inf)" in err


def _numpy() -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"epoch,loss\n1,2\n", "a text file"),
        (b"\x89PNG\r\n", "an image"),
        ((2).to_bytes(8, "little") + b"{}", "a safetensors file"),
        (_numpy(), "NumPy arrays"),
        (b"\x89HDF\r\n", "an HDF5 file"),
    ],
)
def test_files_of_other_kinds_are_recognized(photos, tmp_path, content, kind):
    (tmp_path / "weights").write_bytes(content)
    for words in (("export", "weights", "--to", "onnx"), ("doctor", *NET, "--weights", "weights")):
        code, _, err = photos(*words)
        assert code == 2 and kind in err and len(err.strip().splitlines()) == 1, err
