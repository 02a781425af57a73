"""Lowering rules of layers: convolutions, matrix products, pooling and norms (see `pruning.demo.rules`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from pruning.demo.builder import Builder, Operand, Shape, UnsupportedOperation, Value, with_bias
from pruning.demo.program import Conv, Matmul, Pair, Pool, Window

#: The result of a rule: a value or a constant. A rule for an operation with several outputs returns a
#: tuple, with None for outputs that it does not compute.
Lowered: TypeAlias = Value | Tensor | tuple[Value | None, ...]
#: A function of the builder, the shape of the output, and the arguments of the operation.
Rule: TypeAlias = Callable[..., Lowered]
#: A setting of both axes of an image: one number for both, or one per axis.
PerAxis: TypeAlias = int | Sequence[int]


def _pair(setting: PerAxis) -> Pair:
    """Return a setting as one number per axis."""
    if isinstance(setting, int):
        return setting, setting
    return setting[0], setting[-1]


def _convolution(
    b: Builder, shape: Shape, x: Operand, weight: Operand, bias: Operand | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int],
    groups: int,
) -> Value:  # fmt: skip
    if transposed or len(shape) != 4:
        raise UnsupportedOperation(
            "transposed convolution" if transposed else f"{len(shape) - 2}-d convolution"
        )
    if any(padding):
        x = b.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    x, weight = b.value(x), b.value(weight)
    conv = Conv(
        images=x.shape[0],
        groups=groups,
        channels=(x.shape[1], shape[1]),
        size=_pair(x.shape[2:]),
        kernel=_pair(weight.shape[2:]),
        stride=_pair(stride),
        dilation=_pair(dilation),
        out=_pair(shape[2:]),
    )
    return b.emit(conv, with_bias(x, weight, bias), shape)


def _addmm(
    b: Builder, shape: Shape, bias: Operand, x: Operand, y: Operand, beta: float = 1, alpha: float = 1
) -> Value:
    if beta != 1 or alpha != 1:
        raise UnsupportedOperation("addmm with factors")
    if isinstance(y, Tensor) and isinstance(bias, Tensor) and bias.ndim == 1:
        return b.linear(b.value(x), b.value(y.T), bias)
    return b.zip("add", bias, _matmul(b, shape, x, y))


def _matmul(b: Builder, shape: Shape, x: Operand, y: Operand) -> Value:
    if isinstance(y, Tensor) and y.ndim == 2:
        return b.linear(b.value(x), b.value(y.T), None)
    x, y = b.value(x), b.value(y)
    *batch, rows, inner = x.shape
    return b.emit(Matmul(math.prod(batch), rows, inner, y.shape[-1]), [x, y], shape)


def _pool(
    b: Builder, name: str, shape: Shape, x: Operand, windows: Sequence[Sequence[Window]], step: Pair = (1, 1)
) -> Value:
    """Pool over windows along the height and the width."""
    x = b.value(x)
    *planes, height, width = x.shape
    both = tuple(tuple(axis) for axis in windows)
    return b.emit(Pool(name, math.prod(planes), (height, width), both, step), [x], shape)


def _max_pool(
    b: Builder, shape: Shape, x: Operand, kernel_size: PerAxis, stride: PerAxis = (), padding: PerAxis = 0,
    dilation: PerAxis = 1, ceil_mode: bool = False,
) -> tuple[Value, None]:  # fmt: skip
    kernel, strides, pads, step = map(_pair, (kernel_size, stride or kernel_size, padding, dilation))
    size = b.value(x).shape[-2:]
    axes = []
    for k, s, p, d, length, count in zip(kernel, strides, pads, step, size, shape[-2:], strict=True):
        starts = [i * s - p for i in range(count)]
        inside = [(start if start >= 0 else start % d, start + (k - 1) * d + 1) for start in starts]
        axes.append([(start, min(stop, length), 1) for start, stop in inside])
    return _pool(b, "max", shape, x, axes, step), None


def _average_pool(
    b: Builder, shape: Shape, x: Operand, kernel_size: PerAxis, stride: PerAxis = (), padding: PerAxis = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    kernel, strides, pads = map(_pair, (kernel_size, stride or kernel_size, padding))
    size = b.value(x).shape[-2:]
    # The divisor of a window is the product of both axes' divisors; an override is given to one axis.
    overrides = (divisor_override, None if divisor_override is None else 1)
    axes = []
    for k, s, p, length, count, override in zip(
        kernel, strides, pads, size, shape[-2:], overrides, strict=True
    ):
        windows: list[Window] = []
        for start in (i * s - p for i in range(count)):
            first, stop = max(start, 0), min(start + k, length)
            covered = min(start + k, length + p) - start if count_include_pad else stop - first
            windows.append((first, stop, covered if override is None else override))
        axes.append(windows)
    return _pool(b, "mean", shape, x, axes)


def _adaptive(b: Builder, name: str, shape: Shape, x: Operand) -> Value:
    axes = []
    for length, count in zip(b.value(x).shape[-2:], shape[-2:], strict=True):
        windows = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        axes.append([(start, stop, stop - start) for start, stop in windows])
    return _pool(b, name, shape, x, axes)


def _affine(b: Builder, x: Value, weight: Operand | None, bias: Operand | None, shape: Shape) -> Value:
    """Multiply by a weight and add a bias, both first reshaped to `shape`."""
    if weight is not None:
        x = b.zip("multiply", x, b.view(weight, lambda t: t.reshape(shape)))
    return x if bias is None else b.zip("add", x, b.view(bias, lambda t: t.reshape(shape)))


def _by_channel(channels: int, shape: Shape) -> Shape:
    """Return the shape that broadcasts one number per channel over an output (N, C, ...)."""
    return (channels, *[1] * (len(shape) - 2))


def _layer_norm(
    b: Builder, shape: Shape, x: Operand, normalized_shape: Shape, weight: Operand | None,
    bias: Operand | None, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    rows = b.rows("normalize", x, math.prod(normalized_shape), shape, eps)
    return _affine(b, rows, weight, bias, normalized_shape), None, None


def _group_norm(
    b: Builder, shape: Shape, x: Operand, weight: Operand | None, bias: Operand | None, n: int, channels: int,
    positions: int, groups: int, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    rows = b.rows("normalize", x, channels // groups * positions, shape, eps)
    return _affine(b, rows, weight, bias, _by_channel(channels, shape)), None, None


def _batch_norm(
    b: Builder, shape: Shape, x: Operand, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    variance: Tensor, momentum: float, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    """Lower a BatchNorm that could not be folded to one factor and one addend per channel."""
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    addend = (0 if bias is None else bias) - mean * factor
    return _affine(b, b.value(x), factor, addend, _by_channel(len(mean), shape)), None, None


def _instance_norm(
    b: Builder, shape: Shape, x: Operand, weight: Operand | None, bias: Operand | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    """Lower an InstanceNorm, which is exported as a BatchNorm that uses the statistics of its input."""
    if shape[0] != 1:
        raise UnsupportedOperation("norms over batches")
    rows = b.rows("normalize", x, math.prod(shape[2:]), shape, eps)
    return _affine(b, rows, weight, bias, _by_channel(shape[1], shape)), None, None


#: Rules by the name of the ATen operation; `pruning.demo.rules.RULES` includes them.
LAYERS: dict[str, Rule] = {
    "convolution": _convolution,
    "addmm": _addmm,
    "mm": _matmul,
    "bmm": _matmul,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _average_pool,
    "_adaptive_avg_pool2d": lambda b, shape, x, size: _adaptive(b, "mean", shape, x),
    "adaptive_max_pool2d": lambda b, shape, x, size: (_adaptive(b, "max", shape, x), None),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit": _instance_norm,
}
