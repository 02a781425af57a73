"""Folders of images, a subfolder a class. Needs torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from pruning.errors import PruningError


class Pictures(ImageFolder):
    """torchvision's ImageFolder, to which hidden folders, such as a notebook's, are no classes."""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: number for number, name in enumerate(names)}


def read_image(path: str) -> Any:
    """An image in RGB. Raises `PruningError` that names a file which is none."""
    try:
        with open(path, "rb") as file:
            deep = Image.open(file)
            if deep.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
                return Image.fromarray((np.asarray(deep) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
        return default_loader(path)
    except Exception as error:  # what a damaged file raises depends on its format
        raise PruningError(f"image {path} cannot be read ({error}): replace it, or take it away") from error
