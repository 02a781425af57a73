"""Rules for operators that compute statistics over dimensions: reductions, softmax, functional norms.

A statistic over channels is computed over the kept channels after pruning, as in LayerNorm; the masked
model computes it in the same way (`pruning.surgery.statistics`).
"""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.surgery.statistics import REDUCTIONS
from pruning.tracing.computed_weights import note_reduced
from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.operation import Operation, first_operand
from pruning.tracing.ties import spread, varying, vector_along

#: What to do where code computes a weight in a way that surgery cannot narrow.
CURE = (
    "call pruning.surgery.with_plain_weights, which puts layers of torch with the computed weights in their "
    "place, to let it be pruned"
)


@first_operand
def reduction(labels: Labels, op: Operation, first: Tensor) -> None:
    """Reduce over dimensions; a statistic over channels is recorded, and has no channels itself."""
    rank = op.operands[0].ndim
    dims = op.given.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else dims
    dims = sorted({d % max(1, rank) for d in ([dims] if isinstance(dims, int) else dims)})
    leaves = pytree.tree_leaves(op.output)
    if labels.is_grid(first):
        return _grid_reduction(labels, op, first, dims)
    if any(d in dims for d in varying(first)):
        reason = _reduces(labels, op)
        if not note_reduced(labels, op.operands[0], reason):
            if not _follows(labels, op, first):
                return labels.fix(first, reason)
            for positions in leaves[1:] if op.name in ("max", "min") else ():
                labels.mark_positions(positions, first)
            return None
        if not set(varying(first)) - set(dims):
            return None
    for leaf in leaves:
        kept = first
        for d in reversed(dims):
            kept = kept.narrow(d, 0, 1)
            if leaf.ndim < rank:
                kept = kept.squeeze(d)
        labels.put(leaf, kept)
    return None


def _reduces(labels: Labels, op: Operation) -> str:
    """Return the reason for fixing channels over which a statistic is not followed."""
    where = labels.where()
    if op.operands[0] in labels.weights.computed:
        return (
            f"{where} computes its weight from statistics over its channels ({op.name}), which would differ "
            f"without some of them; {CURE}"
        )
    return (
        f"{where} reduces over its channels ({op.name}); only statistics such as the mean over activations "
        "are followed"
    )


def _follows(labels: Labels, op: Operation, channels: Tensor) -> bool:
    """Record a statistic over channels; return whether it may be one over those that are kept.

    A statistic of a weight (the mean of a filter) has to remain that over all channels: no input is missing
    that another one could replace.
    """
    x = op.operands[0]
    return op.name in REDUCTIONS and x not in labels.weights.computed and labels.note_statistic(x, channels)


def _grid_reduction(labels: Labels, op: Operation, first: Tensor, dims: list[int]) -> None:
    """Reduce a tensor with channels along several dimensions; those that are kept keep their channels."""
    rank, vectors = op.operands[0].ndim, labels.vectors(first)
    reduced = [d for d in dims if d in vectors]
    leaves = pytree.tree_leaves(op.output)
    if reduced:
        along = spread(vectors[reduced[0]], rank, reduced[0])
        if len(reduced) > 1 or not _follows(labels, op, along):
            labels.fix_along(first, reduced, _reduces(labels, op))
        for positions in leaves[1:] if op.name in ("max", "min") else ():
            labels.mark_positions(positions, along)
    kept = labels.compose({d: v for d, v in vectors.items() if d not in dims}, rank)
    for leaf in leaves:
        found = kept
        for d in reversed(dims) if leaf.ndim < rank else ():
            found = None if found is None else found.squeeze(d)
        labels.put(leaf, found)
    return


@first_operand
def softmax(labels: Labels, op: Operation, first: Tensor) -> None:
    """Apply softmax along a dimension; fix channels that lie along it, but for those of a grid.

    Attention between channels (XCiT) is a statistic over them, as a norm is.
    """
    if (dim := op.given["dim"] % first.ndim) in varying(first):
        along = labels.vectors(first).get(dim) if labels.is_grid(first) else None
        if along is None or not labels.note_statistic(op.operands[0], spread(along, first.ndim, dim)):
            labels.fix_along(first, [dim], f"{labels.where()} takes {op.name.strip('_')} over its channels")
    labels.put(op.output, first)


def batch_norm(labels: Labels, op: Operation) -> None:
    """Normalize each position along dimension 1 (F.batch_norm): of activations, or filters of a weight."""
    x, output = op.operands[0], op.output[0]
    first = labels.of(x)
    within = f"{labels.where()} normalizes it ({op.name})"
    held = (op.given.get(key) for key in ("weight", "bias", "running_mean", "running_var"))
    own = [tensor for tensor in held if isinstance(tensor, Tensor)]
    over = [d for d in varying(first) if d != 1] if op.given.get("training", True) else []
    grid = labels.is_grid(first)
    if first is not None and over and (grid or not note_reduced(labels, x, _reduces(labels, op))):
        labels.fix_along(first, over, _reduces(labels, op))
    vector = labels.vectors(first).get(1) if grid else None
    if first is not None and not grid and 1 in varying(first):
        for d in reversed([d for d in range(x.ndim) if d != 1]):
            vector = (first if vector is None else vector).select(d, 0)
    for tensor in own:
        scales = labels.of(tensor)
        if vector is not None and scales is not None:
            labels.tie(vector, scales, FIXED_SIZE)
        else:
            labels.fix(vector, f"{within} beside a tensor of fixed size")
            labels.fix(scales, f"{within} beside a tensor of fixed size")
    labels.put(output, first)


def layer_norm(labels: Labels, op: Operation) -> None:
    """Normalize over the last dimensions (F.layer_norm, F.rms_norm); tie the scales to the channels."""
    x, output = op.operands[0], op.output[0]
    first, shape = labels.of(x), list(op.given["normalized_shape"])
    own = [t for key in ("weight", "bias") if isinstance(t := op.given.get(key), Tensor)]
    within = f"{labels.where()} normalizes it ({op.name})"
    if first is None:
        for tensor in own:
            labels.fix(labels.of(tensor), f"{within} beside a tensor of fixed size")
        return None
    if labels.is_grid(first) and len(shape) == 1:
        vector = labels.vectors(first).get(x.ndim - 1)
        if vector is None:
            return labels.put(output, first)
        first, made = spread(vector, x.ndim, -1), first
    else:
        made = None
    if varying(first) and varying(first) != [x.ndim - 1]:
        if varying(first)[-1] >= x.ndim - len(shape):
            return labels.fix(first, f"{within} over several dimensions; normalize over channels alone")
        return labels.put(output, first)
    vector = vector_along(first, x.ndim - 1, x.shape[-1])
    if not varying(first) or len(shape) > 1:
        return labels.fix(first, f"{within} over several dimensions; normalize over channels alone")
    labels.note_statistic(x, first)
    labels.note_sizes(first, first)
    for tensor in own:
        scales = labels.of(tensor)
        if scales is None:
            labels.fix(first, f"{within} beside a tensor of fixed size")
        else:
            labels.tie(vector, scales, FIXED_SIZE)
    return labels.put(output, spread(vector, x.ndim, -1) if made is None else made)
