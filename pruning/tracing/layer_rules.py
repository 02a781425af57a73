"""Rules that pass channel labels through layers, and the table of these rules.

The operators inside a layer of the table in `pruning.graph.layers` are not followed. The layer's rule
ties the labels of its inputs to its input side, and gives its output the labels of its output side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from pruning.graph.computed import sources
from pruning.graph.deformable import DeformableConv
from pruning.graph.layers import (
    channel_dim,
    is_depthwise,
    is_inferred,
    is_registered,
    is_weighted,
    layer_width,
    rule_for,
    rule_of,
)
from pruning.graph.recurrent import is_projected, is_recurrent
from pruning.graph.rule import Kind
from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.ties import spread, varying, vector_along
from pruning.utils.wording import number_of


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        name: name of the layer. module: the layer.
        inputs: all tensors among its arguments, at least one.
        output: its output; of several tensors, the first; of none, the first input.
        outputs: all tensors among its outputs.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    output: Tensor
    outputs: Sequence[Tensor] = ()


#: Ties the labels of a layer's inputs to the layer's sides, and gives its output labels.
LayerRule: TypeAlias = Callable[[Labels, LayerCall], None]


def weighted(labels: Labels, call: LayerCall) -> None:
    """Follow a convolution or linear layer, which reads channels and makes new ones."""
    dim, x, module = channel_dim(call.module), call.inputs[0], call.module
    arriving = labels.of_or_uniform(x, dim)
    positions = call.output.numel() / layer_width(module, "out")
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    uses = x.numel() / layer_width(module, "in") if transposed else positions
    _count_uses(labels, call, uses, positions)
    if is_depthwise(module):
        return channelwise(labels, call, dim)
    _read(labels, call, arriving, dim)
    outgoing = labels.side(call.name, module, "out", dim)
    return _put(labels, call, arriving, outgoing, dim)


def deformable(labels: Labels, call: LayerCall) -> None:
    """Follow a deformable convolution: fix the channels of its offsets and mask.

    With several offset groups, each part of the input has its own offsets; the parts are tied.
    """
    x, *offsets_and_mask = call.inputs
    for other in offsets_and_mask:
        labels.fix(labels.of(other), f"{call.name} reads positions from it")
    # The offsets are the larger tensor: a mask has half as many channels.
    offset_channels = max((other.shape[-3] for other in offsets_and_mask), default=0)
    assert isinstance(call.module, DeformableConv)
    offset_groups = offset_channels // (2 * math.prod(call.module.kernel_size))
    if offset_groups > 1:
        vector = _along(labels, call, labels.of_or_uniform(x, -3), -3)
        if vector is not None:
            by_part = vector.reshape(offset_groups, -1)
            for part in by_part[1:]:
                labels.tie(by_part[0], part, FIXED_SIZE)
    weighted(labels, call)


def embedding(labels: Labels, call: LayerCall) -> None:
    """Follow an embedding, which makes channels, by default along the last dimension."""
    dim = _dim(call.module, call.output)
    made = labels.side(call.name, call.module, "out", dim)
    if getattr(call.module, "max_norm", None) is not None:
        labels.fix(made, f"{call.name} scales rows to max_norm over all their channels")
    labels.put(call.output, spread(made, call.output.ndim, dim))


def recurrent(labels: Labels, call: LayerCall) -> None:
    """Follow a recurrent layer: it reads channels at every time step, and makes those of its hidden units.

    All states and outputs have the hidden units along the last dimension, for each direction once.
    """
    x, *states = [t for t in call.inputs if t.is_floating_point()]  # packed sequences also have integers
    steps = x.numel() / layer_width(call.module, "in")
    _count_uses(labels, call, steps, steps)
    _make_hidden(labels, call, states)
    if _along(labels, call, labels.of(x), -1) is not None:
        _read(labels, call, labels.of(x), -1)


def _make_hidden(labels: Labels, call: LayerCall, states: list[Tensor]) -> None:
    """Tie the initial states of a recurrent layer to its hidden units, which are its outputs."""
    units, outputs = labels.side(call.name, call.module, "out", -1), [*call.outputs]
    if is_projected(call.module):  # cells are not projected
        outputs.pop()
        for cells in states[1:]:
            labels.fix(labels.of(cells), f"{call.name} starts from it, and keeps its hidden size")
        states = states[:1]
    for state in states:
        found = labels.of_or_uniform(state, -1)
        if found is None or set(varying(found)) - {state.ndim - 1}:
            reason = "leave out the initial state, or make it by torch.zeros, to let it be pruned"
            for each in (units, found):
                labels.fix(each, f"{call.name} starts from a state of fixed size; {reason}")
        else:
            vector = vector_along(found, state.ndim - 1, state.shape[-1])
            labels.tie(vector, units, f"{call.name} starts from it beside positions of fixed size")
    for output in outputs:
        if output.is_floating_point():
            labels.put(output, spread(units.repeat(output.shape[-1] // len(units)), output.ndim, -1))


def layer_norm(labels: Labels, call: LayerCall) -> None:
    """Follow LayerNorm or RMSNorm; fix channels that do not lie along its last normalized dimension."""
    x, shape = call.inputs[0], call.module.normalized_shape
    assert isinstance(shape, tuple)
    arriving = labels.of(x)
    channel_dims = varying(arriving)
    index = channel_dims[0] if len(channel_dims) == 1 else x.ndim - 1
    if labels.is_grid(arriving) and index not in labels.vectors(arriving):
        return labels.put(call.output, arriving)
    dim = index - x.ndim
    if (len(shape) > 1 and dim != -1) or x.shape[index] != shape[-1]:
        labels.fix(arriving, f"{call.name} normalizes over other dimensions than its channels'")
        return labels.put(call.output, None)
    return channelwise(labels, call, dim)


def channelwise(labels: Labels, call: LayerCall, dim: int | None = None) -> None:
    """Follow a layer whose output channels are its input channels."""
    x = call.inputs[0]
    dim = _dim(call.module, x) if dim is None else dim
    arriving = labels.of_or_uniform(x, dim)
    own = labels.side(call.name, call.module, "out", dim)
    vector = _along(labels, call, arriving, dim)
    if vector is None:
        labels.fix(own, f"the input of {call.name} has a fixed size")
        labels.put(call.output, None)
    else:
        # A depthwise convolution may make several output channels per input channel.
        multiplier = len(own) // len(vector)
        reason = f"part of the input of {call.name} has a fixed size"
        labels.tie(vector.repeat_interleave(multiplier), own, reason)
        _put(labels, call, arriving, own, dim)


def unchanged(labels: Labels, call: LayerCall) -> None:
    """Give the output the labels of the input: dropout, PReLU with one slope for all channels."""
    labels.put(call.output, labels.of(call.inputs[0]))


def _dim(layer: nn.Module, x: Tensor) -> int:
    """Return the dimension of an input or output, from the end, along which a layer's channels lie."""
    rule = rule_of(layer)
    if rule.kind == "weighted":
        return channel_dim(layer)
    if rule.dim is not None:
        return rule.dim
    return -1 if rule.kind == "embedding" or x.ndim < 2 else 1 - x.ndim


def _count_uses(labels: Labels, call: LayerCall, uses: float, positions: float) -> None:
    before = labels.found.uses.get(call.name, (0.0, 0.0))
    labels.found.uses[call.name] = before[0] + uses, before[1] + positions


def _read(labels: Labels, call: LayerCall, arriving: Tensor | None, dim: int) -> None:
    """Tie the channels of the first input to the layer's input side."""
    inner = labels.side(call.name, call.module, "in", dim)
    vector = _along(labels, call, arriving, dim)
    if vector is not None:
        labels.tie(vector, inner, f"{call.name} also reads positions of fixed size, which hold no channels")


def _put(labels: Labels, call: LayerCall, arriving: Tensor | None, made: Tensor, dim: int) -> None:
    """Give the output the labels of a layer along `dim`, and those of the input along dimensions before."""
    rank = call.output.ndim
    before = labels.vectors(arriving) if labels.is_grid(arriving) and rank == call.inputs[0].ndim else {}
    kept = {d: vector for d, vector in before.items() if d < rank + dim}
    labels.put(call.output, labels.compose({**kept, rank + dim: made}, rank))


def _along(labels: Labels, call: LayerCall, arriving: Tensor | None, dim: int) -> Tensor | None:
    """Return the labels of the first input along `dim` as a vector; fix those along another dimension."""
    if arriving is None:
        return None
    x = call.inputs[0]
    index = dim + x.ndim
    reason = f"its channels do not lie along the dimension that {call.name} reads"
    if labels.is_grid(arriving):
        labels.fix_along(arriving, [d for d in varying(arriving) if d > index], reason)
        return labels.vectors(arriving).get(index)
    row = labels.row(arriving, index, reason)
    return None if row is None else vector_along(row, index, x.shape[index])


BY_KIND: dict[Kind, LayerRule] = {
    "weighted": weighted,
    "embedding": embedding,
    "channelwise": channelwise,
    "norm": channelwise,
    "recurrent": recurrent,
}

#: Types with a rule of their own; the first that matches is taken. Others have the rule of their kind.
BY_TYPE: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], LayerRule], ...] = (
    (nn.modules.dropout._DropoutNd, unchanged),
    ((nn.LayerNorm, nn.RMSNorm), layer_norm),
    (DeformableConv, deformable),
)


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for a layer; None for a module whose code is followed operator by operator."""
    rule = rule_for(module)
    if rule is not None and is_registered(module):
        return BY_KIND[rule.kind]
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return unchanged
    special = next((made for types, made in BY_TYPE if isinstance(module, types)), None)
    return special or (BY_KIND[rule.kind] if rule is not None else None)


def follow_layer(labels: Labels, call: LayerCall) -> bool:
    """Apply a layer's rule; return whether a BatchNorm that follows the layer may be folded into it."""
    rule = layer_rule(call.module)
    assert rule is not None
    if rule is not unchanged:
        labels.found.calls[call.name] += 1
    if is_registered(call.module):
        for other in call.inputs[1:]:
            labels.fix(labels.of(other), f"{call.name} reads it in addition to its first input")
        if problem := _misfit(call):
            rule = partial(refuse, reason=problem)
    rule(labels, call)
    return is_weighted(call.module)


def _misfit(call: LayerCall) -> str:
    """Return why the registered rule of a layer contradicts the shapes of a call; empty where it does not."""
    module, rule = call.module, rule_of(call.module)
    made = layer_width(module, "out")
    read = layer_width(module, "in") if rule.kind == "weighted" else made
    taken = [] if rule.kind == "embedding" else [("input", call.inputs[0], read)]
    for what, x, width in (*taken, ("output", call.output, made)):
        dim = _dim(module, x)
        if dim < -x.ndim or x.shape[dim] != width:
            return (
                f"the rule registered for {type(module).__name__} says that the {what} of {call.name} has "
                f"{number_of(width, 'channel')} along dimension {dim}, and its shape is {tuple(x.shape)}; "
                f"correct the tensors, kind={rule.kind!r} or dim={rule.dim} of this rule to let it be pruned"
            )
    return ""


def refuse(labels: Labels, call: LayerCall, reason: str) -> None:
    """Fix the channels that a layer reads and makes."""
    for x in call.inputs:
        labels.fix(labels.of(x), reason)
    labels.fix(labels.side(call.name, call.module, "out", _dim(call.module, call.output)), reason)
    labels.found.calls[call.name] = max(1, labels.found.calls[call.name])
    labels.found.refused[call.name] = reason
    if is_weighted(call.module) and call.outputs:
        positions = call.output.numel() / layer_width(call.module, "out")
        _count_uses(labels, call, positions, positions)
    for output in call.outputs:
        labels.put(output, None)


def is_known(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    """Whether a module is followed by a layer rule, which must cover all of its parameters."""
    rule = rule_for(module)
    if rule is None or is_inferred(module):
        return False
    if is_registered(module) or is_recurrent(module):
        return layer_rule(module) is not None
    held = {*rule.out, *rule.into}
    if is_weighted(module) and own.keys() & held:  # numbers for the whole weight follow no width
        own = {name: p for name, p in own.items() if name in held or p.numel() > 1}
    return own.keys() <= held.union(*(sources(module, name) for name in held))
