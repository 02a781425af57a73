"""Data sets: files are validated, splits do not overlap, batches contain the right images."""

from __future__ import annotations

import gzip
import math
import struct

import numpy as np
import pytest
import torch

import data
from data import sources
from data.datasets import SUBSET
from data.idx import read_idx


def idx(array):
    """Return the bytes of an IDX file."""
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_mnist(folder, train=60_000, test=100, packed=False, **changes):
    """Write a folder in torchvision's layout with the right number of random images."""
    draw = np.random.default_rng(0)
    content = {}
    for kind, count in (("train", train), ("t10k", test)):
        content[f"{kind}-images-idx3-ubyte"] = idx(draw.integers(0, 256, (count, 4, 4)))
        content[f"{kind}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, written in {**content, **changes}.items():
        if packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(written, 1))
        else:
            (raw / name).write_bytes(written)
    return folder


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("MNIST_DIR", raising=False)


def test_the_embedded_subset_is_real_and_split_by_class():
    digits = data.load("mnist5k", quiet=True)
    assert digits.notice and digits.image_shape == (1, 28, 28)
    for split, each in (("train", 350), ("validation", 50), ("test", 100)):
        images, labels = getattr(digits, split)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.bincount(labels).tolist() == [each] * 10
    everything = torch.cat([digits.train.images, digits.validation.images, digits.test.images])
    assert len(everything.flatten(1).unique(dim=0)) == 5000, "no image is in two splits"
    assert SUBSET.stat().st_size < 1_500_000


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_with_and_without_gzip_and_validates_on_the_subset(tmp_path, packed):
    mnist = data.load("mnist", write_mnist(tmp_path, packed=packed))
    assert [len(s.labels) for s in (mnist.train, mnist.validation, mnist.test)] == [55_000, 5_000, 100]
    index = np.load(SUBSET)["train_index"]
    assert mnist.validation.labels.tolist() == (index % 10).tolist()


def test_an_environment_variable_names_the_data_folder(tmp_path, monkeypatch):
    write_mnist(tmp_path / "elsewhere")
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "elsewhere"))
    assert data.load("auto", tmp_path / "nothing").name == "mnist"
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "empty"))
    with pytest.raises(data.DataError, match="MNIST_DIR="):
        data.load("auto", tmp_path / "nothing")


def test_auto_uses_the_subset_and_gives_the_reason_if_mnist_is_not_available(tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("the network is down")

    monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
    digits = data.load("auto", tmp_path / "data")
    assert digits.name == "mnist5k" and "the network is down" in digits.notice
    assert "NOTICE: MNIST could not be downloaded" in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == [], "a failed download leaves no files"
    with pytest.raises(data.DataError, match="the network is down"):
        data.load("mnist", tmp_path / "data")


def test_a_downloaded_set_is_stored_and_reused(tmp_path, monkeypatch):
    def fetch(root, train, download):
        write_mnist(type(tmp_path)(root))

    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    assert data.load("auto", tmp_path / "data").name == "mnist"
    monkeypatch.setattr(sources, "download", None)  # the files exist now
    assert data.load("mnist", tmp_path / "data").name == "mnist"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train-images-idx3-ubyte": idx(np.zeros((60_000, 4, 4)))[:-7]}, "train-images.*truncated: 960009"),
        ({"train-images-idx3-ubyte": idx(np.zeros((60_000, 4, 4))) + b"x"}, "too long"),
        ({"train-labels-idx1-ubyte": b"\x89PNG\r\n"}, "train-labels.*89504e47, expected 00000801"),
        ({"train-labels-idx1-ubyte": b""}, "starts with nothing"),
        ({"train-labels-idx1-ubyte": idx(np.arange(59_999) % 10)}, "60000 images.*59999 labels"),
        ({"t10k-labels-idx1-ubyte": idx(np.full(100, 10))}, "label 10 is out of range 0 to 9"),
        ({"t10k-images-idx3-ubyte": b"\x00\x00\x08\x03\x00"}, "truncated inside its header"),
        ({"t10k-images-idx3-ubyte": b"\x1f\x8bnot gzip"}, "t10k-images.*cannot be read"),
    ],
)
def test_a_damaged_data_file_is_named(tmp_path, changes, message):
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", write_mnist(tmp_path, **changes))


def test_a_set_with_too_few_images_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="60,000 were expected"):
        data.load("mnist", write_mnist(tmp_path, train=1000))


def test_an_unknown_data_set_raises_with_the_known_names():
    with pytest.raises(
        data.DataError, match="'mnits' is unknown; there are: auto, mnist, mnist5k, fashion-mnist"
    ):
        data.load("mnits")


def test_an_idx_file_of_another_rank_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(idx(np.zeros((2, 3))))
    with pytest.raises(data.DataError, match="with 3 dimension"):
        read_idx(tmp_path / "x", 3)


def test_batches_are_normalised_and_contain_every_image():
    digits = data.load("mnist5k", quiet=True)
    seen = list(digits.batches("validation", 128))
    assert [len(labels) for _, labels in seen] == [128, 128, 128, 116]
    pixels = torch.cat([images for images, _ in seen])
    expected = (digits.validation.images.float() / 255 - digits.mean) / digits.std
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def test_shuffled_batches_follow_the_seed_and_drop_an_incomplete_batch():
    digits = data.load("mnist5k", quiet=True)
    batches = digits.batches("train", 128, shuffle=True)

    def epoch():
        return torch.cat([labels for _, labels in batches])

    torch.manual_seed(0)
    first, second = epoch(), epoch()
    torch.manual_seed(0)
    assert torch.equal(first, epoch()) and not torch.equal(first, second)
    assert len(batches) == 27 and len(first) == 27 * 128


def test_a_set_smaller_than_a_batch_is_kept():
    digits = data.load("mnist5k", quiet=True)
    assert [len(labels) for _, labels in digits.batches("validation", 1000, shuffle=True)] == [500]


def disc(row, column, size=28, radius=3.0):
    """Return the image of a disc on black, (size, size) uint8."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (rows - row).square() + (columns - column).square() <= radius**2
    return (inside * 255).to(torch.uint8)


def center(image):
    """Return the center of gravity, (row, column)."""
    total = image.sum()
    places = torch.arange(image.shape[-1], dtype=image.dtype)
    return float((image.sum(1) * places).sum() / total), float((image.sum(0) * places).sum() / total)


def test_random_affine_covers_its_stated_ranges():
    torch.manual_seed(0)
    images = disc(13.5, 20.0).repeat(400, 1, 1, 1)
    still = data.random_affine()(images)
    torch.testing.assert_close(still, images.float(), atol=1e-2, rtol=0)

    moved = [center(image[0]) for image in data.random_affine(pixels=3)(images)]
    rows, columns = (torch.tensor(axis) for axis in zip(*moved, strict=True))
    for offsets in (rows - 13.5, columns - 20.0):
        assert -3.05 < offsets.min() < -2.5 and 2.5 < offsets.max() < 3.05

    turned = [center(image[0]) for image in data.random_affine(degrees=30)(images)]
    angles = [math.degrees(math.atan2(row - 13.5, column - 13.5)) for row, column in turned]
    distances = [math.hypot(row - 13.5, column - 13.5) for row, column in turned]
    assert -31 < min(angles) < -25 and 25 < max(angles) < 31
    assert max(abs(distance - 6.5) for distance in distances) < 0.2

    areas = data.random_affine(scale=0.2)(images).sum((1, 2, 3)) / images[0].sum()
    assert 0.6 < areas.min() < 0.72 and 1.32 < areas.max() < 1.5


def test_augmentation_changes_half_of_the_images():
    torch.manual_seed(0)
    images = disc(10, 10).repeat(400, 1, 1, 1)
    changed = (data.augmentation(1.0)(images) - images).abs().amax((1, 2, 3)) > 1
    assert 150 < int(changed.sum()) < 250
    assert data.augmentation(0.0) is None


def test_loaders_give_three_splits_with_centred_padding():
    train, validation, test = data.loaders("mnist5k", batch_size=50, size=32)
    assert (len(train), len(validation), len(test)) == (70, 10, 20)
    plain = next(iter(data.loaders("mnist5k", batch_size=50)[1]))
    images, labels = next(iter(validation))
    assert images.shape == (50, 1, 32, 32) and torch.equal(labels, plain[1])
    assert torch.equal(images[:, :, 2:-2, 2:-2], plain[0])
    assert (images[:, :, :2] == images.min()).all()
    with pytest.raises(data.DataError, match="cannot be padded"):
        data.loaders("mnist5k", size=20)


def test_loaders_can_use_part_of_the_images():
    whole = data.load("mnist5k")
    train, validation, test = data.loaders("mnist5k", batch_size=40, train=100, validation=60)
    assert (len(train), len(validation), len(test)) == (2, 2, 25)
    labels = torch.cat([labels for _, labels in validation])
    assert torch.equal(labels, whole.validation.labels[:60])
    for wrong in (0, 501):
        with pytest.raises(data.DataError, match=f"{wrong} images were asked for, the split has 500"):
            data.loaders("mnist5k", validation=wrong)
