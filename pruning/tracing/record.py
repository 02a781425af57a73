"""The record of one forward pass that followed channels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from pruning.graph.rule import Side
from pruning.tracing.axes import Axes, ProductUse
from pruning.tracing.reshapes import Reshapes
from pruning.tracing.ties import Ties
from pruning.utils.work import Pass


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


@dataclass(frozen=True)
class KnownSize:
    """An attribute of a layer of torch that is known to count channels.

    Attributes:
        module, attribute: the name of the layer, and of its attribute.
        labels: of the channels that it counts, one for each.
    """

    module: str
    attribute: str
    labels: np.ndarray


@dataclass(frozen=True)
class Composed:
    """A parameter from which code computes a weight.

    Attributes:
        made, read: the dimensions of the parameter along which the weight makes and reads channels, or the
            numbers of their spans.
        dim: the dimension of inputs and outputs along which channels lie, as in `SideUse`.
        spans: as in `Rule`.
    """

    made: int
    read: int
    dim: int
    spans: tuple[int, ...] = ()


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
        known: attributes that are known to hold sizes.
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
        done: what the pass in eval mode did, to find its batch.
        outputs: shapes of the outputs in eval mode that count, also of other calls of the model.
        aligned: labels of channels of which an operator takes multiples alone, each vector with the number.
        probe: the copy of the model that ran, if it is on the meta device.
        axes: labels along the dimensions of tensors whose channels lie along several, if the model
            multiplies activations.
        products: products of activations that have channels.
        composed: parameters that are layers in this pass because code computes weights from them.
        opened: layers of the table whose code is followed operator by operator: their weight is computed in a
            way that surgery cannot invert, or they do not run and other code reads their weight.
        reduced: parameters outside the layers along whose dimensions code computes statistics (the means of
            filters), each with the reason to fix their channels. In the next pass they may be layers.
        refused: layers whose calls contradict their rule, with the reason.
        foreign: modules whose code calls operators of other libraries than torch.
        noted: parameters that have to be such layers in the next pass.
        reshapes: the reshapes of the pass in eval mode.
        rows: tables that meet channels along one of their dimensions alone.
        shared_rows: those of them whose elements along the other dimensions share the channels in this pass,
            because no weight is computed from them.
        spanned: parameters that code multiplies by as matrices, several dimensions of which lie along one.
        divided: those of them that are layers in this pass, because they are not mixed into a weight.
        left, right: by module, operator and number of the call, the labels of the left and the right operand
            of a product that sums over channels, and those that they stand for.
        seen: by module, the labels of the channels of its outputs, each vector.
        biases: labels of vectors outside layers that code adds to products, and those of the products.
    """

    ties: Ties = field(default_factory=Ties)
    sides: dict[tuple[str, Side], SideUse] = field(default_factory=dict)
    reductions: dict[tuple[str, str, int], SideUse] = field(default_factory=dict)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    sized: list[np.ndarray] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    known: list[KnownSize] = field(default_factory=list)
    by_position: list[tuple[np.ndarray, str]] = field(default_factory=list)
    aligned: list[tuple[np.ndarray, int]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    uses: dict[str, tuple[float, float]] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    other_macs: float = 0.0
    read_elsewhere: set[str] = field(default_factory=set)
    functional: dict[str, str] = field(default_factory=dict)
    done: Pass = field(default_factory=Pass)
    outputs: list[torch.Size] = field(default_factory=list)
    probe: nn.Module | None = None
    axes: Axes | None = None
    products: list[ProductUse] = field(default_factory=list)
    composed: dict[str, Composed] = field(default_factory=dict)
    noted: dict[str, Composed] = field(default_factory=dict)
    opened: frozenset[str] = frozenset()
    reduced: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    reshapes: Reshapes = field(default_factory=Reshapes)
    rows: set[str] = field(default_factory=set)
    shared_rows: frozenset[str] = frozenset()
    spanned: set[str] = field(default_factory=set)
    divided: frozenset[str] = frozenset()
    left: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)
    right: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)
    seen: dict[str, list[np.ndarray]] = field(default_factory=dict)
    biases: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def channels(self, labels: np.ndarray) -> np.ndarray:
        """Return, after the pass, the final labels that each label stands for, (labels, most), padded."""
        labels = labels.ravel()
        return self.ties.find(labels)[:, None] if self.axes is None else self.axes.parts(labels, final=True)
