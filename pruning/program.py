"""A network as a list of plain operations on flat arrays, for runtimes that have no tensors.

    {"constants": [36, 4, ...], "input": 784, "output": 9, "ops": [
        {"kind": "conv", "in": [0, -1, -2], "length": 2704, "groups": 1, "channels": [1, 4], ...},
        {"kind": "pool", "in": [1], "length": 676, "name": "max", ...}, ...]}

Every tensor is contiguous, in float32, and its shape is known, so all that depends on shapes is
settled here: views are gone, broadcasting and permutations are strides, padding and pooling
windows are numbers. Seven kinds of loops are left, which `program.js` runs in a browser and
`Program.__call__` with torch. Operation i writes array i + 1; array 0 is the input; negative
numbers are constants, the first of them -1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from pruning.errors import ExportError
from pruning.export import cause
from pruning.runtimes import quiet

Op = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """What a network computes for one example, as plain data.

    `input` is the length of the array that goes in, `output` the number of the one that comes
    out.
    """

    input: int
    constants: list[Tensor]
    ops: list[Op]
    output: int

    def to_json(self) -> dict[str, Any]:
        """All but the constants' values, which are `weights`."""
        lengths = [len(constant) for constant in self.constants]
        return {"constants": lengths, "input": self.input, "output": self.output, "ops": self.ops}

    @property
    def weights(self) -> bytes:
        """The values of all constants, one after the other, as little-endian float32."""
        return b"".join(constant.numpy().astype("<f4").tobytes() for constant in self.constants)

    @property
    def probabilities(self) -> bool:
        """Whether the outputs are probabilities already."""
        last = self.ops[self.output - 1] if self.output > 0 else {}
        return last.get("name") == "softmax"

    def __call__(self, x: Tensor) -> Tensor:
        """The output for one example, (1, ...), as a flat tensor: what the page must compute."""
        arrays = [x.detach().flatten().clone()]  # strides count from where a storage begins
        for op in self.ops:
            given = [arrays[i] if i >= 0 else self.constants[-1 - i] for i in op["in"]]
            if op.get("fill") is not None:
                given.insert(0, self.constants[-1 - op["fill"]])
            arrays.append(_LOOPS[op["kind"]](op, *given).flatten().float())
        return arrays[self.output] if self.output >= 0 else self.constants[-1 - self.output]


def program_of(model: nn.Module, example: Tensor) -> Program:
    """The program of a model in eval mode, for a batch of one.

    Args:
        example: (1, ...), float32.

    Raises `ExportError` when the model cannot be traced or needs an operation for which there is no
    rule; it is named.
    """
    kind = type(model).__name__
    try:
        with quiet():
            exported = torch.export.export(model, (example,)).run_decompositions()
    except Exception as error:  # torch.export can fail in any way
        raise ExportError(f"{kind} cannot be traced by torch.export: {cause(error)}") from error
    try:
        return _lowered(exported, example)
    except _Lacking as lacking:
        raise ExportError(
            f"{kind} cannot become a list of operations: there is no rule for {lacking}; replace it in the "
            "model, or add a row to pruning.program.RULES"
        ) from None


class _Lacking(Exception):
    """An operation, or a form of one, without a rule."""


@dataclass(frozen=True)
class Value:
    """A tensor of the program: the number of its array, and its shape."""

    at: int
    shape: tuple[int, ...]


@dataclass
class _Builder:
    """Collects the operations of a program."""

    ops: list[Op] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    #: Keeps what `places` knows by identity.
    seen: list[Any] = field(default_factory=list)

    def value(self, x: Any) -> Value:
        """Anything as a value: tensors and numbers become constants, each stored once."""
        if isinstance(x, Value):
            return x
        tensor = x if isinstance(x, Tensor) else torch.tensor(x)
        if id(x) not in self.places or not isinstance(x, Tensor):
            self.constants.append(tensor.detach().float().flatten().clone())
            self.places[id(x)] = -len(self.constants)
            self.seen.append(x)
        return Value(self.places[id(x)], tuple(tensor.shape))

    def emit(self, kind: str, inputs: Sequence[Any], shape: Sequence[int], **settings: Any) -> Value:
        given = [self.value(x).at for x in inputs]
        self.ops.append({"kind": kind, "in": given, "length": math.prod(shape), **settings})
        return Value(len(self.ops), tuple(shape))

    def view(self, x: Any, change: Callable[[Tensor], Any]) -> Any:
        """What a function that only moves elements makes of a value: one value, or several."""
        x = self.value(x)
        found = change(torch.empty(x.shape, device="meta"))
        return pytree.tree_map(lambda part: self._copied(x, part), found)

    def _copied(self, x: Value, part: Tensor) -> Value:
        shape = tuple(part.shape)
        offset = int(part.storage_offset())
        if part.is_contiguous() and not offset and part.numel() == math.prod(x.shape):
            return Value(x.at, shape)
        return self.place([x], shape, [(shape, offset, part.stride(), 0, _strides(shape))])

    def place(
        self, inputs: Sequence[Any], shape: Sequence[int], pieces: Sequence[tuple[Any, ...]], fill: Any = None
    ) -> Value:
        """Copies: of each input (dims, where to read from, strides, where to write to, strides)."""
        made = []
        for dims, read, reading, write, writing in pieces:
            dims, (reading, writing) = _merged(dims, reading, writing)
            made.append({"dims": dims, "read": read, "from": reading, "write": write, "to": writing})
        filled = None if fill is None else self.value(fill).at
        return self.emit("place", inputs, shape, fill=filled, pieces=made)

    def zip(self, name: str, *operands: Any) -> Value:
        """Elementwise, with broadcasting."""
        given = [self.value(x) for x in operands]
        shape = torch.broadcast_shapes(*(x.shape for x in given))
        spread = [torch.empty(x.shape, device="meta").expand(shape).stride() for x in given]
        dims, strides = _merged(shape, *spread)
        return self.emit("zip", given, shape, name=name, dims=dims, strides=strides)

    def map(self, name: str, x: Any, *values: Any) -> Value:
        x = self.value(x)
        return self.emit("map", [x], x.shape, name=name, values=list(values))

    def rows(self, name: str, x: Value, length: int, shape: Sequence[int], **settings: Any) -> Value:
        return self.emit("rows", [x], shape, name=name, size=length, **settings)

    def linear(self, x: Value, weight: Value, bias: Any) -> Value:
        """(..., inputs) by a weight (outputs, inputs): a convolution of images of one pixel."""
        outputs, inputs = weight.shape
        one = [1, 1]
        return self.emit(
            "conv",
            [x, weight, *([] if bias is None else [bias])],
            (*x.shape[:-1], outputs),
            images=math.prod(x.shape[:-1]),
            groups=1,
            channels=[inputs, outputs],
            size=one, kernel=one, stride=one, dilation=one, out=one,
        )  # fmt: skip


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _merged(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The same walk over as few dimensions as possible, at least one."""
    dims: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        here = [each[axis] for each in strides]
        if size == 1:
            continue
        if dims and all(m[-1] == stride * size for m, stride in zip(merged, here, strict=True)):
            dims[-1] *= size
            for m, stride in zip(merged, here, strict=True):
                m[-1] = stride
        else:
            dims.append(size)
            for m, stride in zip(merged, here, strict=True):
                m.append(stride)
    return dims or [1], [m or [0] for m in merged]


def _lowered(exported: Any, example: Tensor) -> Program:
    builder = _Builder()
    known: dict[str, Any] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            known[spec.arg.name] = Value(0, tuple(example.shape))
        else:
            stored = exported.state_dict
            known[spec.arg.name] = (stored if spec.target in stored else exported.constants)[spec.target]
    for node in exported.graph.nodes:
        if node.op == "output":
            found = pytree.tree_leaves(pytree.tree_map(lambda n: known[n.name], node.args))
            if len(found) != 1 or not isinstance(found[0], Value):
                raise _Lacking(f"{len(found)} outputs; one tensor that depends on the input is expected")
            return Program(example.numel(), builder.constants, builder.ops, found[0].at)
        if node.op == "call_function":
            look = lambda n: known[n.name] if isinstance(n, torch.fx.Node) else n  # noqa: E731
            args, kwargs = pytree.tree_map(look, (node.args, node.kwargs))
            known[node.name] = _applied(builder, node, args, kwargs)
    raise AssertionError("a graph ends with its output")


def _applied(builder: _Builder, node: Any, args: Any, kwargs: Any) -> Any:
    """What a node computes: a constant where nothing in it depends on the input."""
    target = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(target, torch._ops.OpOverload):
        raise _Lacking(str(target))
    name = target._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise _Lacking(f"{name}, which draws at random")
    if not any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((args, kwargs))):
        return target(*args, **kwargs)
    made = node.meta.get("val")
    first = made[0] if isinstance(made, list | tuple) else made
    if isinstance(first, Tensor) and first.dtype not in (torch.float32, torch.bool):
        raise _Lacking(f"{name} of {str(first.dtype).removeprefix('torch.')}")
    if name in RULES:
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        return RULES[name](builder, shape, *args, **kwargs)
    if target.is_view and (name != "as_strided" or node.args[0].meta["val"].is_contiguous()):
        return builder.view(args[0], lambda x: target(x, *args[1:], **kwargs))
    raise _Lacking(name)


# --- a rule for each operation: (builder, shape of the output, arguments) -> value ----


def _map(name: str) -> Callable[..., Value]:
    return lambda b, shape, x, *values: b.map(name, x, *values)


def _zip(name: str) -> Callable[..., Value]:
    return lambda b, shape, x, other: b.zip(name, x, other)


def _same(b: _Builder, shape: Any, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _reshaped(b: _Builder, shape: Sequence[int], x: Any, *_: Any) -> Value:
    return Value(b.value(x).at, tuple(shape))


def _full(value: float) -> Callable[..., Tensor]:
    return lambda b, shape, *_, **__: torch.full(shape, value)


def _add(b: _Builder, shape: Any, x: Any, other: Any, alpha: float = 1) -> Value:
    return b.zip("add", x, other if alpha == 1 else b.zip("multiply", other, alpha))


def _subtract(b: _Builder, shape: Any, x: Any, other: Any, alpha: float = 1) -> Value:
    return b.zip("subtract", x, other if alpha == 1 else b.zip("multiply", other, alpha))


def _divide(b: _Builder, shape: Any, x: Any, other: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise _Lacking(f"div with rounding mode {rounding_mode}")
    return b.zip("divide", x, other)


def _clamp(b: _Builder, shape: Any, x: Any, min: Any = None, max: Any = None) -> Value:
    if isinstance(min, Tensor | Value) or isinstance(max, Tensor | Value):
        raise _Lacking("clamp between tensors")
    bounds = (None if bound is None or math.isinf(bound) else bound for bound in (min, max))
    return b.map("clamp", x, *bounds)


def _gelu(b: _Builder, shape: Any, x: Any, approximate: str = "none") -> Value:
    return b.map("gelu" if approximate == "none" else "gelu_tanh", x)


def _leaky_relu(b: _Builder, shape: Any, x: Any, negative_slope: float = 0.01) -> Value:
    return b.map("leaky_relu", x, negative_slope)


def _elu(
    b: _Builder, shape: Any, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> Value:
    return b.map("elu", x, alpha, scale, input_scale)


def _convolution(
    b: _Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    if transposed or len(shape) != 4:
        raise _Lacking("transposed convolution" if transposed else f"{len(shape) - 2}-d convolution")
    if any(padding):
        x = _pad(b, (), x, [padding[1], padding[1], padding[0], padding[0]])
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


def _addmm(b: _Builder, shape: Any, bias: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise _Lacking("addmm with factors")
    if isinstance(y, Tensor) and isinstance(bias, Tensor) and bias.ndim == 1:
        return b.linear(b.value(x), b.value(y.T), bias)
    return b.zip("add", bias, _matmul(b, shape, x, y))


def _matmul(b: _Builder, shape: Sequence[int], x: Any, y: Any) -> Value:
    if isinstance(y, Tensor) and y.ndim == 2:
        return b.linear(b.value(x), b.value(y.T), None)
    x, y = b.value(x), b.value(y)
    *batch, rows, inner = x.shape
    sizes = {"batch": math.prod(batch), "rows": rows, "inner": inner, "columns": y.shape[-1]}
    return b.emit("matmul", [x, y], shape, **sizes)


def _pad(b: _Builder, shape: Any, x: Any, pad: Sequence[int], value: float = 0.0) -> Value:
    """Padding with a constant; negative widths crop."""
    x = b.value(x)
    around = [(0, 0)] * (len(x.shape) - len(pad) // 2)
    around += [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    whole = [size + before + after for size, (before, after) in zip(x.shape, around, strict=True)]
    dims = [
        size + min(before, 0) + min(after, 0) for size, (before, after) in zip(x.shape, around, strict=True)
    ]
    reading, writing = _strides(x.shape), _strides(whole)
    read = sum(max(0, -before) * s for (before, _), s in zip(around, reading, strict=True))
    write = sum(max(0, before) * s for (before, _), s in zip(around, writing, strict=True))
    return b.place([x], whole, [(dims, read, reading, write, writing)], fill=float(value))


def _cat(b: _Builder, shape: Sequence[int], parts: Sequence[Any], dim: int = 0) -> Value:
    values = [x for x in map(b.value, parts) if x.shape != (0,)]
    strides, at, pieces = _strides(shape), 0, []
    for x in values:
        pieces.append((x.shape, 0, _strides(x.shape), at * strides[dim], strides))
        at += x.shape[dim]
    return b.place(values, shape, pieces)


def _index_select(b: _Builder, shape: Sequence[int], x: Any, dim: int, index: Any) -> Value:
    if not isinstance(index, Tensor):
        raise _Lacking("index_select by an index that depends on the input")
    x, places = b.value(x), index.tolist()
    starts = [i for i, place in enumerate(places) if not i or place != places[i - 1] + 1]
    runs = zip(starts, [*starts[1:], len(places)], strict=True)
    return _cat(b, shape, [_narrowed(b, x, dim, places[i], j - i) for i, j in runs], dim)


def _narrowed(b: _Builder, x: Value, dim: int, start: int, length: int) -> Value:
    return b.view(x, lambda t: t.narrow(dim, start, length))


def _pool(b: _Builder, name: str, shape: Sequence[int], x: Any, axes: Sequence[Any], step: Any) -> Value:
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
    b: _Builder, shape: Sequence[int], x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0,
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
    b: _Builder, shape: Sequence[int], x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0,
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


def _adaptive(b: _Builder, name: str, shape: Sequence[int], x: Any) -> Value:
    axes = []
    for length, count in zip(b.value(x).shape[-2:], shape[-2:], strict=True):
        windows = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        axes.append([[start, stop, stop - start] for start, stop in windows])
    return _pool(b, name, shape, x, axes, (1, 1))


def _reduce(name: str, pair: bool = False) -> Callable[..., Any]:
    """A reduction over dimensions, which are brought to the end; `pair` for those that tell places, too."""

    def rule(b: _Builder, shape: Sequence[int], x: Any, dim: Any = None, *_: Any, **__: Any) -> Any:
        x = b.value(x)
        axes = [dim] if isinstance(dim, int) else list(dim or range(len(x.shape)))
        moved = [axis % len(x.shape) for axis in axes]
        kept = [axis for axis in range(len(x.shape)) if axis not in moved]
        ordered = b.view(x, lambda t: t.permute(*kept, *sorted(moved)))
        made = b.rows(name, ordered, math.prod(x.shape[axis] for axis in moved), shape)
        return (made, None) if pair and dim is not None else made

    return rule


def _along(name: str) -> Callable[..., Value]:
    """Rows along one dimension, which stay as long as they are."""

    def rule(b: _Builder, shape: Sequence[int], x: Any, dim: int, *_: Any) -> Value:
        moved = b.view(x, lambda t: t.movedim(dim, -1))
        made = b.rows(name, moved, shape[dim], moved.shape)
        return b.view(made, lambda t: t.movedim(-1, dim))

    return rule


def _affine(b: _Builder, x: Value, weight: Any, bias: Any, shape: Sequence[int]) -> Value:
    """A factor and an addend for each channel, which lie along the dimension that `shape` has not as 1."""
    if weight is not None:
        x = b.zip("multiply", x, b.view(weight, lambda t: t.reshape(shape)))
    return x if bias is None else b.zip("add", x, b.view(bias, lambda t: t.reshape(shape)))


def _layer_norm(
    b: _Builder, shape: Sequence[int], x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Value, None, None]:
    rows = b.rows("normalise", b.value(x), math.prod(normalized_shape), shape, eps=eps)
    return _affine(b, rows, weight, bias, normalized_shape), None, None


def _group_norm(
    b: _Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, n: int, channels: int, positions: int,
    groups: int, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    rows = b.rows("normalise", b.value(x), channels // groups * positions, shape, eps=eps)
    return _affine(b, rows, weight, bias, (channels, *[1] * (len(shape) - 2))), None, None


def _batch_norm(
    b: _Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, mean: Tensor, variance: Tensor,
    momentum: float, eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    """BatchNorm that nothing could be folded into: a factor and an addend."""
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    addend = (0 if bias is None else bias) - mean * factor
    return _affine(b, b.value(x), factor, addend, (len(mean), *[1] * (len(shape) - 2))), None, None


def _own_statistics(
    b: _Builder, shape: Sequence[int], x: Any, weight: Any, bias: Any, training: bool, momentum: float,
    eps: float,
) -> tuple[Value, None, None]:  # fmt: skip
    """A norm of each channel over its own positions, as InstanceNorm comes."""
    if shape[0] != 1:
        raise _Lacking("norms over batches")
    rows = b.rows("normalise", b.value(x), math.prod(shape[2:]), shape, eps=eps)
    return _affine(b, rows, weight, bias, (shape[1], *[1] * (len(shape) - 2))), None, None


#: ATen's operations by name, without the views (which need no rule). A new one is a row here.
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "lift_fresh_copy"), _same),
    "_to_copy": lambda b, shape, x, dtype=None, **_: b.zip("ne", x, 0) if dtype is torch.bool else x,
    **dict.fromkeys(("_unsafe_view", "reshape", "_reshape_copy"), _reshaped),
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
    # layers
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
    # over dimensions
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "amax": _reduce("max"),
    "amin": _reduce("min"),
    "max": _reduce("max", pair=True),
    "min": _reduce("min", pair=True),
    "any": _reduce("max"),
    "_softmax": _along("softmax"),
    "_log_softmax": _along("log_softmax"),
    "cat": _cat,
    "index_select": _index_select,
    "constant_pad_nd": _pad,
}  # fmt: skip


# --- what each kind of loop computes, with torch --------------------------------------


def _run_conv(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    inputs, outputs = op["channels"]
    images = x.view(op["images"], inputs, *op["size"])
    kernels = weight.view(outputs, inputs // op["groups"], *op["kernel"])
    return F.conv2d(images, kernels, bias, op["stride"], 0, op["dilation"], op["groups"])


def _run_matmul(op: Op, x: Tensor, y: Tensor) -> Tensor:
    return x.view(op["batch"], op["rows"], -1) @ y.view(op["batch"], op["inner"], -1)


def _run_zip(op: Op, *operands: Tensor) -> Tensor:
    spread = [x.as_strided(op["dims"], strides) for x, strides in zip(operands, op["strides"], strict=True)]
    return _ZIPS[op["name"]](*spread)


def _run_place(op: Op, *inputs: Tensor) -> Tensor:
    made = torch.empty(op["length"])
    if op["fill"] is not None:
        made.fill_(float(inputs[0]))
        inputs = inputs[1:]
    for x, piece in zip(inputs, op["pieces"], strict=True):
        there = made.as_strided(piece["dims"], piece["to"], piece["write"])
        there.copy_(x.as_strided(piece["dims"], piece["from"], piece["read"]))
    return made


def _run_pool(op: Op, x: Tensor) -> Tensor:
    x = x.view(op["planes"], *op["size"])
    largest = op["name"] == "max"
    for dim, (windows, step) in enumerate(zip(op["windows"], op["step"], strict=True), start=1):
        parts = [x.narrow(dim, start, stop - start) for start, stop, _ in windows]
        parts = [part[:, ::step] if dim == 1 else part[:, :, ::step] for part in parts]
        if largest:
            x = torch.stack([part.amax(dim) for part in parts], dim)
        else:
            sums = (part.sum(dim) / over for part, (_, _, over) in zip(parts, windows, strict=True))
            x = torch.stack(list(sums), dim)
    return x


def _run_rows(op: Op, x: Tensor) -> Tensor:
    x = x.view(-1, op["size"])
    if op["name"] == "normalise":
        return F.layer_norm(x, (op["size"],), eps=op["eps"])
    return _ROWS[op["name"]](x)


_LOOPS: dict[str, Callable[..., Tensor]] = {
    "conv": _run_conv,
    "matmul": _run_matmul,
    "map": lambda op, x: _MAPS[op["name"]](x, *op["values"]),
    "zip": _run_zip,
    "place": _run_place,
    "pool": _run_pool,
    "rows": _run_rows,
}
_MAPS: dict[str, Callable[..., Tensor]] = {
    "clamp": lambda x, low, high: x.clamp(low, high),
    "leaky_relu": F.leaky_relu,
    "elu": lambda x, alpha, scale, inner: torch.where(x > 0, x * scale, alpha * scale * (x * inner).expm1()),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "exp", "log", "log1p", "sqrt", "rsqrt",
                                               "abs", "neg", "reciprocal", "erf", "logical_not")},
}  # fmt: skip
_ZIPS: dict[str, Callable[..., Tensor]] = {
    "where": lambda choice, x, other: torch.where(choice != 0, x, other),
    **{name: getattr(torch, name) for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum",
                                               "pow", "eq", "ne", "gt", "ge", "lt", "le")},
}  # fmt: skip
_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
}
