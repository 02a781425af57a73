"""Batches of normalised, augmented images, cut from tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Augment = Callable[[Tensor], Tensor]


class Batches:
    """Iterate over (images, labels) as often as wanted.

    Args:
        images: (N, C, H, W) uint8. labels: (N,) int64.
        batch_size: images a batch; the last one is smaller unless `drop_last`.
        mean, std: of the training pixels scaled to [0, 1]; batches have mean 0, std 1.
        shuffle: a new order each time, drawn from torch's global generator, so that
            one seed fixes it and a saved generator state resumes it.
        drop_last: leave out a last batch that is not full (BatchNorm in training needs
            more than one image); a set smaller than one batch is kept whole.
        augment: applied to each uint8 batch before it is normalised.

    Yields float32 (B, C, H, W) and int64 (B,) on the device of `images`.
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
        full, rest = divmod(len(images), batch_size)
        self.length = full if (drop_last and full) or not rest else full + 1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        order = torch.randperm(len(self.images)).to(device) if self.shuffle else None
        for number in range(self.length):
            chosen = slice(number * self.batch_size, (number + 1) * self.batch_size)
            index = chosen if order is None else order[chosen]
            images = self.images[index]
            if self.augment is not None:
                images = self.augment(images)
            yield images.float().mul_(self.scale).sub_(self.shift), self.labels[index]


def random_shift(pixels: int) -> Augment:
    """Move each image of a batch by up to `pixels` in both directions; what enters is 0."""

    def shift(images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (pixels,) * 4)
        offsets = torch.randint(0, 2 * pixels + 1, (2, count, 1), device="cpu").to(images.device)
        rows = offsets[0] + torch.arange(height, device=images.device)
        columns = offsets[1] + torch.arange(width, device=images.device)
        image = torch.arange(count, device=images.device)[:, None, None]
        # Indexing around a slice puts the channel last; bring it back to its place.
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    return shift
