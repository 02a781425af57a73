"""Weights that code computes from a parameter before it multiplies by them.

Examples are an equalized learning rate (`weight * scale`), modulated convolutions (Karras et al., arXiv
1912.04958), mixed kernels (CondConv, Yang et al., arXiv 1904.04971) and a merged LoRA (`weight + B @ A`).
First each element of such a parameter has a label of its own, so the computed weight shows along which
dimensions of the parameter it makes and reads channels. In the next pass the parameter is a layer
(`HeldWeight`), whose elements have two places: a channel that is made, and one that is read.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pruning.tracing.axes import ProductUse
from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.operation import Operation
from pruning.tracing.products import AxesNeeded, batched_product
from pruning.tracing.record import Composed
from pruning.tracing.ties import NONE, is_among, spread, varying, vector_along


def product_of_parameters(labels: Labels, op: Operation) -> bool:
    """Note two parameters that are multiplied, as the factors of a LoRA are; return whether they are two."""
    places = [labels.weights.find(t) if labels.carried(t) is None else None for t in op.operands[-2:]]
    rank = op.output.ndim
    for place in places:
        made, read = (None if place is None else place.dims.get(d) for d in (rank - 2, rank - 1))
        if place is None or made is None or read is None or place.full_name in labels.found.composed:
            return False
        if place.spans:
            return False
    _need_axes(labels)
    for place in places:
        assert place is not None
        role = Composed(place.dims[rank - 2], place.dims[rank - 1], -1)
        labels.found.noted.setdefault(place.full_name, role)
    return True


def computed_product(labels: Labels, op: Operation) -> bool:
    """Follow a product of matrices, one of which is computed from a parameter; return whether one is.

    Also notes the parameters that are such weights, for the next pass.
    """
    left, right = op.operands[-2:]
    rank = right.ndim
    if any(_is_composed(labels, tensor) for tensor in (left, right)):
        batched_product(labels, op)
        return True
    if _source(labels, right) is not None and _note(labels, right, rank - 1, rank - 2, -1, left):
        labels.put(op.output, None)
        return True
    for weight, summed in ((right, rank - 2), (left, rank - 1)):
        found = labels.of(weight)
        if found is None or _source(labels, weight) is None or len(varying(found)) > 2:
            continue
        if _is_divided(labels, weight):  # several weights are mixed into one
            _need_axes(labels)
            labels.put(op.output, found.narrow(summed, 0, 1))
            return True
    return False


def computed_convolution(labels: Labels, op: Operation) -> bool:
    """Follow a convolution with a weight that is computed from a parameter; return whether it is.

    It may have a weight for each example, as groups of the convolution.
    """
    x, weight, bias = (op.given[key] for key in ("input", "weight", "bias"))
    groups, transposed = op.given["groups"], op.given["transposed"]
    made, read = (1, 0) if transposed else (0, 1)
    if not _is_composed(labels, weight):
        return _note(labels, weight, made, read, 1 - x.ndim)
    where = labels.where()
    arriving, found = labels.of(x), labels.vectors(labels.of(weight))
    if over := [d for d in varying(arriving) if d != 1]:
        labels.fix_along(arriving, over, f"its channels do not lie along the dimension that {where} reads")
    if labels.is_grid(arriving):
        along = labels.vectors(arriving).get(1)
    else:
        along = None if arriving is None or over else vector_along(arriving, 1, x.shape[1])
    ours, outgoing = found.get(read), found.get(made)
    if ours is not None and not transposed:
        ours = ours.repeat(groups)
    if outgoing is not None and transposed:
        outgoing = outgoing.repeat(groups)
    if along is not None and ours is not None:
        labels.tie(along, ours, f"{where} also reads positions of fixed size")
    else:
        labels.fix(along if ours is None else ours, f"{where} reads positions of fixed size")
    if outgoing is not None and bias is not None:
        own = labels.of(bias)
        if own is None:
            labels.fix(outgoing, f"{where} adds a tensor of fixed size to it")
        else:
            labels.tie(outgoing, vector_along(own, 0, len(bias)), FIXED_SIZE)
    labels.put(op.output, None if outgoing is None else spread(outgoing, op.output.ndim, 1))
    note_macs(labels, op, outgoing, ours)
    return True


def note_macs(labels: Labels, op: Operation, made: Tensor | None, read: Tensor | None = None) -> None:
    """Record the MACs of a convolution outside of layers as those of its channels.

    Args:
        made, read: labels of the channels that it makes and reads.
    """
    x, weight = op.given["input"], op.given["weight"]
    macs = float((x if op.given["transposed"] else op.output).numel() * weight[0].numel())
    labels.found.other_macs -= macs
    sides = (None if vector is None else vector.numpy().ravel() for vector in (made, read))
    labels.found.products.append(ProductUse(macs, *sides))


def _is_composed(labels: Labels, tensor: Tensor) -> bool:
    """Whether a tensor is computed from a parameter that is a layer."""
    found, axes = labels.of(tensor), labels.found.axes
    if not labels.found.composed or axes is None or found is None or not labels.is_composite(found):
        return False
    held = [labels.found.sides.get((name, "out")) for name in labels.found.composed]
    made = np.concatenate([np.arange(0), *(use.labels for use in held if use is not None)])
    return bool(is_among(axes.parts(found.numpy().ravel()[:1]).ravel(), made).any())


def _note(labels: Labels, weight: Tensor, made: int, read: int, end: int, x: Tensor | None = None) -> bool:
    """Note the parameter from which a weight is computed, for the next pass; return whether there is one.

    Args:
        made, read: dimensions of the weight. end: as `SideUse.dim`.
        x: the activations. If their channels are divided, so may be those that the parameter reads.
    """
    source, found = _source(labels, weight), labels.of(weight)
    if source is None or found is None:
        return False
    _need_axes(labels)
    name, shape, first = source
    dims = [_dims(found, dim, shape, first) for dim in (made, read)]
    own = [[d for d in dims[i] if d not in dims[1 - i]] for i in (0, 1)]
    if end == -1 and len(dims[0]) > 1:
        return False  # mixed, and divided later
    if not all(own):
        labels.found.functional[name] = (
            f"{labels.where()} computes a weight from it, whose channels do not lie along dimensions of the "
            "parameter; put it in a layer of torch to let it be pruned"
        )
        return False
    chosen = [max(several, key=lambda d: shape[d]) for several in own]
    if x is not None and labels.is_composite(labels.of(x)) and (span := _neighbors(own[1], shape)):
        ends = [(d,) for d in range(len(shape)) if d not in span]
        spans = sorted([*ends, span])
        number = {each: i for i, each in enumerate(spans)}
        role = Composed(number[chosen[0],], number[span], end, tuple(map(len, spans)))
        labels.found.noted.setdefault(name, role)
        return True
    labels.found.noted.setdefault(name, Composed(chosen[0], chosen[1], end))
    return True


def _neighbors(dims: list[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return dimensions that are neighbors, but for those of size 1 between them, with these; or ()."""
    span = tuple(range(dims[0], dims[-1] + 1))
    return span if all(d in dims or shape[d] == 1 for d in span) and len(dims) > 1 else ()


def _is_divided(labels: Labels, weight: Tensor) -> bool:
    """Whether one of the two matrix dimensions of a tensor holds several dimensions of its parameter."""
    source, found = _source(labels, weight), labels.of(weight)
    assert source is not None and found is not None
    return any(len(_dims(found, d, source[1], source[2])) > 1 for d in (weight.ndim - 2, weight.ndim - 1))


def note_reduced(labels: Labels, operand: Tensor, reason: str) -> bool:
    """Note that code computes statistics along dimensions of a parameter; return whether it is one.

    The parameter may be a weight, such as one whose filters are standardized. It is a layer in the next pass,
    which fixes the channels along these dimensions alone.
    """
    source = _source(labels, operand)
    if source is None or source[0] in labels.found.composed:
        return False
    labels.found.reduced.setdefault(source[0], reason)
    return True


def _source(labels: Labels, weight: Tensor) -> tuple[str, tuple[int, ...], int] | None:
    """Return the parameter whose elements' labels a tensor carries: its name, shape and first label."""
    found = labels.of(weight)
    if found is None:
        return None
    flat = found.numpy().ravel()
    flat = flat[flat != NONE]
    for (name, side), use in labels.found.sides.items() if len(flat) else ():
        wide = sum(size > 1 for size in use.labels.shape) > 1
        if side == "self" and wide and labels.weights.is_parameter(name):
            first = int(use.labels.flat[0])
            if first <= flat.min() and flat.max() < first + use.labels.size:
                return name, use.labels.shape, first
    return None


def _dims(found: Tensor, dim: int, shape: tuple[int, ...], first: int) -> list[int]:
    """Return the dimensions of a parameter along which a weight lies along one of its dimensions."""
    if dim not in varying(found):
        return []
    vector = vector_along(found, dim, found.shape[dim]).numpy()
    vector = vector[vector != NONE]
    places = np.unravel_index(vector - first, shape)
    return [d for d, place in enumerate(places) if len(np.unique(place)) > 1]


def _need_axes(labels: Labels) -> None:
    if labels.found.axes is None:
        raise AxesNeeded
