"""Batches of normalized, augmented images, indexed from tensors that stay on their device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Callable[[Tensor], Tensor]


class Batches:
    """Iterate over batches of (images, labels); may be iterated any number of times.

    Args:
        images: (N, C, H, W) uint8. labels: (N,) int64.
        batch_size: images per batch; the last batch may be smaller unless `drop_last`.
        mean, std: mean and standard deviation of the training pixels scaled to [0, 1], by which
            batches are normalized.
        shuffle: draw a new order for each iteration from torch's global generator, so that
            the seed determines it and a saved generator state resumes it.
        drop_last: drop a last batch that is not full (BatchNorm in training needs more than
            one image); a set smaller than one batch is kept.
        augment: applied to each uint8 batch before it is normalized.

    Yields images (B, C, H, W) float32 and labels (B,) int64 on the device of `images`. Batches made
    by `with_outputs` yield (labels, outputs) instead of labels.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: float,
        std: float,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augment | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: at least 1 is needed")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.shuffle, self.augment = shuffle, augment
        self.outputs: Tensor | None = None
        full, rest = divmod(len(images), batch_size)
        self.length = full if (drop_last and full) or not rest else full + 1

    def __len__(self) -> int:
        return self.length

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

    def with_outputs(self, function: Callable[[Tensor], Tensor]) -> Batches | None:
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


def random_affine(
    degrees: float = 0.0, pixels: float = 0.0, scale: float = 0.0, share: float = 1.0
) -> Augment:
    """Return an augmentation that rotates, shifts and scales images at random and pads them with 0.

    Args:
        degrees, pixels, scale: largest rotation, shift and change of size in either direction; a
            scale of 0.1 means factors from 0.9 to 1.1.
        share: share of the images that are changed.
    """

    def warp(images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        # Draw for all images, so that the random numbers do not depend on which images change.
        angle, right, down, stretch = torch.rand(4, count) * 2 - 1
        changed = (torch.rand(count) < share).nonzero().flatten()
        angle, stretch = (angle * math.radians(degrees))[changed], 1 / (1 + stretch * scale)[changed]
        cos, sin = torch.cos(angle) * stretch, torch.sin(angle) * stretch
        # Coordinates run from -1 to 1 along both sides, so their units differ unless images are square.
        rows = [cos, -sin * height / width, right[changed] * 2 * pixels / width]
        rows += [sin * width / height, cos, down[changed] * 2 * pixels / height]
        a, b, c, d, e, f = torch.stack(rows).to(images.device)[:, :, None, None]
        # Compute the sampling grids here: F.affine_grid would take most of the time.
        x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
        y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[:, None]
        grid = torch.stack((a * x + b * y + c, d * x + e * y + f), -1)
        warped, changed = images.to(torch.float32, copy=True), changed.to(images.device)
        warped[changed] = F.grid_sample(warped[changed], grid, align_corners=False)
        return warped

    return warp


def augmentation(strength: float) -> Augment | None:
    """Return an augmentation of half of the images: up to `strength` times 10°, 1 pixel and 10 % scale.

    Returns None for a strength of 0. Small networks have no capacity for strong augmentation.
    """
    return random_affine(10 * strength, strength, 0.1 * strength, share=0.5) if strength else None
