"""MobileNetV2 for 32 x 32 images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.common import initialize

#: Channels of the first and the last convolution.
STEM, LAST = 32, 1280
#: For each stage: expansion factor, output channels, number of blocks, stride of the first block.
#: The first convolution and the second stage have stride 1 instead of the 2 used for 224 x 224
#: images, so the image is halved three times, to 4 x 4.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """A 1 x 1 convolution expands the channels, a 3 x 3 depthwise one follows, a 1 x 1 one projects them.

    BatchNorm follows each convolution, ReLU6 the first two. The input is added where the
    output has the same shape.

    Args:
        inputs, outputs: number of input and output channels.
        expansion: inner channels as a multiple of `inputs`; 1 omits the first convolution.
        stride: stride of the depthwise convolution.

    Takes (N, inputs, H, W), returns (N, outputs, H / stride, W / stride), rounded up.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        wide = expansion * inputs
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion > 1:
            layers["expand"] = nn.Conv2d(inputs, wide, 1, bias=False)
            layers["bn1"] = nn.BatchNorm2d(wide)
            layers["relu1"] = nn.ReLU6()
        layers["depthwise"] = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        layers["bn2"] = nn.BatchNorm2d(wide)
        layers["relu2"] = nn.ReLU6()
        layers["project"] = nn.Conv2d(wide, outputs, 1, bias=False)
        layers["bn3"] = nn.BatchNorm2d(outputs)
        self.layers = nn.Sequential(layers)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds_input else self.layers(x)


class MobileNetV2(nn.Module):
    """A convolution, 17 inverted residual blocks, a wide 1 x 1 convolution, average pooling, a linear layer.

    Sandler et al. (arXiv 1801.04381), with strides for 32 x 32 images.

    Args:
        image_shape: (channels, height, width) of an input image.
        classes: size of the output.
        scale: the BatchNorm scales γ before training.

    Takes (N, *image_shape), returns logits (N, classes). Layers are named `stem.conv`,
    `stages.stage1.block1.layers.depthwise`, …, `last.conv` and `head.fc`.

    Raises ValueError for fewer than one class.
    """

    def __init__(self, *, image_shape: Sequence[int] = (3, 32, 32), classes: int = 10, scale: float = 0.5):
        super().__init__()
        if classes < 1:
            raise ValueError(f"{classes} classes: at least 1 is needed")
        #: The arguments that rebuild this network; checkpoints store them.
        self.config: dict[str, Any] = {
            "image_shape": list(image_shape),
            "classes": classes,
            "scale": scale,
        }
        channels = STEM
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(image_shape[0], channels, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(channels),
                relu=nn.ReLU6(),
            )
        )
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, (expansion, outputs, blocks, stride) in enumerate(STAGES, start=1):
            made: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, blocks + 1):
                made[f"block{block}"] = InvertedResidual(
                    channels, outputs, expansion, stride if block == 1 else 1
                )
                channels = outputs
            stages[f"stage{stage}"] = nn.Sequential(made)
        self.stages = nn.Sequential(stages)
        self.last = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, LAST, 1, bias=False), bn=nn.BatchNorm2d(LAST), relu=nn.ReLU6()
            )
        )
        self.head = nn.Sequential(
            OrderedDict(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(LAST, classes))
        )
        initialize(self, scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.stages(self.stem(images))))


def mobilenet_v2(**options: Any) -> MobileNetV2:
    """Build a MobileNetV2; 2.24M params. `options` are those of `MobileNetV2`."""
    return MobileNetV2(**options)
