"""Channel labels: integers that tensors carry through a forward pass, and the ties between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.graph.inferred import infer_rule
from pruning.graph.layers import layer_width, parts
from pruning.graph.rule import Rule, Side
from pruning.tracing.filled import FilledTensors
from pruning.tracing.parameter_views import Weights
from pruning.tracing.record import Extent, Flow, SideUse
from pruning.tracing.tables import MOST_ELEMENTS, Tables
from pruning.tracing.ties import NONE, spread, varying, vector_along
from pruning.utils.held_weight import held_weight

#: The reason for fixing channels that are tied to positions without a channel.
FIXED_SIZE = "it is joined with a tensor of fixed size"


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
        #: By `id` of the bias of an inferred layer, the labels of the layer's outputs.
        self.own: dict[int, Tensor] = {}
        self._uniform = WeakTensorKeyDictionary()
        self.filled, self.tables = FilledTensors(), Tables()
        self._deferred = WeakTensorKeyDictionary()
        self._positions = WeakTensorKeyDictionary()
        #: The place of the running operator, if it computes statistics and outputs are compared.
        self.place: tuple[str, str, int] | None = None
        self._slices: dict[tuple[str, bytes], tuple[Tensor, int, set[tuple[int, int]]]] = {}

    # --- labels of tensors and layers ----------------------------------------------------

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the labels of a tensor; None where it holds no channels."""
        if self.is_deferred(tensor):
            self._deferred.pop(tensor)()
        known = self._of.get(tensor) if id(tensor) not in self.own else self.own[id(tensor)]
        if known is None and id(tensor) in self.loose and tensor.numel() <= MOST_ELEMENTS:
            name = self.loose[id(tensor)]
            if name in self.found.composed:
                return self._of_layer(name, tensor)
            if (name, "self") not in self.found.sides:
                labels = self.found.ties.new(tensor.numel())
                self.found.sides[name, "self"] = SideUse(labels.reshape(tensor.shape), 0)
            known = torch.from_numpy(self.found.sides[name, "self"].labels)
            self.tables.note(name, known.numpy())
        return known

    def _of_layer(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return the labels of a parameter that is a layer: those of its two sides, along its dimensions."""
        role = self.found.composed[name]
        owner, _, attribute = name.rpartition(".")
        layer = held_weight(self.weights.modules[owner], attribute)
        rule = Rule({"weight": role.made}, {"weight": role.read}, kind="weighted", spans=role.spans)
        if not infer_rule(type(layer), rule, self.weights.inferred):
            return None
        sides: dict[int, Side] = {role.made: "out", role.read: "in"}
        self.found.uses.setdefault(name, (0.0, 0.0))
        self.found.calls[name] = max(1, self.found.calls[name])
        made: dict[int, Tensor] = {}
        for d, side in sides.items():
            span, own = rule.span(d), self.side(name, layer, side, role.dim)
            along = self.vectors(own.view([parameter.shape[i] for i in span])) if len(span) > 1 else {0: own}
            made.update({span.start + i: vector for i, vector in along.items()})
        return self.compose(made, parameter.ndim)

    def carried(self, tensor: Tensor) -> Tensor | None:
        """Return the labels that a tensor got in this pass; None for parameters outside the layers."""
        return self._of.get(tensor)

    def defer(self, tensor: Tensor, label: Callable[[], None]) -> None:
        """Let a function give a tensor its labels once they are asked for, with the present path."""
        path = [*self.path]

        def run() -> None:
            now, self.path = self.path, path
            label()
            self.path = now

        self._deferred[tensor] = run

    def is_deferred(self, tensor: Tensor) -> bool:
        """Whether a tensor gets its labels once they are asked for."""
        return bool(self._deferred) and tensor in self._deferred

    def has_one_channel(self, tensor: Tensor) -> bool:
        """Whether a tensor has no channels, or a single one, so that its size does not follow a width."""
        return self.is_deferred(tensor) or not varying(self.of(tensor))

    def put(self, tensor: object, labels: Tensor | None) -> None:
        """Set the labels of an output; fix them if it is no tensor or of another rank."""
        self.tables.put_others(tensor, [])
        if not isinstance(tensor, Tensor):
            self.fix(labels, f"{self.where()} turns it into something other than a tensor")
        elif labels is not None and tensor.ndim == labels.ndim:
            self._of[tensor] = labels
        else:
            self.fix(labels, f"{self.where()} gives it another shape")
            self._of.pop(tensor, None)

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

    def vectors(self, labels: Tensor | None) -> dict[int, Tensor]:
        """Return the labels along each dimension on which they depend, (size,) each."""
        if labels is None:
            return {}
        dims = varying(labels)
        if self.found.axes is not None and (len(dims) > 1 or self.is_composite(labels)):
            return self.found.axes.vectors(labels)
        return {dim: vector_along(labels, dim, labels.shape[dim]) for dim in dims}

    def is_grid(self, labels: Tensor | None) -> bool:
        """Whether channels lie along several dimensions, along which they may be removed."""
        return len(varying(labels)) > 1 and self.is_composite(labels)

    def is_composite(self, labels: Tensor | None) -> bool:
        """Whether channels are removed with channels along several dimensions, as positions of heads are."""
        axes = self.found.axes
        return axes is not None and labels is not None and axes.is_defined(labels)

    def compose(self, vectors: Mapping[int, Tensor], rank: int) -> Tensor | None:
        """Return the labels of a tensor that has these labels along its dimensions."""
        if self.found.axes is not None:
            return self.found.axes.compose(vectors, rank)
        assert len(vectors) < 2
        return next((spread(vector, rank, dim) for dim, vector in vectors.items()), None)

    def fix_along(self, labels: Tensor | None, dims: Iterable[int], reason: str) -> None:
        """Fix the channels of a grid along some of its dimensions; fix all channels of other tensors."""
        if not self.is_grid(labels):
            return self.fix(labels, reason)
        vectors = self.vectors(labels)
        for dim in dims:
            self.fix(vectors.get(dim), reason)
        return None

    def fix_single(self, labels: Tensor, reason: str) -> None:
        """Fix the single position that a tensor holds of a dimension along which channels lie."""
        if self.found.axes is not None and len(single := self.found.axes.single(labels)):
            self.fix(single, reason)

    def select_along(self, labels: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Fix the channels along dimensions on which code selects; return those along the others."""
        axes, vectors = self.found.axes, self.vectors(labels)
        assert axes is not None
        for dim in dims:
            if dim in vectors:
                self.fix(vectors[dim], reason)
                axes.constant.append(vectors[dim].numpy())
        kept = self.compose({d: v for d, v in vectors.items() if d not in dims}, labels.ndim)
        return torch.full([1] * labels.ndim, NONE) if kept is None else kept

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

    def tie_positions(self, labels: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Tie the channels at all positions along dimensions of a table; return those of one row."""
        for dim in dims:
            row = labels.narrow(dim, 0, 1)
            self.tie(row.expand_as(labels), labels, reason)
            labels = row
        return labels

    def row(self, labels: Tensor, dim: int, reason: str) -> Tensor | None:
        """Return the labels that a layer reads along `dim`; tie the rows of a parameter, such as queries.

        Channels that lie along another dimension, or a grid of them, are fixed, and the result is None.
        """
        dims = varying(labels)
        others = [d for d in dims if d != dim]
        if others and (dim not in dims or self.is_grid(labels)):
            self.fix(labels, reason)
            return None
        return self.tie_positions(labels, others, reason)

    def tie_neighbors(self, labels: Tensor, dim: int, step: int) -> None:
        """Tie each `step` successive labels along a dimension, of which code selects every `step`-th."""
        by_place = labels.movedim(dim, -1).reshape(-1, step)
        self.tie(by_place[:, :1], by_place[:, 1:], FIXED_SIZE)

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
        table = self.found.axes is not None and len(varying(labels)) > 1 and not self.is_grid(labels)
        if sized is not None and not table:  # the rows of a table are not channels
            for vector in self.vectors(sized).values():
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
