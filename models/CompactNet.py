"""A compact convolutional network with global average pooling instead of wide linear layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.rebuild import rebuilt


class CompactNet(nn.Module):
    """Stages of 3 x 3 convolutions with 2 x 2 pooling between them, global average pooling, one linear layer.

    Only the input images may be padded, so the constant that a pruned channel leaves behind can be
    folded exactly. Pooling comes before ReLU, so ReLU processes a quarter of the values.

    Args:
        stages: channels of the convolutions of each stage, `((8,), (10, 12, 12))`.
        separable: replace every convolution but the first by a depthwise convolution followed by
            a pointwise one (Sifre 2014; Howard et al., MobileNets, arXiv 1704.04861).
        padded: pad the images with one pixel of zeros on each side.
        slope: negative slope of LeakyReLU; 0 uses ReLU.
        batch_norm: add BatchNorm after every convolution, which then has no bias.
        image_shape: (channels, height, width) of an input image.
        classes: size of the output.

    Takes (N, *image_shape), returns logits (N, classes). Layers are named `features.conv1`,
    `features.depthwise2`, `features.bn2`, … and `head.fc`.

    Raises ValueError for a width below 1 or an image too small for the convolutions.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = ((16,), (24, 24, 24)),
        *,
        separable: bool = False,
        padded: bool = False,
        slope: float = 0.0,
        batch_norm: bool = False,
        image_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
    ):
        super().__init__()
        stages = [list(stage) for stage in stages]
        if min((classes, *(width for stage in stages for width in stage)), default=0) < 1:
            raise ValueError(f"widths {stages}, {classes} classes: each must be at least 1")
        #: The arguments that rebuild this network; checkpoints store them.
        self.config: dict[str, Any] = {
            "stages": stages,
            "separable": separable,
            "padded": padded,
            "slope": slope,
            "batch_norm": batch_norm,
            "image_shape": list(image_shape),
            "classes": classes,
        }
        channels, *size = image_shape
        features: OrderedDict[str, nn.Module] = OrderedDict()
        number = 0
        for at, stage in enumerate(stages):
            for place, width in enumerate(stage):
                number += 1
                if separable and number > 1:
                    features[f"depthwise{number}"] = nn.Conv2d(
                        channels, channels, 3, groups=channels, bias=False
                    )
                    features[f"conv{number}"] = nn.Conv2d(channels, width, 1, bias=not batch_norm)
                else:
                    border = int(padded and number == 1)
                    features[f"conv{number}"] = nn.Conv2d(
                        channels, width, 3, padding=border, bias=not batch_norm
                    )
                    size = [side + 2 * border for side in size]
                if batch_norm:
                    features[f"bn{number}"] = nn.BatchNorm2d(width)
                size = [side - 2 for side in size]
                if place == len(stage) - 1 and at < len(stages) - 1:
                    features[f"pool{number}"] = nn.MaxPool2d(2)
                    size = [side // 2 for side in size]
                features[f"relu{number}"] = nn.LeakyReLU(slope) if slope else nn.ReLU()
                channels = width
        if min(size) < 1:
            raise ValueError(f"images of {tuple(image_shape)} are too small for {number} convolutions")
        self.features = nn.Sequential(features)
        self.head = nn.Sequential(
            OrderedDict(
                average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, classes)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @property
    def widths(self) -> tuple[int, ...]:
        """Current number of channels of each convolution, without the depthwise ones."""
        named = self.features.named_children()
        convolutions = (m for name, m in named if name.startswith("conv") and isinstance(m, nn.Conv2d))
        return tuple(m.out_channels for m in convolutions)

    @classmethod
    def like(cls, slimmed: nn.Module) -> CompactNet:
        """Build a CompactNet with the widths and weights of a pruned one."""
        if not isinstance(slimmed, CompactNet):
            raise TypeError(f"a {type(slimmed).__name__} cannot become a CompactNet, only a CompactNet can")
        widths = iter(slimmed.widths)
        stages = [[next(widths) for _ in stage] for stage in slimmed.config["stages"]]
        return rebuilt(cls, slimmed, **{**slimmed.config, "stages": stages})
