"""Represent a network as a list of operations on flat arrays, for runtimes without tensors.

    {"constants": [36, 4, ...], "input": 784, "output": 9, "ops": [
        {"kind": "conv", "in": [0, -1, -2], "length": 2704, "groups": 1, "channels": [1, 4], ...},
        {"kind": "pool", "in": [1], "length": 676, "name": "max", ...}, ...]}

Every array is contiguous float32 of a known length. The shapes of all tensors are known, so everything
that depends on shapes is computed in advance: views disappear, broadcasting and permutations become
strides, padding and pooling windows become numbers. Seven kinds of loops remain. `program.js` runs them
in a browser, `Program.__call__` runs them with torch. Arrays are numbered: array 0 is the input,
operation i (from 0) writes array i + 1, and constant i has the number -1 - i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Pair: TypeAlias = tuple[int, int]
Ints: TypeAlias = tuple[int, ...]
#: Start, stop and divisor of a pooling window along one axis.
Window: TypeAlias = tuple[int, int, int]

#: Elementwise functions of one array, by name; used by `Map`.
MAPS: dict[str, Callable[..., Tensor]] = {
    "clamp": lambda x, low, high: x.clamp(low, high),
    "leaky_relu": F.leaky_relu,
    "elu": lambda x, alpha, scale, inner: torch.where(x > 0, x * scale, alpha * scale * (x * inner).expm1()),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "exp", "log", "log1p", "sqrt", "rsqrt",
                                               "abs", "neg", "reciprocal", "erf", "logical_not")},
}  # fmt: skip
#: Elementwise functions of several arrays, by name; used by `Zip`.
ZIPS: dict[str, Callable[..., Tensor]] = {
    "where": lambda choice, x, other: torch.where(choice != 0, x, other),
    **{name: getattr(torch, name) for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum",
                                               "pow", "eq", "ne", "gt", "ge", "lt", "le")},
}  # fmt: skip
#: Functions of rows, from (rows, size) to (rows,) or (rows, size), by name; used by `Rows`.
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
}


@dataclass(frozen=True)
class Conv:
    """A 2-d convolution without padding; its inputs are images, a weight and an optional bias."""

    kind: ClassVar = "conv"
    images: int
    groups: int
    channels: Pair
    size: Pair
    kernel: Pair
    stride: Pair
    dilation: Pair
    out: Pair

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        inputs, outputs = self.channels
        images = x.view(self.images, inputs, *self.size)
        kernels = weight.view(outputs, inputs // self.groups, *self.kernel)
        return F.conv2d(images, kernels, bias, self.stride, 0, self.dilation, self.groups)


@dataclass(frozen=True)
class Matmul:
    """A batched matrix product, (batch, rows, inner) by (batch, inner, columns)."""

    kind: ClassVar = "matmul"
    batch: int
    rows: int
    inner: int
    columns: int

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        return x.view(self.batch, self.rows, -1) @ y.view(self.batch, self.inner, -1)


@dataclass(frozen=True)
class Map:
    """A function of `MAPS`, applied to each element, with the numbers `values` as parameters."""

    kind: ClassVar = "map"
    name: str
    values: tuple[float | None, ...]

    def run(self, x: Tensor) -> Tensor:
        return MAPS[self.name](x, *self.values)


@dataclass(frozen=True)
class Zip:
    """A function of `ZIPS`, applied to the elements of several arrays, each array with its own strides."""

    kind: ClassVar = "zip"
    name: str
    dims: Ints
    strides: tuple[Ints, ...]

    def run(self, *operands: Tensor) -> Tensor:
        pairs = zip(operands, self.strides, strict=True)
        return ZIPS[self.name](*(x.as_strided(self.dims, strides) for x, strides in pairs))


@dataclass(frozen=True)
class Piece:
    """A strided copy: its dimensions, and the offsets and strides of reading and writing."""

    dims: Ints
    read_offset: int
    read_strides: Ints
    write_offset: int
    write_strides: Ints


@dataclass(frozen=True)
class Place:
    """Strided copies into one array, one piece per input; one more input fills the other elements."""

    kind: ClassVar = "place"
    length: int
    pieces: tuple[Piece, ...]

    def run(self, *inputs: Tensor) -> Tensor:
        y = torch.empty(self.length)
        if len(inputs) > len(self.pieces):
            y.fill_(float(inputs[-1]))
        for x, piece in zip(inputs, self.pieces, strict=False):
            target = y.as_strided(piece.dims, piece.write_strides, piece.write_offset)
            target.copy_(x.as_strided(piece.dims, piece.read_strides, piece.read_offset))
        return y


@dataclass(frozen=True)
class Pool:
    """The `max` or `mean` over windows; a mean is the sum divided by the divisors of both axes."""

    kind: ClassVar = "pool"
    name: str
    planes: int
    size: Pair
    windows: tuple[tuple[Window, ...], ...]
    step: Pair

    def run(self, x: Tensor) -> Tensor:
        x = x.view(self.planes, *self.size)
        for dim, (windows, step) in enumerate(zip(self.windows, self.step, strict=True), start=1):
            parts = [x.narrow(dim, start, stop - start) for start, stop, _ in windows]
            parts = [part[:, ::step] if dim == 1 else part[:, :, ::step] for part in parts]
            if self.name == "max":
                x = torch.stack([part.amax(dim) for part in parts], dim)
            else:
                sums = (part.sum(dim) / over for part, (_, _, over) in zip(parts, windows, strict=True))
                x = torch.stack(list(sums), dim)
        return x


@dataclass(frozen=True)
class Rows:
    """A function of `ROWS`, or `normalize` with its `eps`, applied to rows of `size` elements."""

    kind: ClassVar = "rows"
    name: str
    size: int
    eps: float | None = None

    def run(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.size)
        return ROWS[self.name](x) if self.eps is None else F.layer_norm(x, (self.size,), eps=self.eps)


Loop: TypeAlias = Conv | Matmul | Map | Zip | Place | Pool | Rows
LOOPS: tuple[type[Loop], ...] = (Conv, Matmul, Map, Zip, Place, Pool, Rows)


@dataclass(frozen=True)
class Op:
    """One operation: a loop, the numbers of the arrays that it reads, and the length of its output."""

    loop: Loop
    inputs: Ints
    length: int

    def to_json(self) -> dict[str, object]:
        """Return the operation as one flat dict."""
        settings = {key: value for key, value in asdict(self.loop).items() if value is not None}
        return {"kind": self.loop.kind, "in": self.inputs, "length": self.length, **settings}


@dataclass(frozen=True)
class Program:
    """The computation of a network for one example, as plain data.

    Attributes:
        input: length of the input array.
        constants: weights and other constants, flat float32.
        ops: operations in the order in which they run.
        output: number of the output array.

    Example:
        >>> import torch
        >>> from pruning.demo.program import Map, Op, Program
        >>> relu = Program(3, [], [Op(Map("clamp", (0, None)), (0,), 3)], output=1)
        >>> relu(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([0., 0., 2.])
        >>> relu.to_json()["ops"]
        [{'kind': 'map', 'in': (0,), 'length': 3, 'name': 'clamp', 'values': (0, None)}]
    """

    input: int
    constants: list[Tensor]
    ops: list[Op]
    output: int

    def to_json(self) -> dict[str, object]:
        """Return the program as plain data, without the values of its constants (see `weights`)."""
        lengths = [len(constant) for constant in self.constants]
        ops = [op.to_json() for op in self.ops]
        return {"constants": lengths, "input": self.input, "output": self.output, "ops": ops}

    @property
    def weights(self) -> bytes:
        """Return the values of all constants, concatenated, as little-endian float32."""
        return b"".join(constant.numpy().astype("<f4").tobytes() for constant in self.constants)

    @property
    def probabilities(self) -> bool:
        """Return whether the outputs are probabilities, because the last operation is a softmax."""
        last = self.ops[self.output - 1].loop if self.output > 0 else None
        return isinstance(last, Rows) and last.name == "softmax"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the flat output for one example (1, ...), the reference for the page."""
        arrays = [x.detach().flatten().clone()]  # as_strided counts offsets from the start of the storage

        def read(number: int) -> Tensor:
            return arrays[number] if number >= 0 else self.constants[-1 - number]

        for op in self.ops:
            arrays.append(op.loop.run(*map(read, op.inputs)).flatten().float())
        return read(self.output)
