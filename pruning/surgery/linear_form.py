"""Linear layers and convolutions as matrix products: rows of inputs times a matrix of weights.

A convolution multiplies the values under its kernel with its weights at every output position, so it is a
linear layer whose input rows are these values. A transposed convolution is a convolution, with the kernel
mirrored, of its input with zeros between the values. A linear layer is a convolution without a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.utils.modules import call
from pruning.utils.tree import Inputs, fresh

#: Largest number of values in a block of rows.
BLOCK = 1 << 22

_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = (
    "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
)  # fmt: skip

#: The functions that multiply inputs with a weight, with the names of their arguments.
FUNCTIONS: Mapping[Callable[..., object], Sequence[str]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV_ARGUMENTS),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED_ARGUMENTS),
}


@dataclass(frozen=True)
class LinearForm:
    """One linear layer or convolution as `y = x W + b` for each of its groups.

    Attributes:
        kernel, stride, dilation: of a convolution; empty for a linear layer.
        padding: amounts before and after each dimension, the last dimension first, as `F.pad` takes them.
        groups: number of groups of a convolution.
        spread: for a transposed convolution, the steps between the input's values, with zeros between them.

    >>> import torch
    >>> layer, x = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 5, 5)
    >>> [use] = weight_uses(layer, x, {layer.weight})
    >>> rows, outputs = next(use.form.rows(x, layer(x)))
    >>> rows.shape, outputs.shape, use.form.matrix(layer.weight).shape
    (torch.Size([50, 2, 18]), torch.Size([50, 2, 3]), torch.Size([2, 18, 3]))
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    groups: int = 1
    spread: tuple[int, ...] = ()

    @property
    def channel_dim(self) -> int:
        """Return the dimension of the input and the output, from the end, along which channels lie."""
        return -1 - len(self.kernel)

    def rows(self, x: Tensor, *outputs: Tensor, most: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Yield blocks of rows in double precision: of the input and of tensors shaped like the output.

        Each block is (rows, groups, inputs or outputs of one group). The rows are those of one example after
        the other.

        Args:
            most: about the largest number of rows; if there are more, some positions of each example are
                taken, the same ones in every call with this number of positions.
        """
        batched = [self._batched(tensor) for tensor in (x, *outputs)]
        examples, positions = len(batched[0]), math.prod(batched[1].shape[2:])
        at = None
        if most is not None and examples * positions > most:
            chosen = max(1, most // examples)
            if chosen < positions:
                order = torch.randperm(positions, generator=torch.Generator().manual_seed(positions))
                at, positions = order[:chosen].sort().values, chosen
            if examples > most:
                batched = [tensor[:: -(-examples // most)] for tensor in batched]
        per_example = math.prod(self.kernel) * batched[0].shape[1] * positions
        size = max(1, BLOCK // max(1, per_example))
        for block in zip(*(tensor.split(size) for tensor in batched), strict=True):
            windows = self._windows(block[0])
            results = (result.unsqueeze(-1) for result in block[1:])
            yield tuple(self._by_group(tensor, at) for tensor in (windows, *results))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as a matrix (groups, inputs, outputs) in double precision."""
        weight = weight.detach().double()
        weight = weight.reshape(*weight.shape[:2], -1).unflatten(0, (self.groups, -1))
        if self.spread:  # (groups, inputs, outputs, taps)
            return weight.transpose(2, 3).flip(2).flatten(1, 2)
        return weight.flatten(2).mT

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return a matrix (groups, inputs, outputs) in the form of a weight."""
        if self.spread:
            matrix = matrix.unflatten(1, (-1, math.prod(self.kernel))).flip(2).transpose(2, 3)
        else:
            matrix = matrix.mT
        return matrix.reshape(like.shape).to(like)

    def _batched(self, x: Tensor) -> Tensor:
        """Return an input or output as (examples, channels, *positions)."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])
        return x if x.ndim == len(self.kernel) + 2 else x.unsqueeze(0)

    def _windows(self, x: Tensor) -> Tensor:
        """Return the values under the kernel at every output position, as rows."""
        dims = len(self.kernel)
        if self.spread:
            sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spread, strict=True)]
            between = x.new_zeros(*x.shape[:2], *sizes)
            places: list[slice] = [slice(None), slice(None), *(slice(None, None, n) for n in self.spread)]
            between[tuple(places)] = x
            x = between
        x = F.pad(x, self.padding) if any(self.padding) else x
        for dim in range(dims):
            reach = (self.kernel[dim] - 1) * self.dilation[dim] + 1
            x = x.unfold(2 + dim, reach, self.stride[dim])[..., :: self.dilation[dim]]
        return x if dims else x.unsqueeze(-1)

    def _by_group(self, x: Tensor, at: Tensor | None) -> Tensor:
        """Return (examples, channels, *positions, *taps) as (rows, groups, channels of a group × taps).

        Only the positions `at` are taken, in double precision.
        """
        dims = len(self.kernel)
        if at is not None:
            places = torch.unravel_index(at.to(x.device), x.shape[2 : 2 + dims])
            where: tuple[slice | Tensor, ...] = (slice(None), slice(None), *places)
            x, dims = x[where], 1
        x = x.double().flatten(2 + dims).unflatten(1, (self.groups, -1)).movedim((1, 2), (-3, -2))
        return x.flatten(0, -4).flatten(2)


@dataclass(frozen=True)
class WeightUse:
    """One multiplication of an input with a weight: the weight and the bias themselves, input and output."""

    form: LinearForm
    weight: Tensor
    bias: Tensor | None
    input: Tensor
    output: Tensor


class _Recorder(TorchFunctionMode):
    """Records the uses of some weights."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.uses: list[WeightUse] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        use = use_of(func, args, kwargs or {}, result)
        if use is not None and id(use.weight) in self.weights:
            self.uses.append(use)
        return result


def weight_uses(model: nn.Module, inputs: Inputs, weights: Iterable[Tensor]) -> list[WeightUse]:
    """Return the multiplications with some weights in a forward pass, in their order.

    Only products of the weight itself are found, not of a tensor computed from it.
    """
    with _Recorder(weights) as recorder:
        call(model, fresh(inputs))
    return recorder.uses


def use_of(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], result: object
) -> WeightUse | None:
    """Return a call of a function of torch as a multiplication with a weight; None if it is none."""
    names = FUNCTIONS.get(func)
    if names is None or not isinstance(result, Tensor):
        return None
    return _use({**dict(zip(names, args, strict=False)), **kwargs}, "output_padding" in names, result)


def _use(given: Mapping[str, object], transposed: bool, output: Tensor) -> WeightUse:
    """Return a use from the arguments of a linear layer or convolution."""
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    assert isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    kernel = tuple(weight.shape[2:])

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        values = (value,) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
        return values * len(kernel) if len(values) == 1 else values

    stride, dilation = each("stride", 1), each("dilation", 1)
    groups = given.get("groups", 1)
    assert isinstance(groups, int)
    reaches = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    if given.get("padding") == "same":
        sides = [(reach // 2, reach - reach // 2) for reach in reaches]
    elif given.get("padding") == "valid":
        sides = [(0, 0) for _ in reaches]
    elif transposed:
        amounts = zip(reaches, each("padding", 0), each("output_padding", 0), strict=True)
        sides = [(reach - amount, reach - amount + extra) for reach, amount, extra in amounts]
    else:
        sides = [(amount, amount) for amount in each("padding", 0)]
    padding = tuple(amount for side in reversed(sides) for amount in side)
    steps = (1,) * len(kernel) if transposed else stride
    form = LinearForm(kernel, steps, dilation, padding, groups, stride if transposed else ())
    return WeightUse(form, weight, bias, x, output)
