"""Build a program: the rules call the builder, which numbers arrays and turns views into strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.demo.program import Conv, Ints, Loop, Map, Op, Piece, Place, Rows, Zip

Shape: TypeAlias = Sequence[int]


class UnsupportedOperation(Exception):
    """Raised for an operation, or a variant of one, for which there is no rule."""


@dataclass(frozen=True)
class Value:
    """A tensor of the program: the number of its array, and its shape."""

    number: int
    shape: Ints


#: An input of an operation: a tensor of the program, or a constant.
Operand: TypeAlias = Value | Tensor | float


@dataclass
class Builder:
    """Collect the operations and the constants of a program."""

    ops: list[Op] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    #: Stored tensors and their numbers, by id; the reference to a tensor prevents the reuse of its id.
    _stored: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def value(self, x: Operand) -> Value:
        """Return an operand as a value; numbers and tensors become constants, each tensor stored once."""
        if isinstance(x, Value):
            return x
        if not isinstance(x, Tensor):
            return Value(self._store(torch.tensor(x)), ())
        if id(x) not in self._stored:
            self._stored[id(x)] = (x, self._store(x))
        return Value(self._stored[id(x)][1], tuple(x.shape))

    def _store(self, tensor: Tensor) -> int:
        self.constants.append(tensor.detach().float().flatten().clone())
        return -len(self.constants)

    def emit(self, loop: Loop, inputs: Sequence[Operand], shape: Shape) -> Value:
        """Append an operation, and return the value that it writes."""
        numbers = tuple(self.value(x).number for x in inputs)
        self.ops.append(Op(loop, numbers, math.prod(shape)))
        return Value(len(self.ops), tuple(shape))

    def view(self, x: Operand, change: Callable[[Tensor], Tensor]) -> Value:
        """Return the result of a function that only selects, copies or reorders elements."""
        source = self.value(x)
        return self._copy(source, change(torch.empty(source.shape, device="meta")))

    def views(self, x: Operand, change: Callable[[Tensor], object]) -> object:
        """Return the results of such a function (see `view`) with one output or a sequence of outputs."""
        source = self.value(x)
        parts = change(torch.empty(source.shape, device="meta"))
        return pytree.tree_map(lambda part: self._copy(source, part), parts)

    def _copy(self, x: Value, part: Tensor) -> Value:
        """Copy a part of an array; if the part is the whole array in the same order, reuse the array."""
        shape = tuple(part.shape)
        offset = int(part.storage_offset())
        if part.is_contiguous() and not offset and part.numel() == math.prod(x.shape):
            return Value(x.number, shape)
        return self.place([x], shape, [Piece(shape, offset, part.stride(), 0, strides_of(shape))])

    def place(
        self, inputs: Sequence[Operand], shape: Shape, pieces: Sequence[Piece], fill: float | None = None
    ) -> Value:
        """Copy one piece of each input into a new array; `fill` is the value of all other elements."""
        merged = []
        for piece in pieces:
            dims, (read, write) = _merged(piece.dims, piece.read_strides, piece.write_strides)
            merged.append(Piece(dims, piece.read_offset, read, piece.write_offset, write))
        filled = [] if fill is None else [fill]
        return self.emit(Place(math.prod(shape), tuple(merged)), [*inputs, *filled], shape)

    def pad(self, x: Operand, widths: Sequence[int], value: float = 0.0) -> Value:
        """Pad with a constant, like `torch.nn.functional.pad`; negative widths crop."""
        source = self.value(x)
        around = [(0, 0)] * (len(source.shape) - len(widths) // 2)
        around += [(widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2)]
        sizes = list(zip(source.shape, around, strict=True))
        shape = [size + before + after for size, (before, after) in sizes]
        dims = tuple(size + min(before, 0) + min(after, 0) for size, (before, after) in sizes)
        read_strides, write_strides = strides_of(source.shape), strides_of(shape)
        read = sum(max(0, -before) * s for (before, _), s in zip(around, read_strides, strict=True))
        write = sum(max(0, before) * s for (before, _), s in zip(around, write_strides, strict=True))
        piece = Piece(dims, read, read_strides, write, write_strides)
        return self.place([source], shape, [piece], fill=float(value))

    def zip(self, name: str, *operands: Operand) -> Value:
        """Apply a function of `program.ZIPS` to the elements of several operands, with broadcasting."""
        values = [self.value(x) for x in operands]
        shape = torch.broadcast_shapes(*(x.shape for x in values))
        strides = [torch.empty(x.shape, device="meta").expand(shape).stride() for x in values]
        dims, merged = _merged(shape, *strides)
        return self.emit(Zip(name, dims, merged), values, shape)

    def map(self, name: str, x: Operand, *values: float | None) -> Value:
        """Apply a function of `program.MAPS` to each element."""
        source = self.value(x)
        return self.emit(Map(name, values), [source], source.shape)

    def rows(self, name: str, x: Operand, size: int, shape: Shape, eps: float | None = None) -> Value:
        """Apply a function of `program.ROWS`, or `normalize`, to rows of `size` elements."""
        return self.emit(Rows(name, size, eps), [x], shape)

    def linear(self, x: Value, weight: Value, bias: Operand | None) -> Value:
        """Multiply (..., inputs) by a weight (outputs, inputs), as a convolution of one-pixel images."""
        outputs, inputs = weight.shape
        images, one = math.prod(x.shape[:-1]), (1, 1)
        conv = Conv(images, 1, (inputs, outputs), size=one, kernel=one, stride=one, dilation=one, out=one)
        return self.emit(conv, with_bias(x, weight, bias), (*x.shape[:-1], outputs))


def with_bias(x: Operand, weight: Operand, bias: Operand | None) -> list[Operand]:
    """Return the inputs of a convolution, with the bias if there is one."""
    return [x, weight] if bias is None else [x, weight, bias]


def strides_of(shape: Shape) -> Ints:
    """Return the strides of a contiguous array."""
    return torch.empty(tuple(shape), device="meta").stride()


def _merged(shape: Shape, *strides: Sequence[int]) -> tuple[Ints, tuple[Ints, ...]]:
    """Merge adjacent dimensions that are contiguous under all given strides; at least one remains."""
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
    return tuple(dims or [1]), tuple(tuple(m or [0]) for m in merged)
