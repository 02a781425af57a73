"""Channel labels: integers that tensors carry through a forward pass, and the ties between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.graph.layers import layer_width, parts
from pruning.graph.rule import Side
from pruning.tracing.parameter_views import Weights
from pruning.tracing.ties import NONE, Ties, spread, varying, vector_along

#: The reason for fixing channels that are tied to positions without a channel.
FIXED_SIZE = "it is joined with a tensor of fixed size"

#: Tensors outside the layers of the table (a layer scale, a position embedding) with more elements
#: than this get no labels; channels that are combined with them are fixed.
MOST_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class SideUse:
    """The labels of one side of a layer, or of a tensor outside the layers (side `self`).

    Attributes:
        labels: of each position, (positions,); on the side `self`, of each element, in its shape.
        dim: the dimension of the layer's input or output along which the positions lie, negative;
            unused on the side `self`.
    """

    labels: np.ndarray
    dim: int


@dataclass(frozen=True)
class Extent:
    """A size that module code gave to an operation and that counts channels.

    Attributes:
        module: the name of the module whose code ran.
        labels: of the channels that the size counts, one for each position.
    """

    module: str
    labels: np.ndarray


@dataclass
class Flow:
    """The record of one forward pass.

    Attributes:
        ties: which labels belong to the same channel.
        sides: the labels of each layer (or tensor) by name and side.
        reductions: by module, operator and number of the call, the channels over which a statistic is
            computed.
        fixed: labels that cannot be pruned, each vector with the reason.
        sized: labels that reached an operation whose sizes may be constants in the code.
        extents: these sizes.
        by_position: labels of channels that the code selects by position, with bounds that may be
            constants; each vector with the reason to fix them if they are.
        calls: how often each layer in the table ran.
        uses: by layer, uses of its weight and output positions, summed over the pass.
        readers: by convolution or linear layer, what reads its output: the name of a BatchNorm, or the
            empty string for anything else.
        other_macs: MACs of matrix products and convolutions outside those layers, in the pass.
        read_elsewhere: layers in the table whose tensors code outside the layer reads as well.
        functional: parameters outside the layers that the model's code passes to a convolution or
            linear function, each with the reason why their channels are not pruned.
        outputs: shapes of the outputs in eval mode that count, also of other calls of the model.
        probe: the copy of the model that ran, if it is on the meta device.
    """

    ties: Ties = field(default_factory=Ties)
    sides: dict[tuple[str, Side], SideUse] = field(default_factory=dict)
    reductions: dict[tuple[str, str, int], SideUse] = field(default_factory=dict)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    sized: list[np.ndarray] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    by_position: list[tuple[np.ndarray, str]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    uses: dict[str, tuple[float, float]] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    other_macs: float = 0.0
    read_elsewhere: set[str] = field(default_factory=set)
    functional: dict[str, str] = field(default_factory=dict)
    outputs: list[torch.Size] = field(default_factory=list)
    probe: nn.Module | None = None


class Labels:
    """The channel labels of the tensors of one forward pass.

    The labels of a tensor have its rank, with size 1 along dimensions on which they do not depend:
    those of images (N, C, H, W) behind a convolution are a tensor (1, C, 1, 1).

    Args:
        found: receives ties, fixed labels and the sides of layers.
        loose: names of parameters and buffers outside the layers of the table, by `id`; each gets one
            label per element at its first use.
        weights: finds the parameters that tensors are views of.
    """

    def __init__(self, found: Flow, loose: dict[int, str], weights: Weights):
        self.found, self.loose, self.weights = found, loose, weights
        #: Stack of the running modules: (name, description for messages).
        self.path = [("", "the model")]
        self._of = WeakTensorKeyDictionary()
        self._uniform = WeakTensorKeyDictionary()
        self._positions = WeakTensorKeyDictionary()
        #: The place of the running operator, if it computes statistics and outputs are compared.
        self.place: tuple[str, str, int] | None = None
        self._slices: dict[tuple[str, bytes], tuple[Tensor, int, set[tuple[int, int]]]] = {}

    # --- labels of tensors and layers ----------------------------------------------------

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the labels of a tensor; None where it holds no channels."""
        known = self._of.get(tensor)
        if known is None and id(tensor) in self.loose and tensor.numel() <= MOST_ELEMENTS:
            name = self.loose[id(tensor)]
            if (name, "self") not in self.found.sides:
                labels = self.found.ties.new(tensor.numel())
                self.found.sides[name, "self"] = SideUse(labels.reshape(tensor.shape), 0)
            known = torch.from_numpy(self.found.sides[name, "self"].labels)
        return known

    def carried(self, tensor: Tensor) -> Tensor | None:
        """Return the labels that a tensor got in this pass; None for parameters outside the layers."""
        return self._of.get(tensor)

    def put(self, tensor: object, labels: Tensor | None) -> None:
        """Set the labels of an output; fix them if it is no tensor or of another rank."""
        if not isinstance(tensor, Tensor):
            self.fix(labels, f"{self.where()} turns it into something other than a tensor")
        elif labels is not None and tensor.ndim == labels.ndim:
            self._of[tensor] = labels
        else:
            self.fix(labels, f"{self.where()} gives it another shape")
            if tensor in self._of:
                del self._of[tensor]

    def side(self, name: str, module: nn.Module, side: Side, dim: int) -> Tensor:
        """Return the labels of one side of a layer, (channels,); create them at its first use."""
        use = self.found.sides.get((name, side))
        if use is None:
            use = SideUse(self.found.ties.new(layer_width(module, side)), dim)
            self.found.sides[name, side] = use
            if parts(module) > 1:  # every part loses channels at the same places
                by_part = use.labels.reshape(parts(module), -1)
                for other in by_part[1:]:
                    self.found.ties.union(by_part[0], other)
        return torch.from_numpy(use.labels)

    def where(self) -> str:
        """Describe the running module, for messages."""
        return self.path[-1][1]

    # --- uniform tensors: all elements equal ---------------------------------------------

    def mark_uniform(self, tensor: Tensor) -> None:
        """Record that all elements of a tensor are equal, as in the initial state of a ConvLSTM."""
        self._uniform[tensor] = True

    @property
    def has_uniform(self) -> bool:
        """Whether any tensor is uniform."""
        return bool(self._uniform)

    def unmark_uniform(self, tensors: Iterable[Tensor]) -> None:
        """Record that tensors may no longer be uniform: they are written to, or their memory is shared."""
        for tensor in tensors:
            self._uniform.pop(tensor, None)

    def is_uniform(self, tensor: Tensor) -> bool:
        """Whether a tensor without channels is uniform, so that one of another width can replace it."""
        return tensor in self._uniform

    def of_or_uniform(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the labels of a tensor; give a uniform tensor new labels along `dim`.

        The size of a uniform tensor along `dim` may be a constant in the code.
        """
        labels = self.of(tensor)
        if labels is None and self.is_uniform(tensor):
            self.unmark_uniform([tensor])
            labels = spread(torch.from_numpy(self.found.ties.new(tensor.shape[dim])), tensor.ndim, dim)
            self.put(tensor, labels)
            self.note_sizes(labels, labels)
        return labels

    def note_weighted(self, name: str, positions: float, elements: int) -> None:
        """Record that code multiplied by the weight of an inferred layer at so many output positions.

        The operator's MACs were counted as those of no layer, which this corrects.
        """
        before = self.found.uses.get(name, (0.0, 0.0))
        self.found.uses[name] = before[0] + positions, before[1] + positions
        self.found.other_macs -= positions * elements
        self.found.calls[name] += 1

    # --- statistics over channels ----------------------------------------------------------

    def note_statistic(self, operand: Tensor, labels: Tensor) -> bool:
        """Record that the running operator computes a statistic over channels; return whether it may.

        Channels of a parameter may lie along several dimensions; statistics over these are not followed.
        """
        channel_dims = varying(labels)
        if len(channel_dims) > 1 or id(operand) in self.loose:
            return False
        if self.place is not None:
            dim = channel_dims[0]
            vector = vector_along(labels, dim, operand.shape[dim])
            self.found.reductions[self.place] = SideUse(vector.numpy(), dim)
        return True

    def mark_positions(self, tensor: Tensor, labels: Tensor) -> None:
        """Record that a tensor holds positions among channels, such as that of the maximum."""
        self._positions[tensor] = labels

    def fix_positions(self, tensors: Iterable[Tensor]) -> None:
        """Fix the channels among which tensors hold positions, because the model reads these."""
        for tensor in tensors:
            if tensor in self._positions:
                self.fix(self._positions[tensor], f"{self.where()} reads positions of its channels")

    # --- tied and fixed channels ----------------------------------------------------------

    def tie(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Tie labels element by element, with broadcasting; fix labels that are paired with `NONE`."""
        left, right = torch.broadcast_tensors(left, right)
        a, b = left.flatten().numpy(), right.flatten().numpy()
        both = (a != NONE) & (b != NONE)
        if both.all():
            self.found.ties.union(a, b)
            return
        self.found.ties.union(a[both], b[both])
        lone = np.concatenate([a[~both], b[~both]])
        self.found.fixed.append((lone[lone != NONE], reason))

    def tie_equal_parts(self, labels: Tensor, dim: int, length: int) -> None:
        """Tie the parts of this length along a dimension, so that all keep channels at the same places."""
        along = labels.movedim(dim, 0)
        pieces = along.reshape(-1, length, *along.shape[1:])
        for other in pieces[1:]:
            self.tie(pieces[0], other, FIXED_SIZE)

    def fix(self, labels: Tensor | None, reason: str) -> None:
        """Exclude the channels of these labels from pruning."""
        if labels is not None:
            flat = labels.flatten().numpy()
            self.found.fixed.append((flat[flat != NONE], reason))

    def fix_operands(self, name: str, operands: Iterable[Tensor]) -> None:
        """Fix the channels that reach an operation without a rule."""
        for operand in operands:
            self.fix(self.of(operand), f"{self.where()} uses it in {name}, an operation without a rule")

    # --- sizes and positions that the code may hold as constants -------------------------

    def note_sizes(self, labels: Tensor, sized: Tensor | None) -> None:
        """Record an operation that was given sizes, which may be constants in the code or attributes.

        Args:
            labels: of the operand. sized: labels along the dimensions whose sizes were given.
        """
        self.found.sized.append(labels.flatten().numpy())
        if sized is not None:
            for dim in varying(sized):
                vector = vector_along(sized, dim, sized.shape[dim])
                self.found.extents.append(Extent(self.path[-1][0], vector.numpy()))

    def note_positions(self, counts: Iterable[Tensor], reason: str) -> None:
        """Record that the code selected channels by position.

        Args:
            counts: label vectors whose lengths are the start, the end and the length of the selection.
        """
        for counted in counts:
            self.note_sizes(counted, counted)
            self.found.by_position.append((counted.flatten().numpy(), reason))

    def note_slice(self, labels: Tensor, dim: int, start: int, length: int) -> None:
        """Record a slice of a tensor whose channels lie along one dimension."""
        key = self.path[-1][0], labels.numpy().tobytes()
        self._slices.setdefault(key, (labels, dim, set()))[2].add((start, length))

    def close_slices(self, holds: Callable[[str, int], bool]) -> None:
        """Tie slices that divide a tensor into equal parts, or into multiples of one part.

        Call it after the pass. Slices of unequal length are not tied if an attribute of the module may
        hold one of their bounds.

        Args:
            holds: function (module name, value): whether an attribute of the module has this value.
        """
        for (module, _), (labels, dim, taken) in self._slices.items():
            bounds = {n for start, length in taken for n in (start, length, start + length)}
            length = min(length for _, length in taken)
            aligned = not any(n % length for n in (labels.shape[dim], *bounds))
            held = any(holds(module, n) for n in bounds if 0 < n < labels.shape[dim])
            if aligned and (len({length for _, length in taken}) == 1 or not held):
                self.tie_equal_parts(labels, dim, length)
