"""Max pooling that is fast for large batches on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Smallest batch for which two passes over slices are faster than torch's pooling on the CPU.
MANY = 8


class HalvingMaxPool(nn.MaxPool2d):
    """Compute `nn.MaxPool2d(2)` with the same outputs, in about half of the time for large batches.

    On the CPU torch pools narrow images value by value. The maximum of every two rows and then
    of every two columns uses whole-tensor operations, which run on the processor's vector
    units. This applies to inference only: the gradient would treat equal values differently.
    Exporters and compilers see an ordinary pooling, for which runtimes are optimized.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        images = input.shape[0]
        if (type(images) is int and images < MANY) or self.training or not input.is_cpu:
            return super().forward(input)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(input)
        height, width = input.shape[-2] // 2 * 2, input.shape[-1] // 2 * 2
        rows = torch.maximum(input[..., 0:height:2, :], input[..., 1:height:2, :])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])
