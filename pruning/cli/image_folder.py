"""Folders of images with one subfolder per class. Needs torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from pruning.errors import PruningError

#: Mean and standard deviation of each channel.
Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

#: Names of the splits' folders.
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


def image_folder(
    root: Path, size: int, normalization: Normalization
) -> tuple[dict[str, VisibleImageFolder], bool]:
    """Return the splits of an image folder, and whether validation has a folder of its own.

    Args:
        root: a folder with one subfolder per class, or with such a folder for each split.
        size: height and width to which images are cropped, in pixels.
        normalization: mean and standard deviation of the pixels.

    Raises:
        PruningError: a folder holds no images, or there is no train among the splits.
    """
    plain = [transforms.ToTensor(), transforms.Normalize(*normalization)]
    still = [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size), *plain]
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *plain]
    places = _split_folders(root)
    sets = {}
    for split, place in places.items():
        transform = transforms.Compose(varied if split == "train" else still)
        try:
            sets[split] = VisibleImageFolder(str(place), transform, loader=read_image)
        except FileNotFoundError as error:
            raise PruningError(f"{place} is no image folder: {error}") from error
    return sets, places["validation"] != places["train"]


class VisibleImageFolder(ImageFolder):
    """torchvision's ImageFolder, in which hidden folders, such as a notebook's, are no classes."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: number for number, name in enumerate(names)}


def read_image(path: str) -> Image.Image:
    """Read an image in RGB. Raises `PruningError`, which names the file, where it cannot be read."""
    try:
        with open(path, "rb") as file:
            deep = Image.open(file)
            if deep.mode.startswith("I"):  # 16 bits of gray, which PIL would cut off at 255
                return Image.fromarray((np.asarray(deep) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
        return default_loader(path)
    except Exception as error:  # what a damaged file raises depends on its format
        raise PruningError(f"image {path} cannot be read ({error}): replace it, or remove it") from error


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits; train and validation are the same where they are not separate."""
    places = [place for place in sorted(root.iterdir()) if place.is_dir() and place.name[0] != "."]
    folders = {place.name.lower(): place for place in places}
    found = {split: folders[name] for split, names in SPLITS.items() for name in names if name in folders}
    if "train" not in found:
        if found and len(found) == len(folders):
            there = " and ".join(place.name for place in found.values())
            raise PruningError(f"{root} has {there}, which are splits, but no train beside them")
        return {"train": root, "validation": root}
    return {"validation": found["train"], **found}
