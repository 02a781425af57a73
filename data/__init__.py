"""Named data sets, held in memory as uint8 tensors.

>>> digits = load("mnist5k")
>>> digits.train.images.shape, digits.train.images.dtype
(torch.Size([3500, 1, 28, 28]), torch.uint8)
>>> for images, labels in digits.batches("train", 64, shuffle=True): ...  # doctest: +SKIP
"""

from data.batches import augmentation, random_affine
from data.datasets import NAMES, Dataset, Split, load, loaders
from data.idx import DataError

__all__ = [
    "NAMES",
    "DataError",
    "Dataset",
    "Split",
    "augmentation",
    "load",
    "loaders",
    "random_affine",
]
