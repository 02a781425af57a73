"""The form of a rule that says where a type of layer keeps its channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

#: A side of a layer, or `self` for a tensor that a model uses outside the layers of the table.
Side = Literal["out", "in", "self"]

#: How channels pass through a layer; see `Rule`.
Kind = Literal["weighted", "embedding", "channelwise", "norm", "recurrent"]


@dataclass(frozen=True)
class Rule:
    """Where a type of layer keeps its channels, and how they pass through it.

    Args:
        out: names of the tensors that hold output channels, each with the dimension they lie along.
            A norm or an activation has one set of channels, which count as output channels.
        into: names of the tensors that hold input channels, each with the dimension they lie along.
        out_count, in_count: attributes that store the number of channels; in a tuple, the last entry.
            If empty, the width is taken from the tensors.
        parts: attribute that stores the number of equal parts into which the channels are divided.
        kind: `"weighted"`, every output channel is a sum over input channels (a convolution);
            `"embedding"`, output channels are looked up by index; `"channelwise"`, each channel is
            treated alone (BatchNorm, PReLU); `"norm"`, channels are scaled by statistics over several
            of them (LayerNorm); `"recurrent"`, hidden units are made of input channels at every time step.
        bias: the tensor that is added to the weighted sum, if the layer adds one and neither scales the
            sum nor pads its input with zeros; `apply` folds the constants of removed channels into it.
        dim: the dimension of the input and the output along which channels lie, from the end. The default
            is -1 for an embedding and for a weight of two dimensions, -3 for one of four (a convolution of
            images); for channelwise layers and norms it is dimension 1.
        spans: of a weight in which channels of one side lie along several neighboring dimensions, as those of
            (inputs, heads, positions) do: how many of its dimensions each dimension of the rule stands for.
            `trace` finds it; rules that are registered have none.
    """

    out: Mapping[str, int]
    into: Mapping[str, int] = field(default_factory=dict)
    out_count: str = ""
    in_count: str = ""
    parts: str = ""
    kind: Kind = "weighted"
    bias: str = ""
    dim: int | None = None
    spans: tuple[int, ...] = ()

    @property
    def weight(self) -> str:
        """The name of the weight with input and output channels, or else of the first tensor in `out`."""
        return next((name for name in self.out if name in self.into), next(iter(self.out), ""))

    def count(self, side: Side) -> str:
        """Return the attribute that stores the number of channels of one side; empty if there is none."""
        return self.out_count if side == "out" else self.in_count

    def width(self, layer: nn.Module, side: Side) -> int:
        """Return the number of channels of one side of a layer."""
        if name := self.count(side):
            count = getattr(layer, name)
            return count[-1] if isinstance(count, tuple) else count
        held = self.out if side == "out" else self.into
        shapes = ((getattr(layer, name, None), dim) for name, dim in held.items())
        return next(
            (self.merged(tensor).shape[dim] for tensor, dim in shapes if isinstance(tensor, Tensor)), 0
        )

    def merged(self, tensor: Tensor) -> Tensor:
        """Return a view of a weight, or of a tensor of its shape, that has the dimensions of the rule.

        >>> Rule({"weight": 1}, {"weight": 0}, spans=(1, 2)).merged(torch.zeros(8, 2, 3)).shape
        torch.Size([8, 6])
        """
        return tensor.view([math.prod(shape) for shape in self._spanned(tensor)]) if self.spans else tensor

    def selected(self, tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
        """Return the part of a weight at the given positions along a dimension of the rule.

        Positions of several dimensions of the weight must form a rectangle of these.

        >>> rule = Rule({"weight": 1}, {"weight": 0}, spans=(1, 2))
        >>> rule.selected(torch.arange(6).view(1, 2, 3), 1, torch.tensor([3, 5]))
        tensor([[[3, 5]]])
        """
        if not self.spans:
            return tensor.index_select(dim, keep.to(tensor.device))
        return in_rectangle(tensor, self.span(dim), keep)

    def span(self, dim: int) -> range:
        """Return the dimensions of the weight that a dimension of the rule stands for.

        >>> Rule({"weight": 1}, {"weight": 0}, spans=(1, 2)).span(1)
        range(1, 3)
        """
        first = sum(self.spans[:dim]) if self.spans else dim
        return range(first, first + (self.spans[dim] if self.spans else 1))

    def _spanned(self, tensor: Tensor) -> list[torch.Size]:
        spans = map(self.span, range(len(self.spans)))
        return [tensor.shape[span.start : span.stop] for span in spans]


def dimensions(tensor: Tensor, dim: int) -> range:
    """Return the dimensions of a tensor along which positions lie: `dim`, or all where it is their number.

    >>> dimensions(torch.zeros(2, 3), 1), dimensions(torch.zeros(2, 3), 2)
    (range(1, 2), range(0, 2))
    """
    return range(dim, dim + 1) if dim < tensor.ndim else range(dim)


def in_rectangle(tensor: Tensor, dims: range, keep: Tensor) -> Tensor:
    """Return the part of a tensor at positions of neighboring dimensions, which form a rectangle.

    Args:
        dims: the dimensions. keep: positions among all of these dimensions, in order of memory.

    >>> in_rectangle(torch.arange(6).view(2, 3), range(2), torch.tensor([0, 2, 3, 5]))
    tensor([[0, 2],
            [3, 5]])
    """
    places = torch.unravel_index(keep, [tensor.shape[d] for d in dims])
    for dim, place in zip(dims, places, strict=True):
        tensor = tensor.index_select(dim, place.unique().to(tensor.device))
    kept = math.prod(tensor.shape[d] for d in dims)
    assert kept == len(keep), f"{len(keep)} positions are no rectangle of {kept}"
    return tensor
