"""Augmentation of drawn digits: small rotations, shifts and changes of size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.training.image_batches import Augment


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
