"""VGG for 32 x 32 images: BatchNorm after every convolution, a single linear layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.common import initialize

#: Number of convolutions of each stage, by depth.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
#: Channels of each stage.
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3 x 3 convolutions with 2 x 2 pooling between them, average pooling, a linear layer.

    Simonyan & Zisserman (arXiv 1409.1556) in the variant that Network Slimming prunes: without
    the two wide linear layers, so a depth of 19 has 16 convolutions and one linear layer.

    Args:
        depth: 11, 13, 16 or 19.
        image_shape: (channels, height, width) of an input image, at least 16 x 16.
        classes: size of the output.
        scale: the BatchNorm scales γ before training.

    Takes (N, *image_shape), returns logits (N, classes). Layers are named `features.conv1`,
    `features.bn1`, … and `head.fc`.

    Raises ValueError for another depth, fewer than one class, or an image too small for the pooling.
    """

    def __init__(
        self,
        depth: int = 19,
        *,
        image_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        scale: float = 0.5,
    ):
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth {depth}: one of {', '.join(map(str, STAGES))}")
        channels, *size = image_shape
        if classes < 1 or min(size) < 16:
            raise ValueError(
                f"{classes} classes, images of {tuple(image_shape)}: at least 1 and 16 x 16 are needed"
            )
        #: The arguments that rebuild this network; checkpoints store them.
        self.config: dict[str, Any] = {
            "depth": depth,
            "image_shape": list(image_shape),
            "classes": classes,
            "scale": scale,
        }
        features: OrderedDict[str, nn.Module] = OrderedDict()
        number = 0
        for stage, (count, width) in enumerate(zip(STAGES[depth], WIDTHS, strict=True), start=1):
            if stage > 1:
                features[f"pool{stage - 1}"] = nn.MaxPool2d(2)
            for _ in range(count):
                number += 1
                features[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                features[f"bn{number}"] = nn.BatchNorm2d(width)
                features[f"relu{number}"] = nn.ReLU()
                channels = width
        self.features = nn.Sequential(features)
        self.head = nn.Sequential(
            OrderedDict(
                average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, classes)
            )
        )
        initialize(self, scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def vgg16(**options: Any) -> VGG:
    """Build a VGG of 13 convolutions and one linear layer. `options` are those of `VGG`."""
    return VGG(16, **options)


def vgg19(**options: Any) -> VGG:
    """Build a VGG of 16 convolutions and one linear layer; 20.04M params. `options` are those of `VGG`."""
    return VGG(19, **options)
