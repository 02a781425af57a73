"""Named data sets: torchvision's downloads and folders of tiles, in memory, varied a batch at a time."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
from pruning import PruningError
from pruning.cli.named_images import BUILT_IN, named_images
from pruning.cli.sources import make_data
from pruning.training.image_batches import ImageBatches, cutout, in_turn, random_mirror, random_shift

pytestmark = pytest.mark.quick

COLUMNS, ROWS = 5, 2


def picture(images):
    """Arrange images (10, 32, 32, 3) in two rows of five tiles."""
    rows = [np.concatenate(list(images[COLUMNS * row : COLUMNS * (row + 1)]), 1) for row in range(ROWS)]
    return Image.fromarray(np.concatenate(rows, 0))


@pytest.fixture
def tiles(tmp_path):
    """A folder of tiles with 40 training and 20 test images; returns it, its images and its labels."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "CIFAR10"
    folder.mkdir()
    images, labels = {}, {}
    for split, parts in (("train", 4), ("test", 2)):
        images[split] = draw.integers(0, 256, (10 * parts, 32, 32, 3), dtype=np.uint8)
        labels[split] = (np.arange(10 * parts) % 10).astype(np.uint8)
        for part in range(parts):
            chosen = images[split][10 * part : 10 * (part + 1)]
            picture(chosen).save(folder / f"{split}-{part}.webp", lossless=True)
    np.savez(folder / "labels.npz", **labels)
    return folder, images, labels


def test_tiles_are_read_row_by_row_in_the_order_of_their_numbers(tiles):
    folder, images, labels = tiles
    for place in (folder, folder.parent):
        found = named_images("cifar10", place)
        for split, (pixels, targets) in (("train", found.train), ("test", found.test)):
            assert np.array_equal(pixels.permute(0, 2, 3, 1), images[split]) and pixels.dtype == torch.uint8
            assert targets.tolist() == labels[split].tolist() and targets.dtype == torch.int64
        assert len(found.classes) == 10 and found.classes[3] == "cat"


def test_ten_parts_and_more_are_in_numerical_order(tiles):
    folder, _, labels = tiles
    images = np.random.default_rng(1).integers(0, 256, (110, 32, 32, 3), dtype=np.uint8)
    for part in range(11):
        picture(images[10 * part : 10 * (part + 1)]).save(folder / f"train-{part}.png")
    for part in range(4):
        (folder / f"train-{part}.webp").unlink()
    np.savez(folder / "labels.npz", train=np.arange(110) % 100, test=labels["test"])
    pixels, targets = named_images("cifar100", folder).train
    assert np.array_equal(pixels.permute(0, 2, 3, 1), images) and int(targets.max()) == 99


def test_a_download_of_torchvision_is_read_as_before(tmp_path, monkeypatch):
    calls = []

    def cifar(root, train, download):
        calls.append((root, train, download))
        pixels = np.random.default_rng(train).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        return types.SimpleNamespace(data=pixels, targets=[*range(10), *range(10)], classes=["a", "b"])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar)
    found = make_data("cifar10", folder=tmp_path, batch_size=20)
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    mean, std = (np.array(each).reshape(3, 1, 1) for each in BUILT_IN["cifar10"][1:3])
    images, labels = next(iter(found.test))
    expected = torch.from_numpy((pixels.transpose(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(images, expected.float(), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [*range(10), *range(10)] and found.classes == ("a", "b")

    def refused(*_, **__):
        raise OSError("the network is down")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", refused)
    with pytest.raises(PruningError, match=r"CIFAR10 is not in .* \(the network is down\)"):
        make_data("cifar10", folder=tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


DAMAGE = {
    "labels.npz is missing": lambda f: (f / "labels.npz").unlink(),
    "labels.npz cannot be read": lambda f: truncate(f / "labels.npz"),
    r"train label 10 is out of range 0 to 9": lambda f: np.savez(
        f / "labels.npz", train=np.arange(40) % 11, test=np.arange(20) % 10
    ),
    r"test label -1 is out of range": lambda f: np.savez(
        f / "labels.npz", train=np.arange(40) % 10, test=np.arange(20) % 10 - 1
    ),
    "the arrays train and test were expected": lambda f: np.savez(f / "labels.npz", train=np.arange(40)),
    "train is float64": lambda f: np.savez(f / "labels.npz", train=np.ones(40), test=np.arange(20)),
    r"shape \(20, 2\)": lambda f: np.savez(f / "labels.npz", train=np.ones((20, 2), int), test=np.arange(20)),
    "train-1 is missing, train-3.webp is there": lambda f: (f / "train-1.webp").unlink(),
    "30 images, labels.npz has 40 train labels; train-3 is missing": lambda f: (f / "train-3.webp").unlink(),
    "test-0.webp is missing": lambda f: [p.unlink() for p in f.glob("test-*")],
    "train-2.webp cannot be read": lambda f: truncate(f / "train-2.webp"),
    r"train-0.webp is a RGB picture of 100 x 64": lambda f: Image.new("RGB", (100, 64)).save(
        f / "train-0.webp", lossless=True
    ),
    "test-1.webp and test-1.png are the same part": lambda f: Image.new("RGB", (32, 32)).save(
        f / "test-1.png"
    ),
    "test-2.png.* 21 images, labels.npz has 20 test labels": lambda f: Image.new("RGB", (32, 32)).save(
        f / "test-2.png"
    ),
    "train-4.png is a L picture": lambda f: Image.new("L", (32, 32)).save(f / "train-4.png"),
    "train-3.webp cannot be read": lambda f: (f / "train-3.webp").write_text("no picture"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_of_tiles_is_named(tiles, message):
    folder, _, _ = tiles
    DAMAGE[message](folder)
    with pytest.raises(PruningError, match=message):
        named_images("cifar10", folder)
    with pytest.raises(data.DataError, match=message):
        data.load("cifar10", folder)


@pytest.mark.slow
def test_the_command_line_reads_tiles_and_names_what_is_missing(run, tiles):
    folder, _, _ = tiles
    net = ("--model", "models:resnet20", "--data", "cifar10", "--data-dir", folder, "--batch-size", 8)
    done = run("prune", *net, "--max-macs", "50%", "--calibration", 16, "--output", "small.pth")
    assert done[0] == 0, done[2]
    weights = ("--weights", "small.pth")
    code, _, err = run(
        "finetune", *net[2:], *weights, "--epochs", 1, "--cutout", 8, "--threads", 1, "--output", "run"
    )
    assert code == 0, err
    code, out, err = run("test", *weights, "--data-dir", folder)
    assert code == 0 and "cifar10" in out and "accuracy" in out, err
    (folder / "train-3.webp").unlink()
    code, _, err = run("test", *weights, "--data-dir", folder)
    assert code == 2 and "train-3 is missing" in err and len(err.strip().splitlines()) == 1
    net = ("--model", "mine:Net", "--data", "mine:loaders", "--max-macs", "50%")
    code, _, err = run("prune", *net, "--cutout", 3)
    assert code == 2 and "--cutout is for named data sets" in err


def test_the_last_tenth_of_the_training_images_validates_in_the_application(tiles, monkeypatch):
    folder, images, _ = tiles
    for found in (data.load("cifar10", folder), data.load("cifar10", folder.parent)):
        assert [len(s.labels) for s in (found.train, found.validation, found.test)] == [36, 4, 20]
        assert np.array_equal(found.validation.images.permute(0, 2, 3, 1), images["train"][-4:])
        assert found.normalization == {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
    monkeypatch.setenv("CIFAR10_DIR", str(folder))
    assert len(data.load("cifar10", "nowhere").test.labels) == 20


def test_splits_in_memory_are_disjoint_and_follow_the_seed(tiles):
    folder, _, _ = tiles

    def held_out(seed):
        found = make_data("cifar10", folder=folder, batch_size=3, seed=seed)
        return torch.cat([images for images, _ in found.validation]), found

    first, found = held_out(0)
    assert len(first) == 4 and torch.equal(first, held_out(0)[0]) and not torch.equal(first, held_out(1)[0])
    assert len(found.train.images) == 36 and len(found.train) == 12 and len(found.calibration(5)) == 2
    pixels = torch.cat([found.train.images, found.validation.images]).flatten(1)
    assert len(pixels.unique(dim=0)) == 40


def shifted(image, down, right, pixels):
    padded = torch.nn.functional.pad(image, [pixels] * 4)
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


def test_shifts_are_crops_of_the_padded_image_and_all_occur():
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 6, 5), dtype=torch.uint8)
    moved = random_shift(2)(image.repeat(600, 1, 1, 1))
    every = torch.stack([shifted(image, down, right, 2) for down in range(5) for right in range(5)])
    places = [int((every == each).flatten(1).all(1).nonzero()) for each in moved]
    counts = torch.bincount(torch.tensor(places), minlength=25)
    assert moved.dtype == torch.uint8 and counts.min() > 5 and counts.max() < 50


def test_mirrors_flip_about_half_of_the_images():
    torch.manual_seed(0)
    images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).repeat(400, 1, 1, 1)
    mirrored = random_mirror()(images)
    flipped = (mirrored == images.flip(-1)).flatten(1).all(1)
    assert ((mirrored == images).flatten(1).all(1) ^ flipped).all() and 150 < int(flipped.sum()) < 250


def test_cutout_blanks_one_square_whose_center_is_any_pixel():
    torch.manual_seed(0)
    images = torch.full((2000, 3, 8, 6), 9, dtype=torch.uint8)
    cut = cutout(4, (0.2, 0.4, 1.0))(images)
    blank = (cut != 9).all(1)
    assert torch.equal(blank, (cut != 9).any(1))
    assert cut[blank[:, None].expand_as(cut)].unique().tolist() == [51, 102, 255]
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :]), "each is a rectangle"
    for side, length in ((rows, 8), (columns, 6)):
        ends = [tuple(each.nonzero().flatten()[[0, -1]].tolist()) for each in side]
        possible = {(max(0, c - 2), min(length, c + 2) - 1) for c in range(length)}
        assert set(ends) == possible


def test_the_same_numbers_vary_images_on_any_device_and_a_seed_repeats_them():
    images, labels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30)
    vary = in_turn(random_shift(2), random_mirror(), cutout(3))
    batches = ImageBatches(images, labels, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), shuffle=True, augment=vary)
    before = images.clone()
    torch.manual_seed(3)
    first = [(x, y) for x, y in batches]
    torch.manual_seed(3)
    for (x, y), (other, targets) in zip(first, batches, strict=True):
        assert torch.equal(x, other) and torch.equal(y, targets)
    assert torch.equal(images, before), "the stored images do not change"
    assert sorted(torch.cat([y for _, y in first]).tolist()) == list(range(30))
