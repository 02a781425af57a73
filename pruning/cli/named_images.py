"""Named data sets of images: torchvision's downloads, and CIFAR as pictures of tiles."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pruning.cli.factories import torchvision_module
from pruning.errors import PruningError
from pruning.utils.wording import number_of


class BuiltIn(NamedTuple):
    """A data set of torchvision: its class, mean and standard deviation of the training pixels, classes."""

    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10


#: Data sets by name.
BUILT_IN: dict[str, BuiltIn] = {
    "mnist": BuiltIn("MNIST", (0.1307,), (0.3081,)),
    "fashion-mnist": BuiltIn("FashionMNIST", (0.2860,), (0.3530,)),
    "kmnist": BuiltIn("KMNIST", (0.1918,), (0.3483,)),
    "cifar10": BuiltIn("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": BuiltIn("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 100),
}

#: The data sets that may be a folder of tiles.
TILED = ("cifar10", "cifar100")
#: Height and width of a tile in pixels.
TILE = 32
#: File of the labels of a folder of tiles.
LABELS = "labels.npz"

#: Names of the classes of CIFAR-10; a folder of tiles has none.
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_PART = re.compile(r"(train|test)-(\d+)\.(?:webp|png)")


@dataclass(frozen=True)
class NamedImages:
    """Images (N, C, H, W) uint8 with their labels (N,) int64, and the names of the classes."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


def named_images(name: str, folder: str | Path) -> NamedImages:
    """Return a data set of `BUILT_IN`.

    A folder of tiles holds `train-0.webp`, `train-1.webp`, …, `test-0.webp`, … (or .png): RGB pictures
    of 32 x 32 tiles, an image each, row by row; and `labels.npz` with the arrays `train` and `test`, a
    label for each tile, in the order of the numbers of the pictures.

    Args:
        name: a key of `BUILT_IN`.
        folder: where torchvision's download is, or is made; for CIFAR also a folder of tiles, or a
            folder that holds one named CIFAR10 or CIFAR100.

    Raises:
        PruningError: the data set is not there and cannot be downloaded, or a file is missing, damaged
            or belongs to something else.
    """
    known, folder = BUILT_IN[name], Path(folder).expanduser()
    for place in (folder, folder / known.kind) if name in TILED else ():
        parts = _parts(place)
        if parts or (place / LABELS).is_file():
            classes = CIFAR10 if name == "cifar10" else tuple(map(str, range(known.classes)))
            return _tiled(place, parts, classes)
    train, test = (_downloaded(known.kind, folder, train) for train in (True, False))
    return NamedImages(_pair(train), _pair(test), tuple(train.classes))


def _downloaded(kind: str, folder: Path, train: bool) -> Any:
    """torchvision's data set, downloaded where it is not in the folder."""
    datasets = torchvision_module().datasets
    try:
        return getattr(datasets, kind)(str(folder), train=train, download=True)
    except Exception as error:  # whatever a failing download raises
        raise PruningError(
            f"{kind} is not in {folder} and cannot be downloaded ({error}); put it there, or name "
            "another folder"
        ) from error


def _pair(dataset: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of one of torchvision's data sets, whose pixels are (N, H, W) or (N, H, W, C)."""
    pixels = torch.as_tensor(dataset.data)
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(dataset.targets, dtype=torch.int64)


def _parts(folder: Path) -> dict[str, dict[int, Path]]:
    """The pictures of a folder by split and number, in order.

    Raises:
        PruningError: a number is missing, or there are two pictures with it.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        matched = _PART.fullmatch(path.name)
        if matched is None:
            continue
        split, number = found.setdefault(matched[1], {}), int(matched[2])
        if number in split:
            raise PruningError(f"{path} and {split[number].name} are the same part: remove one of them")
        split[number] = path
    for name, split in found.items():
        for number in range(len(split)):
            if number not in split:
                raise PruningError(
                    f"{folder}: {name}-{number} is missing, {split[max(split)].name} is there; the parts are "
                    "numbered from 0"
                )
    return {name: dict(sorted(split.items())) for name, split in found.items()}


def _tiled(folder: Path, parts: Mapping[str, Mapping[int, Path]], classes: tuple[str, ...]) -> NamedImages:
    labels = _labels(folder / LABELS, len(classes))
    splits = []
    for split in ("train", "test"):
        if split not in parts:
            raise PruningError(f"{folder}: {split}-0.webp is missing; put it there")
        images: list[Tensor] = []
        count, expected = 0, len(labels[split])
        for path in parts[split].values():
            images.append(_tiles(path))
            count += len(images[-1])
            if count > expected:
                raise PruningError(
                    f"{path}: the {split} parts up to this one hold {number_of(count, 'image')}, {LABELS} "
                    f"has {expected:,} {split} labels; remove the part that is foreign"
                )
        if count < expected:
            raise PruningError(
                f"{folder}: the {split} parts hold {number_of(count, 'image')}, {LABELS} has {expected:,} "
                f"{split} labels; {split}-{len(images)} is missing, or a part is foreign"
            )
        splits.append((torch.cat(images), labels[split]))
    train, test = splits
    return NamedImages(train, test, classes)


def _labels(path: Path, classes: int) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {split: content[split] for split in ("train", "test")}
    except FileNotFoundError as error:
        raise PruningError(
            f"{path} is missing: it holds the labels of the pictures beside it; put it there"
        ) from error
    except KeyError as error:
        raise PruningError(f"{path}: the arrays train and test were expected ({error})") from error
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise PruningError(
            f"{path} cannot be read ({error}): it is truncated, or no .npz file; copy it again"
        ) from error
    for split, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise PruningError(
                f"{path}: {split} is {array.dtype} of shape {array.shape}; whole numbers of shape (N,) were "
                "expected"
            )
        for label in (array.min(), array.max()):
            if not 0 <= label < classes:
                raise PruningError(
                    f"{path}: {split} label {label} is out of range 0 to {classes - 1}; is it the file of "
                    "another data set?"
                )
    return {split: torch.from_numpy(array.astype(np.int64)) for split, array in arrays.items()}


def _tiles(path: Path) -> Tensor:
    """The tiles of a picture, (N, 3, 32, 32) uint8, row by row."""
    try:
        from PIL import Image
    except ImportError as error:
        raise PruningError(f"Pillow is needed to read {path}: pip install pillow ({error})") from error
    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError, EOFError, ImportError) as error:  # as damaged pictures do
        raise PruningError(
            f"{path} cannot be read ({error}): it is truncated, or no picture; copy it again"
        ) from error
    height, width = pixels.shape[:2]
    if mode != "RGB" or height % TILE or width % TILE:
        raise PruningError(
            f"{path} is a {mode} picture of {width} x {height} pixels: RGB tiles of {TILE} x {TILE} were "
            "expected"
        )
    tiles = pixels.reshape(height // TILE, TILE, width // TILE, TILE, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(tiles.reshape(-1, 3, TILE, TILE).copy())
