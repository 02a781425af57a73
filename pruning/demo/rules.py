"""Lowering rules: each translates an ATen operation to operations of a program.

A rule is a function of the builder, the shape of the output and the operation's arguments. It returns
a value, or a tensor if the output does not depend on the input. `pruning.demo.layer_rules` has the
rules of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.demo.builder import Builder, Operand, Shape, UnsupportedOperation, Value, strides_of
from pruning.demo.layer_rules import LAYERS, Rule
from pruning.demo.program import Piece


def _map(name: str) -> Rule:
    return lambda b, shape, x, *values: b.map(name, x, *values)


def _zip(name: str) -> Rule:
    return lambda b, shape, x, other: b.zip(name, x, other)


def _same(b: Builder, shape: Shape, x: Value, *_: object, **__: object) -> Value:
    return x


def _reshape(b: Builder, shape: Shape, x: Operand, *_: object) -> Value:
    return Value(b.value(x).number, tuple(shape))


def _full(value: float) -> Rule:
    return lambda b, shape, *_, **__: torch.full(shape, value)


def _add(b: Builder, shape: Shape, x: Operand, other: Operand, alpha: float = 1) -> Value:
    return b.zip("add", x, other if alpha == 1 else b.zip("multiply", other, alpha))


def _subtract(b: Builder, shape: Shape, x: Operand, other: Operand, alpha: float = 1) -> Value:
    return b.zip("subtract", x, other if alpha == 1 else b.zip("multiply", other, alpha))


def _divide(b: Builder, shape: Shape, x: Operand, other: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise UnsupportedOperation(f"div with rounding mode {rounding_mode}")
    return b.zip("divide", x, other)


def _clamp(
    b: Builder, shape: Shape, x: Operand, min: Operand | None = None, max: Operand | None = None
) -> Value:
    if isinstance(min, Tensor | Value) or isinstance(max, Tensor | Value):
        raise UnsupportedOperation("clamp with tensors as bounds")
    bounds = (None if bound is None or math.isinf(bound) else bound for bound in (min, max))
    return b.map("clamp", x, *bounds)


def _gelu(b: Builder, shape: Shape, x: Operand, approximate: str = "none") -> Value:
    return b.map("gelu" if approximate == "none" else "gelu_tanh", x)


def _leaky_relu(b: Builder, shape: Shape, x: Operand, negative_slope: float = 0.01) -> Value:
    return b.map("leaky_relu", x, negative_slope)


def _elu(
    b: Builder, shape: Shape, x: Operand, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> Value:
    return b.map("elu", x, alpha, scale, input_scale)


def _cat(b: Builder, shape: Shape, parts: Sequence[Operand], dim: int = 0) -> Value:
    values = [x for x in map(b.value, parts) if x.shape != (0,)]
    strides, start, pieces = strides_of(shape), 0, []
    for x in values:
        pieces.append(Piece(x.shape, 0, strides_of(x.shape), start * strides[dim], strides))
        start += x.shape[dim]
    return b.place(values, shape, pieces)


def _index_select(b: Builder, shape: Shape, x: Operand, dim: int, index: Operand) -> Value:
    if not isinstance(index, Tensor):
        raise UnsupportedOperation("index_select by an index that depends on the input")
    x, indices = b.value(x), index.tolist()
    starts = [i for i, entry in enumerate(indices) if not i or entry != indices[i - 1] + 1]
    runs = zip(starts, [*starts[1:], len(indices)], strict=True)
    return _cat(b, shape, [_narrow(b, x, dim, indices[i], j - i) for i, j in runs], dim)


def _narrow(b: Builder, x: Value, dim: int, start: int, length: int) -> Value:
    return b.view(x, lambda t: t.narrow(dim, start, length))


def _reduce(name: str, indices: bool = False) -> Rule:
    """Return a rule that moves the reduced dimensions to the end and reduces over them.

    With `indices` the operation also returns indices along a dimension; the rule returns None for them.
    """

    def rule(
        b: Builder, shape: Shape, x: Operand, dim: int | Sequence[int] | None = None, *_: object, **__: object
    ) -> Value | tuple[Value, None]:
        x = b.value(x)
        axes = [dim] if isinstance(dim, int) else list(dim or range(len(x.shape)))
        reduced = [axis % len(x.shape) for axis in axes]
        kept = [axis for axis in range(len(x.shape)) if axis not in reduced]
        ordered = b.view(x, lambda t: t.permute(*kept, *sorted(reduced)))
        result = b.rows(name, ordered, math.prod(x.shape[axis] for axis in reduced), shape)
        return (result, None) if indices and dim is not None else result

    return rule


def _along(name: str) -> Rule:
    """Return a rule that applies a function along one dimension and keeps the shape."""

    def rule(b: Builder, shape: Shape, x: Operand, dim: int, *_: object) -> Value:
        moved = b.view(x, lambda t: t.movedim(dim, -1))
        result = b.rows(name, moved, shape[dim], moved.shape)
        return b.view(result, lambda t: t.movedim(-1, dim))

    return rule


#: Rules by the name of the ATen operation. Views need no rule. To support another operation, add its rule.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "lift_fresh_copy"), _same),
    "_to_copy": lambda b, shape, x, dtype=None, **_: b.zip("ne", x, 0) if dtype is torch.bool else x,
    **dict.fromkeys(("_unsafe_view", "reshape", "_reshape_copy"), _reshape),
    "zeros_like": _full(0.0),
    "ones_like": _full(1.0),
    "full_like": lambda b, shape, x, value, **_: torch.full(shape, value),
    # elementwise
    "relu": lambda b, shape, x: b.map("clamp", x, 0, None),
    "clamp": _clamp,
    "clamp_min": lambda b, shape, x, min: _clamp(b, shape, x, min),
    "clamp_max": lambda b, shape, x, max: _clamp(b, shape, x, None, max),
    "hardtanh": lambda b, shape, x, low=-1, high=1: b.map("clamp", x, low, high),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "gelu": _gelu,
    **{name: _map(name) for name in ("sigmoid", "tanh", "exp", "log", "log1p", "sqrt", "rsqrt", "abs", "neg",
                                     "reciprocal", "erf", "logical_not")},
    "add": _add,
    "sub": _subtract,
    "rsub": lambda b, shape, x, other, alpha=1: _subtract(b, shape, other, x, alpha),
    "mul": _zip("multiply"),
    "div": _divide,
    **{name: _zip(name) for name in ("maximum", "minimum", "pow", "eq", "ne", "gt", "ge", "lt", "le")},
    "where": lambda b, shape, choice, x, other: b.zip("where", choice, x, other),
    **LAYERS,
    # over dimensions
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "amax": _reduce("max"),
    "amin": _reduce("min"),
    "max": _reduce("max", indices=True),
    "min": _reduce("min", indices=True),
    "any": _reduce("max"),
    "_softmax": _along("softmax"),
    "_log_softmax": _along("log_softmax"),
    "cat": _cat,
    "index_select": _index_select,
    "constant_pad_nd": lambda b, shape, x, pad, value=0.0: b.pad(x, pad, value),
}  # fmt: skip
