"""torchvision's deformable convolution, known without importing torchvision."""

from __future__ import annotations

import math
from abc import ABC

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula


class DeformableConv(nn.Module, ABC):
    """The abstract type of torchvision's DeformConv2d and its subclasses.

    Besides its input, the layer reads offsets of the kernel positions, and optionally a mask of factors.
    """

    weight: Tensor
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]

    @classmethod
    def __subclasshook__(cls, subclass: type) -> bool:
        return any(
            base.__module__ == "torchvision.ops.deform_conv" and base.__name__ == "DeformConv2d"
            for base in subclass.__mro__
        )


def count_deformable() -> None:
    """Register torchvision's deformable convolution in PyTorch's flop counter, if torchvision is loaded.

    It counts as a convolution, without the interpolation between pixels.
    """
    operation = getattr(torch.ops.torchvision, "deform_conv2d", None)
    if operation is not None and operation not in flop_registry:

        @register_flop_formula(operation)
        def flops(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
            return 2 * math.prod(out_shape) * math.prod(weight[1:])
