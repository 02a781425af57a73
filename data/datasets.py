"""Load data sets by name, each with a training, validation and test split."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import augmentation
from data.idx import DataError, read_pair
from data.sources import DownloadError, download, environment_folder, find_idx
from pruning.cli.named_images import BUILT_IN, named_images
from pruning.errors import PruningError
from pruning.training.image_batches import Augment, ImageBatches

#: 5,000 MNIST training digits, made by `make_mnist5k.py`.
SUBSET = Path(__file__).parent / "mnist5k.npz"
SplitName = Literal["train", "validation", "test"]


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: str | torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def first(self, number: int | None) -> Split:
        """Return the first `number` images, or all for None. Raises `DataError` where there are fewer."""
        if number is not None and not 1 <= number <= len(self.labels):
            raise DataError(f"{number:,} images were asked for, the split has {len(self.labels):,}")
        return Split(self.images[:number], self.labels[:number])


@dataclass(frozen=True)
class Dataset:
    """A data set in memory. `notice` is a warning that applies to all results on it."""

    name: str
    train: Split
    validation: Split
    test: Split
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    classes: int = 10
    notice: str = field(default="", compare=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def normalization(self) -> dict[str, list[float]]:
        """The mean and standard deviation of each channel."""
        return {"mean": np.atleast_1d(self.mean).tolist(), "std": np.atleast_1d(self.std).tolist()}

    def to(self, device: str | torch.device) -> Dataset:
        """Return the same data on another device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    def padded(self, size: int) -> Dataset:
        """Return the images padded with 0 on all sides to `size` x `size`.

        Raises `DataError` for a size smaller than the images.
        """
        _, height, width = self.image_shape
        if size < max(height, width):
            raise DataError(f"images of {height} x {width} cannot be padded to {size} x {size}")
        top, left = (size - height) // 2, (size - width) // 2
        around = (left, size - width - left, top, size - height - top)

        def pad(split: Split) -> Split:
            return Split(F.pad(split.images, around), split.labels)

        return replace(self, train=pad(self.train), validation=pad(self.validation), test=pad(self.test))

    def batches(
        self, split: SplitName, batch_size: int, *, shuffle: bool = False, augment: Augment | None = None
    ) -> ImageBatches:
        """Return normalized batches of a split; with `shuffle`, an incomplete last batch is dropped."""
        images, labels = getattr(self, split)
        return ImageBatches(
            images,
            labels,
            batch_size,
            self.mean,
            self.std,
            shuffle=shuffle,
            drop_last=shuffle,
            augment=augment,
        )

    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Return the first 2,048 training images in batches, not augmented, for scores and channel means."""
        return list(islice(self.batches("train", 256), 8))


def load(name: str = "auto", folder: str | Path = "data", *, quiet: bool = False) -> Dataset:
    """Load a data set by name: one of `NAMES`.

    Args:
        name: `mnist`, `fashion-mnist` (downloaded into `folder` where absent), `mnist5k`
            (the embedded subset), `cifar10` (whose last 5,000 training images are the validation
            split), or `auto`: MNIST, or the subset where MNIST is not available.
        folder: folder of the full data sets, in torchvision's layout. Files that are not there
            are read from the folder that MNIST_DIR or FASHION_MNIST_DIR names, else downloaded.
            CIFAR-10 is read as by `pruning.cli.named_images`, from CIFAR10_DIR where that is set.
        quiet: do not print the notice on stderr.

    Raises `DataError` for an unknown name, invalid files, and data that is not available.
    """
    if name not in NAMES:
        raise DataError(f"data set {name!r} is unknown; there are: {', '.join(NAMES)}")
    dataset = _LOADERS[name](Path(folder).expanduser())
    if dataset.notice and not quiet:
        print(f"NOTICE: {dataset.notice}", file=sys.stderr, flush=True)
    return dataset


def loaders(
    name: str = "auto",
    folder: str | Path = "data",
    batch_size: int = 64,
    size: int | None = None,
    augment: float = 0.0,
    train: int | None = None,
    validation: int | None = None,
) -> tuple[ImageBatches, ImageBatches, ImageBatches]:
    """Return training, validation and test batches by name: a factory for `python -m pruning --data`.

    Args:
        size: height and width to which images are padded with 0 (32 for networks made for CIFAR).
        augment: strength of rotation, shift and scaling of the training images.
        train, validation: number of images to use of these splits (default: all).
    """
    dataset = load(name, folder)
    dataset = replace(
        dataset, train=dataset.train.first(train), validation=dataset.validation.first(validation)
    )
    if size is not None:
        dataset = dataset.padded(size)
    varied = augmentation(augment)
    learned = dataset.batches("train", batch_size, shuffle=True, augment=varied)
    return learned, dataset.batches("validation", batch_size), dataset.batches("test", batch_size)


def _auto(folder: Path) -> Dataset:
    try:
        return _mnist(folder)
    except DownloadError as error:
        subset = _mnist5k(folder)
        return replace(subset, notice=f"{error}; {subset.notice}")


def _mnist(folder: Path) -> Dataset:
    files = _locate(folder, "MNIST", "MNIST_DIR")
    # The validation images are those of the embedded subset, so a network trained on this split
    # is not trained on any image of the subset.
    with np.load(SUBSET) as subset:
        validation = subset["train_index"]
    return _from_idx("mnist", files, 0.1307, 0.3081, validation)


def _fashion_mnist(folder: Path) -> Dataset:
    files = _locate(folder, "FashionMNIST", "FASHION_MNIST_DIR")
    return _from_idx("fashion-mnist", files, 0.2860, 0.3530, validation=None)


def _cifar10(folder: Path) -> Dataset:
    try:
        found = named_images("cifar10", environment_folder("CIFAR10_DIR") or folder)
    except PruningError as error:
        raise DataError(str(error)) from error
    images, labels = found.train
    held_out = max(1, len(labels) // 10)
    learned, validation = (Split(images[at], labels[at]) for at in (slice(-held_out), slice(-held_out, None)))
    known = BUILT_IN["cifar10"]
    return Dataset("cifar10", learned, validation, Split(*found.test), known.mean, known.std)


def _mnist5k(_: Path) -> Dataset:
    with np.load(SUBSET) as subset:
        images, labels = subset["images"], subset["labels"].astype(np.int64)
    train, validation, test = _per_class(labels, 350, 50, 100)
    return Dataset(
        "mnist5k",
        _split(images, labels, train),
        _split(images, labels, validation),
        _split(images, labels, test),
        mean=0.1307,
        std=0.3081,
        notice="these are 5,000 of MNIST's 60,000 training digits (3,500 train, 500 validation, "
        "1,000 test): figures on them are not comparable with figures on MNIST's 10,000 test images",
    )


def _locate(folder: Path, torchvision_name: str, variable: str) -> dict[str, Path]:
    """Find the IDX files in `folder`, else in the environment variable's folder, else download them."""
    files = find_idx(folder, torchvision_name)
    if files is None and (elsewhere := environment_folder(variable)):
        files = find_idx(elsewhere, torchvision_name)
        if files is None:
            raise DataError(f"{variable}={elsewhere}: no {torchvision_name} IDX files there")
    return files or download(folder, torchvision_name)


def _from_idx(
    name: str, files: dict[str, Path], mean: float, std: float, validation: np.ndarray | None
) -> Dataset:
    images, labels = read_pair(files["train-images"], files["train-labels"], classes=10)
    if validation is None:
        validation, _ = _per_class(labels, 500, len(labels))
    elif len(labels) <= validation.max():
        raise DataError(
            f"{files['train-images']}: {len(labels)} images; MNIST's 60,000 were expected "
            "(the validation split is drawn from them)"
        )
    train = np.setdiff1d(np.arange(len(labels)), validation)
    test_images, test_labels = read_pair(files["test-images"], files["test-labels"], classes=10)
    return Dataset(
        name,
        _split(images, labels, train),
        _split(images, labels, validation),
        _split(test_images, test_labels),
        mean,
        std,
    )


def _per_class(labels: np.ndarray, *counts: int) -> list[np.ndarray]:
    """Return the indices of consecutive parts, each with its count of images of every class, in order."""
    places = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    bounds = np.cumsum((0, *counts))
    return [
        np.sort(np.concatenate([place[start:stop] for place in places])) for start, stop in pairwise(bounds)
    ]


def _split(images: np.ndarray, labels: np.ndarray, index: np.ndarray | slice = slice(None)) -> Split:
    return Split(torch.tensor(images[index]).unsqueeze(1), torch.tensor(labels[index]))


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "auto": _auto,
    "mnist": _mnist,
    "mnist5k": _mnist5k,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}
#: The names that `load` accepts.
NAMES = tuple(_LOADERS)
