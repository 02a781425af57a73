"""Batches of images that are held in memory as uint8 tensors: normalized and varied a batch at a time.

>>> images, labels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10)
>>> varied = ImageBatches(images, labels, 4, 0.5, 0.25, augment=in_turn(random_shift(4), random_mirror()))
>>> [tuple(inputs.shape) for inputs, _ in varied]
[(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.errors import PruningError

#: A function from images (N, C, H, W) to images of the same shape, which draws random numbers.
Augment: TypeAlias = Callable[[Tensor], Tensor]


class ImageBatches:
    """Iterate over batches of (images, labels); may be iterated any number of times.

    Args:
        images: (N, C, H, W) uint8. labels: (N,) int64.
        batch_size: images per batch; the last batch may be smaller unless `drop_last`.
        mean, std: mean and standard deviation of the training pixels scaled to [0, 1], by which
            batches are normalized: a number, or one for each channel.
        shuffle: draw a new order for each iteration from torch's global generator, so that
            the seed determines it and a saved generator state resumes it.
        drop_last: drop a last batch that is not full (BatchNorm in training needs more than
            one image); a set smaller than one batch is kept.
        augment: applied to each uint8 batch before it is normalized.

    Yields images (B, C, H, W) float32 and labels (B,) int64 on the device of `images`. Batches made
    by `with_outputs` yield (labels, outputs) instead of labels.

    Raises:
        PruningError: the batch size is below 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augment | None = None,
    ):
        if batch_size < 1:
            raise PruningError(f"batch size {batch_size}: at least 1 is needed")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        center, spread = (torch.as_tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (mean, std))
        self.scale = (1 / (255 * spread)).to(images.device, torch.float32)
        self.shift = (center / spread).to(images.device, torch.float32)
        self.shuffle, self.augment = shuffle, augment
        self.outputs: Tensor | None = None
        full, rest = divmod(len(images), batch_size)
        self.length = full if (drop_last and full) or not rest else full + 1

    def __len__(self) -> int:
        return self.length

    @property
    def dataset(self) -> Sized:
        """The labels, one for each image."""
        return self.labels

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        device = self.images.device
        order = torch.randperm(len(self.images)).to(device) if self.shuffle else None
        for number in range(self.length):
            chosen = slice(number * self.batch_size, (number + 1) * self.batch_size)
            index = chosen if order is None else order[chosen]
            images = self.images[index]
            if self.augment is not None:
                images = self.augment(images)
            labels = self.labels[index]
            targets = labels if self.outputs is None else (labels, self.outputs[index])
            yield images.float().mul_(self.scale).sub_(self.shift), targets

    def with_outputs(self, function: Callable[[Tensor], Tensor]) -> ImageBatches | None:
        """Return the same batches with targets (labels, `function(images)`).

        Calls the function once for all images. Returns None where images are augmented, because
        they then differ in every epoch.
        """
        if self.augment is not None:
            return None
        in_order, paired = copy.copy(self), copy.copy(self)
        in_order.shuffle, in_order.length = False, -(-len(self.images) // self.batch_size)
        paired.outputs = torch.cat([function(images) for images, _ in in_order]).to(self.images.device)
        return paired


def in_turn(*steps: Augment) -> Augment:
    """Return the augmentation that applies several, the first one first."""

    def vary(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return vary


def random_shift(pixels: int) -> Augment:
    """Return an augmentation that shifts each image by up to `pixels` each way; 0 fills what becomes free.

    This is the random crop of padded images of the CIFAR literature (He et al., arXiv 1512.03385, with 4
    pixels). All numbers of a batch are drawn at once from torch's global generator, on the CPU, so the
    device of the images does not change them.
    """
    count = 2 * pixels + 1

    def shift(images: Tensor) -> Tensor:
        down, right = torch.randint(count, (2, len(images))).to(images.device)
        height, width = images.shape[-2:]
        windows = F.pad(images, [pixels] * 4).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(len(images), device=images.device), :, down, right]

    return shift


def random_mirror(share: float = 0.5) -> Augment:
    """Return an augmentation that mirrors each image, left to right, with probability `share`."""

    def mirror(images: Tensor) -> Tensor:
        chosen = (torch.rand(len(images)) < share).to(images.device)
        return torch.where(chosen[:, None, None, None], images.flip(-1), images)

    return mirror


def cutout(side: int, fill: float | Sequence[float] = 0.0) -> Augment:
    """Return an augmentation that blanks one square of each image (DeVries and Taylor, arXiv 1708.04552).

    The center may be any pixel, so a part of the square may lie outside the image.

    Args:
        side: height and width of the square in pixels.
        fill: the color of the square, 0 to 1: a number, or one for each channel. The mean of the
            training pixels becomes 0 when images are normalized.

    >>> images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    >>> 4 <= int((cutout(4)(images)[0] == 0).sum()) <= 16
    True
    """
    color = (torch.as_tensor(fill, dtype=torch.float64).view(-1, 1, 1) * 255).round()

    def blank(images: Tensor) -> Tensor:
        inside = []
        for size in images.shape[-2:]:
            first = torch.randint(size, (len(images), 1)) - side // 2
            places = torch.arange(size)
            inside.append((places >= first) & (places < first + side))
        square = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device)
        return torch.where(square, color.to(images.device, images.dtype), images)

    return blank
