"""The builder of a program, which rules call: arrays get numbers, views and broadcasting become strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.demo.program import Op


class Lacking(Exception):
    """An operation, or a form of one, without a rule."""


@dataclass(frozen=True)
class Value:
    """A tensor of the program: the number of its array, and its shape."""

    at: int
    shape: tuple[int, ...]


@dataclass
class Builder:
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
        return self.place([x], shape, [(shape, offset, part.stride(), 0, strides_of(shape))])

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

    def pad(self, x: Any, widths: Sequence[int], value: float = 0.0) -> Value:
        """Padding with a constant; negative widths crop."""
        x = self.value(x)
        around = [(0, 0)] * (len(x.shape) - len(widths) // 2)
        around += [(widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2)]
        whole = [size + before + after for size, (before, after) in zip(x.shape, around, strict=True)]
        dims = [
            size + min(before, 0) + min(after, 0)
            for size, (before, after) in zip(x.shape, around, strict=True)
        ]
        reading, writing = strides_of(x.shape), strides_of(whole)
        read = sum(max(0, -before) * s for (before, _), s in zip(around, reading, strict=True))
        write = sum(max(0, before) * s for (before, _), s in zip(around, writing, strict=True))
        return self.place([x], whole, [(dims, read, reading, write, writing)], fill=float(value))

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


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous array."""
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
