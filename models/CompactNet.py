"""A compact convolutional network with a global average in place of wide linear layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.rebuild import rebuilt


class CompactNet(nn.Module):
    """3 x 3 convolutions in stages with 2 x 2 pooling between, a global average, one linear layer.

    At most the images are padded, so what a pruned channel leaves behind folds exactly. Pooling
    comes before ReLU, on a quarter of the values.

    Args:
        stages: channels of the convolutions of each stage, `((8,), (10, 12, 12))`.
        separable: every convolution but the first is a depthwise one and a pointwise one
            behind it (Sifre 2014; Howard et al., MobileNets, arXiv 1704.04861).
        padded: surround the images by one pixel of zeros.
        slope: of the activation below zero; 0 is ReLU.
        batch_norm: put BatchNorm behind every convolution, which then needs no bias.
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
        """Channels of each convolution as they are now, depthwise ones left out."""
        named = self.features.named_children()
        convolutions = (m for name, m in named if name.startswith("conv") and isinstance(m, nn.Conv2d))
        return tuple(m.out_channels for m in convolutions)

    @classmethod
    def like(cls, slimmed: nn.Module) -> CompactNet:
        """A CompactNet built from the widths of a pruned one, with its weights."""
        if not isinstance(slimmed, CompactNet):
            raise TypeError(f"a {type(slimmed).__name__} cannot become a CompactNet")
        widths = iter(slimmed.widths)
        stages = [[next(widths) for _ in stage] for stage in slimmed.config["stages"]]
        return rebuilt(cls, slimmed, **{**slimmed.config, "stages": stages})
