"""Labels: numbers for channels, which tensors carry, and what is tied to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.graph.layers import Side

#: The label of a position that belongs to no channel.
NONE = -1

#: Why channels are fixed that are tied to positions without a channel.
FIXED_SIZE = "it is joined with a tensor of fixed size"

#: Of tensors that no layer in the table owns (a layer scale, a position embedding), those
#: with more elements than this are not followed: what they touch is fixed.
MOST_ELEMENTS = 1_000_000


class Ties:
    """Numbers that are tied to one another, as disjoint sets; vectors at a time."""

    def __init__(self) -> None:
        self._parent = np.arange(0)
        self._size = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def new(self, count: int) -> np.ndarray:
        self._size += count
        return np.arange(self._size - count, self._size)

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """Tie two vectors element by element."""
        self._waiting.append((left, right))

    def root(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest number that each one is tied to; `NONE` stays."""
        self._settle()
        return np.where(numbers == NONE, NONE, self._parent[numbers])

    def _settle(self) -> None:
        if len(self._parent) < self._size:
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), self._size)])
        if not self._waiting:
            return
        left, right = (np.concatenate(side) for side in zip(*self._waiting, strict=True))
        self._waiting = []
        parent = self._parent
        while True:
            left, right = parent[left], parent[right]
            differ = left != right
            if not differ.any():
                break
            left, right = left[differ], right[differ]
            np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
            while not np.array_equal(parent[parent], parent):
                parent = parent[parent]
        self._parent = parent


@dataclass(frozen=True)
class SideUse:
    """One side of a layer as it was met: the label of each position, and where they lie.

    `labels` is a vector and `dim`, negative, the dimension of the layer's input or output
    along which it lies. For a tensor of its own (side `self`) there is a label for each
    element, and `dim` says nothing yet.
    """

    labels: np.ndarray
    dim: int


@dataclass(frozen=True)
class Extent:
    """A size of channels that an operation may have been given by the code around it.

    Attributes:
        module: the name of the module whose code ran.
        labels: of the channels that the size counts, one for each position.
    """

    module: str
    labels: np.ndarray


@dataclass
class Flow:
    """What a forward pass showed.

    Attributes:
        ties: between labels. sides: by layer (or tensor) name and side.
        fixed: labels that must stay, each with the reason.
        rigid: labels that passed an operation whose sizes may be written in the code.
        extents: these sizes.
        placed: labels whose number the code may know, as it takes channels by position; each with
            that as a reason.
        calls: how often each layer in the table ran.
        uses: (uses of a weight, output positions) per layer, summed over the pass.
        follows: for every convolution and linear layer, what reads its output; the empty
            text is anything but a norm.
        other_macs: of matrix products and convolutions outside those layers, for one example.
        borrowed: layers in the table whose tensors were read by something else than themselves.
        functional: parameters of no layer by which the model's code convolves, or which it
            multiplies with, each with the reason why their channels stay.
        outputs: shapes of what the model gave in eval mode.
        probe: the copy of the model that ran, if on the meta device.
    """

    ties: Ties = field(default_factory=Ties)
    sides: dict[tuple[str, Side], SideUse] = field(default_factory=dict)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    rigid: list[np.ndarray] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    placed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    uses: dict[str, tuple[float, float]] = field(default_factory=dict)
    follows: dict[str, list[str]] = field(default_factory=dict)
    other_macs: float = 0.0
    borrowed: set[str] = field(default_factory=set)
    functional: dict[str, str] = field(default_factory=dict)
    outputs: list[torch.Size] = field(default_factory=list)
    probe: nn.Module | None = None


class Labels:
    """The labels of the tensors of one forward pass, and what happens to them.

    Labels of a tensor have its rank, with size 1 along the dimensions that do not matter.

    Args:
        found: receives ties, fixed labels and the tensors met.
        own: parameters and buffers of no layer in the table, by identity; they get labels
            for their elements when they are first used.
    """

    def __init__(self, found: Flow, own: dict[int, str]):
        self.found, self.own = found, own
        #: The modules that run, each inside the one before it: name, and how messages call it.
        self.path = [("", "the model")]
        self._of = WeakTensorKeyDictionary()
        self._even = WeakTensorKeyDictionary()
        self._slices: dict[tuple[str, bytes], tuple[Tensor, int, set[tuple[int, int]]]] = {}

    def filled(self, tensor: Tensor) -> None:
        """A tensor was made that is the same everywhere, such as the first state of a ConvLSTM."""
        self._even[tensor] = True

    def written(self, tensors: Iterable[Tensor]) -> None:
        """These are the same everywhere no longer, or may come to be: something shares their memory."""
        for tensor in tensors:
            self._even.pop(tensor, None)

    def is_even(self, tensor: Tensor) -> bool:
        """Whether a tensor without channels is the same everywhere, so that it fits any of its size."""
        return tensor in self._even

    def labels_or_even(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The labels of a tensor; one that is the same everywhere gets some, along this dimension.

        Its size there may be written in the code.
        """
        labels = self.of(tensor)
        if labels is None and self.is_even(tensor):
            self.written([tensor])
            labels = spread(torch.from_numpy(self.found.ties.new(tensor.shape[dim])), tensor.ndim, dim)
            self.put(tensor, labels)
            self.rigid(labels, labels)
        return labels

    def of(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor; None where no channel lies in it."""
        known = self._of.get(tensor)
        if known is None and id(tensor) in self.own and tensor.numel() <= MOST_ELEMENTS:
            name = self.own[id(tensor)]
            if (name, "self") not in self.found.sides:
                numbers = self.found.ties.new(tensor.numel())
                self.found.sides[name, "self"] = SideUse(numbers.reshape(tensor.shape), 0)
            known = torch.from_numpy(self.found.sides[name, "self"].labels)
        return known

    def put(self, tensor: Any, labels: Tensor | None) -> None:
        if not isinstance(tensor, Tensor):
            self.fix(labels, f"{self.where()} makes something else than a tensor of it")
        elif labels is not None and tensor.ndim == labels.ndim:
            self._of[tensor] = labels
        else:
            self.fix(labels, f"{self.where()} gives it another shape")
            if tensor in self._of:
                del self._of[tensor]

    def tie(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Tie labels element by element; what is tied to no channel is fixed."""
        left, right = torch.broadcast_tensors(left, right)
        a, b = left.flatten().numpy(), right.flatten().numpy()
        both = (a != NONE) & (b != NONE)
        if both.all():
            self.found.ties.tie(a, b)
            return
        self.found.ties.tie(a[both], b[both])
        lone = np.concatenate([a[~both], b[~both]])
        self.found.fixed.append((lone[lone != NONE], reason))

    def fix(self, labels: Tensor | None, reason: str) -> None:
        if labels is not None:
            numbers = labels.flatten().numpy()
            self.found.fixed.append((numbers[numbers != NONE], reason))

    def rigid(self, labels: Tensor, sized: Tensor | None) -> None:
        """An operation on channels with sizes that may be written in the code, or held by its module.

        `sized` has labels along the dimensions whose size the operation was given.
        """
        self.found.rigid.append(labels.flatten().numpy())
        for dim in varying(sized):
            vector = vector_along(sized, dim, sized.shape[dim])  # type: ignore[arg-type, union-attr]
            self.found.extents.append(Extent(self.path[-1][0], vector.numpy()))

    def equal_parts(self, labels: Tensor, dim: int, length: int) -> None:
        """Channels were cut into parts of this length: the parts keep as many each."""
        along = labels.movedim(dim, 0)
        parts = along.reshape(-1, length, *along.shape[1:])
        for other in parts[1:]:
            self.tie(parts[0], other, FIXED_SIZE)

    def sliced(self, labels: Tensor, dim: int, start: int, length: int) -> None:
        """A slice was taken of channels that lie along one dimension."""
        key = self.path[-1][0], labels.numpy().tobytes()
        self._slices.setdefault(key, (labels, dim, set()))[2].add((start, length))

    def settle(self, holds: Callable[[str, int], bool]) -> None:
        """The pass has ended: slices that were equal parts of a tensor, or several of them, count as such.

        Unless they are unequal, and an attribute of the module that ran (`holds`) may tell where they end.
        """
        for (module, _), (labels, dim, taken) in self._slices.items():
            numbers = {n for start, length in taken for n in (start, length, start + length)}
            length = min(length for _, length in taken)
            parts = not any(n % length for n in (labels.shape[dim], *numbers))
            told = any(holds(module, n) for n in numbers if 0 < n < labels.shape[dim])
            if parts and (len({length for _, length in taken}) == 1 or not told):
                self.equal_parts(labels, dim, length)

    def placed(self, counts: Iterable[Tensor], reason: str) -> None:
        """Channels were taken by position: where each of `counts` begins or ends, or how long it is."""
        for counted in counts:
            self.rigid(counted, counted)
            self.found.placed.append((counted.flatten().numpy(), reason))

    def where(self) -> str:
        """The module that runs, for messages."""
        return self.path[-1][1]

    def unknown(self, name: str, operands: Iterable[Tensor]) -> None:
        """An operation that channels cannot be followed through: they stay."""
        for operand in operands:
            self.fix(
                self.of(operand), f"{self.where()} uses it in {name}, which channels are not followed through"
            )


def varying(labels: Tensor | None) -> list[int]:
    """The dimensions along which channels lie."""
    return [] if labels is None else [d for d, size in enumerate(labels.shape) if size > 1]


def vector_along(labels: Tensor, dim: int, size: int) -> Tensor:
    """Labels that lie along one dimension at most, as a vector along it."""
    for d in reversed(range(labels.ndim)):
        if d != dim:
            labels = labels.select(d, 0)
    return labels.expand(size)


def spread(vector: Tensor, rank: int, dim: int) -> Tensor:
    """A vector of labels along one dimension of several."""
    return vector.reshape([-1 if d == dim % rank else 1 for d in range(rank)])


def compact(full: Tensor) -> Tensor:
    """Labels with size 1 along every dimension on which they do not depend."""
    for d in range(full.ndim):
        if full.shape[d] < 2:
            continue
        first = full.narrow(d, 0, 1)
        if full.stride(d) == 0 or torch.equal(full, first.expand(full.shape)):
            full = first
    return full
