"""Residual networks for 32 x 32 images, with BatchNorm and ReLU before each convolution."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.common import average_head, initialize

#: Channels of the 3 x 3 convolutions of each stage.
WIDTHS = (16, 32, 64)


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and convolution, two or three times, added to the block's input.

    Args:
        inputs, outputs: number of input and output channels.
        width: number of channels between the convolutions.
        stride: stride of the first 3 x 3 convolution.
        bottleneck: use 1 x 1, 3 x 3 and 1 x 1 convolutions instead of two 3 x 3 ones.

    Takes (N, inputs, H, W), returns (N, outputs, H / stride, W / stride), rounded up. Where
    the two shapes differ, a 1 x 1 convolution maps the activated input to the output shape.
    """

    def __init__(self, inputs: int, outputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        sizes = (1, 3, 1) if bottleneck else (3, 3)
        widths = (inputs, *[width] * (len(sizes) - 1), outputs)
        strided = sizes.index(3)
        self.enter = nn.Sequential(OrderedDict(bn1=nn.BatchNorm2d(inputs), relu1=nn.ReLU()))
        residual: OrderedDict[str, nn.Module] = OrderedDict()
        for at, size in enumerate(sizes):
            if at:
                residual[f"bn{at + 1}"] = nn.BatchNorm2d(widths[at])
                residual[f"relu{at + 1}"] = nn.ReLU()
            residual[f"conv{at + 1}"] = nn.Conv2d(
                widths[at],
                widths[at + 1],
                size,
                stride=stride if at == strided else 1,
                padding=size // 2,
                bias=False,
            )
        self.residual = nn.Sequential(residual)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            if stride > 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.enter(x)
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


class PreResNet(nn.Module):
    """A convolution, three stages of pre-activation blocks, a global average, one linear layer.

    He et al., Identity Mappings in Deep Residual Networks (arXiv 1603.05027).

    Args:
        depth: number of convolutions on the longest path plus the linear layer: 6n + 2 for n
            basic blocks per stage, 9n + 2 for n bottlenecks.
        bottleneck: use blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions with four times the output
            channels instead of blocks of two 3 x 3 convolutions.
        image_shape: (channels, height, width) of an input image.
        classes: size of the output.
        scale: the BatchNorm scales γ before training.

    Takes (N, *image_shape), returns logits (N, classes). Layers are named `stem`,
    `stages.stage1.block1.residual.conv1`, … and `head.fc`.

    Raises ValueError for a depth of another form, or for fewer than one class.
    """

    def __init__(
        self,
        depth: int = 20,
        *,
        bottleneck: bool = False,
        image_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        scale: float = 0.5,
    ):
        super().__init__()
        per_block = 9 if bottleneck else 6  # layers of one block in each of the three stages
        blocks = (depth - 2) // per_block
        if blocks < 1 or depth != per_block * blocks + 2:
            raise ValueError(f"depth {depth}: {per_block}n + 2 with n at least 1 was expected")
        if classes < 1:
            raise ValueError(f"{classes} classes: at least 1 is needed")
        #: The arguments that rebuild this network; checkpoints store them.
        self.config: dict[str, Any] = {
            "depth": depth,
            "bottleneck": bottleneck,
            "image_shape": list(image_shape),
            "classes": classes,
            "scale": scale,
        }
        channels = WIDTHS[0]
        self.stem = nn.Conv2d(image_shape[0], channels, 3, padding=1, bias=False)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, width in enumerate(WIDTHS, start=1):
            made: OrderedDict[str, nn.Module] = OrderedDict()
            outputs = 4 * width if bottleneck else width
            for block in range(1, blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                made[f"block{block}"] = PreActivationBlock(channels, outputs, width, stride, bottleneck)
                channels = outputs
            stages[f"stage{stage}"] = nn.Sequential(made)
        self.stages = nn.Sequential(stages)
        self.head = average_head(channels, classes)
        initialize(self, scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)))


def resnet20(**options: Any) -> PreResNet:
    """Build a PreResNet of three basic blocks per stage; 0.27M params. `options` are those of `PreResNet`."""
    return PreResNet(20, **options)


def resnet56(**options: Any) -> PreResNet:
    """Build a PreResNet of nine basic blocks per stage; 0.86M params. `options` are those of `PreResNet`."""
    return PreResNet(56, **options)


def resnet164(**options: Any) -> PreResNet:
    """Build a PreResNet of 18 bottlenecks per stage; 1.70M params. `options` are those of `PreResNet`."""
    return PreResNet(164, bottleneck=True, **options)
