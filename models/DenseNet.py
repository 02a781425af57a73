"""Densely connected networks for 32 x 32 images: every layer reads the outputs of all earlier layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.common import average_head, initialize

#: Channels of the first convolution, and dense blocks.
STEM, BLOCKS = 16, 3


class DenseLayer(nn.Module):
    """Apply BatchNorm, ReLU and a 3 x 3 convolution, and concatenate its output to the input.

    Takes (N, inputs, H, W), returns (N, inputs + growth, H, W).
    """

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.bn(x)))], 1)


class DenseNet(nn.Module):
    """Three dense blocks with a 1 x 1 convolution and 2 x 2 pooling between them, then one linear layer.

    The basic DenseNet of Huang et al. (arXiv 1608.06993): no bottlenecks, and the convolutions
    between the blocks keep the number of channels.

    Args:
        depth: number of convolutions plus the linear layer: 3n + 4 for n layers per block.
        growth: channels that each layer adds.
        image_shape: (channels, height, width) of an input image, at least 4 x 4.
        classes: size of the output.
        scale: the BatchNorm scales γ before training.

    Takes (N, *image_shape), returns logits (N, classes). Layers are named `stem`,
    `blocks.block1.layer1.conv`, `blocks.transition1.conv`, … and `head.fc`.

    Raises ValueError for a depth that is not 3n + 4, a growth or number of classes below 1, or
    an image too small for the pooling.
    """

    def __init__(
        self,
        depth: int = 40,
        growth: int = 12,
        *,
        image_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        scale: float = 0.5,
    ):
        super().__init__()
        layers = (depth - 4) // BLOCKS
        if layers < 1 or depth != BLOCKS * layers + 4:
            raise ValueError(f"depth {depth}: {BLOCKS}n + 4 with n at least 1 was expected")
        if min(growth, classes) < 1 or min(image_shape[1:]) < 4:
            raise ValueError(
                f"growth {growth}, {classes} classes, images of {tuple(image_shape)}: at least 1, 1 and 4 x 4"
            )
        #: The arguments that rebuild this network; checkpoints store them.
        self.config: dict[str, Any] = {
            "depth": depth,
            "growth": growth,
            "image_shape": list(image_shape),
            "classes": classes,
            "scale": scale,
        }
        channels = STEM
        self.stem = nn.Conv2d(image_shape[0], channels, 3, padding=1, bias=False)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, BLOCKS + 1):
            made: OrderedDict[str, nn.Module] = OrderedDict()
            for layer in range(1, layers + 1):
                made[f"layer{layer}"] = DenseLayer(channels, growth)
                channels += growth
            blocks[f"block{block}"] = nn.Sequential(made)
            if block < BLOCKS:
                blocks[f"transition{block}"] = nn.Sequential(
                    OrderedDict(
                        bn=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(),
                        conv=nn.Conv2d(channels, channels, 1, bias=False),
                        pool=nn.AvgPool2d(2),
                    )
                )
        self.blocks = nn.Sequential(blocks)
        self.head = average_head(channels, classes)
        initialize(self, scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)))


def densenet40(**options: Any) -> DenseNet:
    """Build a DenseNet of 12 layers per block and growth 12; 1.02M params. `options`: those of `DenseNet`."""
    return DenseNet(40, **options)
