"""Networks and pictures of `benchmarks.trained`, as factories for `python -m pruning`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

#: Height and width of the pictures, and the number of each split's.
SIZE = 64
PICTURES = {"train": 450, "val": 150, "test": 600}
CLASSES = ("level", "slanted", "upright")


class PlainCNN(nn.Module):
    """Three convolutions with BatchNorm and pooling, without skip connections."""

    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet8(nn.Module):
    """A residual network of three blocks (He et al., arXiv 1512.03385)."""

    def __init__(self, classes: int = 10, width: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class DigitTransformer(nn.Module):
    """A transformer encoder over the 16 patches of 7 x 7 pixels of a digit."""

    def __init__(self, classes: int = 10, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 8 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.encoder(tokens)).mean(1))


def draw_pictures(folder: Path, seed: int = 0, noise: float = 0.16) -> None:
    """Draw an image folder: patches of stripes, in random colors and widths, on noise.

    The class is the direction of the stripes, which varies by up to 22 degrees within it.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    y, x = torch.meshgrid(torch.arange(SIZE).float(), torch.arange(SIZE).float(), indexing="ij")
    for split, count in PICTURES.items():
        for number in range(count):
            kind = number % len(CLASSES)
            angle = math.radians(60 * kind + 44 * (uniform(1).item() - 0.5))
            along = x * math.cos(angle) + y * math.sin(angle)
            wave = torch.sin(along * (0.5 + 0.6 * uniform(1)) + 2 * math.pi * uniform(1))
            (center_x, center_y), radius = (20 + 24 * uniform(2)).tolist(), 9 + 9 * uniform(1).item()
            inside = ((x - center_x) ** 2 + (y - center_y) ** 2 < radius**2).float()
            image = uniform(3)[:, None, None] + inside * wave * (uniform(3) - 0.5)[:, None, None]
            image = image + noise * torch.randn(3, SIZE, SIZE, generator=draw)
            pixels = (0.6 * image + 0.2).clamp(0, 1).mul(255).round().byte()
            path = folder / split / CLASSES[kind] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def train(model: nn.Module, batches: object, epochs: int, rate: float) -> nn.Module:
    """Train a network by AdamW with a one-cycle rate, as a user without this toolkit would."""
    steps = len(batches)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    for _ in range(epochs):
        model.train()
        for images, labels in batches:  # type: ignore[attr-defined]
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
