"""The rules of layers: convolution, products with weights, pooling and norms (see `pruning.demo.rules`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pruning.demo.builder import Builder, Lacking, Value


def _convolution(
    b: Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    if transposed or len(shape) != 4:
        raise Lacking("transposed convolution" if transposed else f"{len(shape) - 2}-d convolution")
    if any(padding):
        x = b.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    x, weight = b.value(x), b.value(weight)
    return b.emit(
        "conv",
        [x, weight, *([] if bias is None else [bias])],
        shape,
        images=x.shape[0],
        groups=groups,
        channels=[x.shape[1], shape[1]],
        size=list(x.shape[2:]),
        kernel=list(weight.shape[2:]),
        stride=list(stride),
        dilation=list(dilation),
        out=list(shape[2:]),
    )


def _addmm(b: Builder, shape: Any, bias: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise Lacking("addmm with factors")
    if isinstance(y, Tensor) and isinstance(bias, Tensor) and bias.ndim == 1:
        return b.linear(b.value(x), b.value(y.T), bias)
    return b.zip("add", bias, _matmul(b, shape, x, y))


def _matmul(b: Builder, shape: Sequence[int], x: Any, y: Any) -> Value:
    if isinstance(y, Tensor) and y.ndim == 2:
        return b.linear(b.value(x), b.value(y.T), None)
    x, y = b.value(x), b.value(y)
    *batch, rows, inner = x.shape
    sizes = {"batch": math.prod(batch), "rows": rows, "inner": inner, "columns": y.shape[-1]}
    return b.emit("matmul", [x, y], shape, **sizes)


def _pool(b: Builder, name: str, shape: Sequence[int], x: Any, axes: Sequence[Any], step: Any) -> Value:
    """Pooling over windows [start, stop, count] along the two axes; a mean is over both counts."""
    x = b.value(x)
    *planes, height, width = x.shape
    settings = {"planes": math.prod(planes), "size": [height, width], "windows": axes, "step": list(step)}
    return b.emit("pool", [x], shape, name=name, **settings)


def _pairs(*settings: Any) -> list[Any]:
    """Settings of the two axes, of which one number may stand for both."""
    return [
        list(each) * (2 // len(each)) if isinstance(each, list | tuple) else [each] * 2 for each in settings
    ]


def _max_pool(
    b: Builder, shape: Sequence[int], x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> tuple[Value, None]:  # fmt: skip
    kernel, strides, pads, step = _pairs(kernel_size, stride or kernel_size, padding, dilation)
    size = b.value(x).shape[-2:]
    axes = []
    for k, s, p, d, length, count in zip(kernel, strides, pads, step, size, shape[-2:], strict=True):
        starts = [i * s - p for i in range(count)]
        inside = [(start if start >= 0 else start % d, start + (k - 1) * d + 1) for start in starts]
        axes.append([[start, min(stop, length), 1] for start, stop in inside])
    return _pool(b, "max", shape, x, axes, step), None


def _average_pool(
    b: Builder, shape: Sequence[int], x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    kernel, strides, pads = _pairs(kernel_size, stride or kernel_size, padding)
    size = b.value(x).shape[-2:]
    axes = []
    for axis, (k, s, p, length, count) in enumerate(
        zip(kernel, strides, pads, size, shape[-2:], strict=True)
    ):
        windows = []
        for start in (i * s - p for i in range(count)):
            stop, inside = start + k, [max(start, 0), min(start + k, length)]
            over = min(stop, length + p) - start if count_include_pad else inside[1] - inside[0]
            windows.append([*inside, over if divisor_override is None else (divisor_override, 1)[axis]])
        axes.append(windows)
    return _pool(b, "mean", shape, x, axes, (1, 1))


def _adaptive(b: Builder, name: str, shape: Sequence[int], x: Any) -> Value:
    axes = []
    for length, count in zip(b.value(x).shape[-2:], shape[-2:], strict=True):
        windows = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        axes.append([[start, stop, stop - start] for start, stop in windows])
    return _pool(b, name, shape, x, axes, (1, 1))


def _affine(b: Builder, x: Value, weight: Any, bias: Any, shape: Sequence[int]) -> Value:
    """A factor and an addend for each channel, which lie along the dimension that `shape` has not as 1."""
    if weight is not None:
        x = b.zip("multiply", x, b.view(weight, lambda t: t.reshape(shape)))
    return x if bias is None else b.zip("add", x, b.view(bias, lambda t: t.reshape(shape)))


def _layer_norm(
    b: Builder, shape: Sequence[int], x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Value, None, None]:
    rows = b.rows("normalise", b.value(x), math.prod(normalized_shape), shape, eps=eps)
    return _affine(b, rows, weight, bias, normalized_shape), None, None


def _group_norm(
    b: Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, n: int, channels: int, positions: int,
    groups: int, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    rows = b.rows("normalise", b.value(x), channels // groups * positions, shape, eps=eps)
    return _affine(b, rows, weight, bias, (channels, *[1] * (len(shape) - 2))), None, None


def _batch_norm(
    b: Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, mean: Tensor, variance: Tensor,
    momentum: float, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    """BatchNorm that nothing could be folded into: a factor and an addend."""
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    addend = (0 if bias is None else bias) - mean * factor
    return _affine(b, b.value(x), factor, addend, (len(mean), *[1] * (len(shape) - 2))), None, None


def _own_statistics(
    b: Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, training: bool, momentum: float,
    eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    """A norm of each channel over its own positions, as InstanceNorm comes."""
    if shape[0] != 1:
        raise Lacking("norms over batches")
    rows = b.rows("normalise", b.value(x), math.prod(shape[2:]), shape, eps=eps)
    return _affine(b, rows, weight, bias, (shape[1], *[1] * (len(shape) - 2))), None, None


#: ATen's operations by name, a part of `pruning.demo.rules.RULES`.
LAYERS: dict[str, Callable[..., Any]] = {
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
    "_native_batch_norm_legit": _own_statistics,
}
