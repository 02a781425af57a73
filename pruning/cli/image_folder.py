"""Folders of images with one subfolder per class. Needs torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, has_file_allowed_extension

from pruning.cli.preprocessing import SPLITS, Preprocessing
from pruning.errors import PruningError
from pruning.utils.wording import number_of

#: Most names of folders in a line.
SHOWN = 10


def image_folder(root: Path, preprocessing: Preprocessing) -> tuple[dict[str, VisibleImageFolder], bool]:
    """Return the splits of an image folder, and whether validation has a folder of its own.

    Args:
        root: a folder with one subfolder per class, or with such a folder for each split.
        preprocessing: how its images become inputs.

    Raises:
        PruningError: a folder holds no images, or there is no train among the splits.
    """
    plain = [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
    sized = [transforms.Resize(preprocessing.resize), transforms.CenterCrop(preprocessing.crop)]
    flip = transforms.RandomHorizontalFlip()
    varied = {
        "crop": [transforms.RandomResizedCrop(preprocessing.crop), flip],
        "flip": [*sized, flip],
        "none": sized,
    }[preprocessing.augment]
    places = _split_folders(root)
    sets = {}
    for split, place in places.items():
        transform = transforms.Compose([*(varied if split == "train" else sized), *plain])
        try:
            sets[split] = VisibleImageFolder(str(place), transform, loader=read_image)
        except FileNotFoundError as error:
            has_folders = any(path.is_dir() for path in place.iterdir())
            reason = str(error).rstrip(".") if has_folders else "it has no subfolders"
            raise PruningError(
                f"{place} is no image folder: {reason}; expected images in one subfolder per class, "
                f"{place}/CLASS/*.jpg, and found {_found_in(place)}"
            ) from error
    return sets, places["validation"] != places["train"]


def _found_in(place: Path) -> str:
    """Describe what a folder holds."""
    inside = [path for path in sorted(place.iterdir()) if path.name[0] != "."]
    folders = [path.name for path in inside if path.is_dir()]
    images = sum(has_file_allowed_extension(path.name, IMG_EXTENSIONS) for path in inside)
    named = f" ({', '.join(folders[:SHOWN])}{', ...' if folders[SHOWN:] else ''})" if folders else ""
    other = number_of(len(inside) - len(folders) - images, "other file")
    return f"{number_of(len(folders), 'folder')}{named}, {number_of(images, 'image')} and {other} in it"


def class_names(root: Path) -> list[str]:
    """Return the classes of an image folder: the names of the folders in its train folder, sorted."""
    place = _split_folders(root)["train"]
    return sorted(each.name for each in place.iterdir() if each.is_dir() and each.name[0] != ".")


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
