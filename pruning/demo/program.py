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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
