"""Rules for operators that write values into a tensor or a part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.tracing.elementwise import pointwise
from pruning.tracing.labels import Labels
from pruning.tracing.operation import Operation
from pruning.tracing.ties import spread, varying, vector_along


def assign(labels: Labels, op: Operation) -> None:
    """Copy values into a tensor or a part of it: tie the channels at the same places.

    A part of a tensor filled with one value (`torch.zeros`) has no channels; the whole gets them first.
    """
    target, source = op.operands[0], labels.of(op.operands[-1])
    if labels.of(target) is None and source is not None:
        dims = varying(source)
        if len(dims) != 1 or not _label_filled(labels, target, dims[0] - source.ndim):
            return labels.fix_operands(op.name, op.operands)
    elif labels.of(target) is None:  # it may be a part of a tensor that would not get the channels
        return labels.fix_operands(op.name, op.operands)
    return pointwise(labels, op)


def _label_filled(labels: Labels, part: Tensor, dim: int) -> bool:
    """Give a filled tensor labels along the dimension that is `dim` of its part; return whether it has them.

    Args:
        part: a view of the filled tensor. dim: negative.
    """
    whole = labels.filled.find(part)
    if whole is None or -dim > part.ndim:
        return False
    along = [d for d in range(whole.ndim) if whole.shape[d] > 1 and whole.stride(d) == part.stride(dim) > 0]
    if len(along) != 1 or not whole.is_contiguous():
        return False
    (d,) = along
    if labels.carried(whole) is None:
        labels.mark_uniform(whole)
    found = labels.of_or_uniform(whole, d)
    if found is None or varying(found) != [d]:
        return False
    start = (part.storage_offset() // whole.stride(d)) % whole.shape[d]
    vector = vector_along(found, d, whole.shape[d])[start : start + part.shape[dim]]
    if len(vector) != part.shape[dim]:
        return False
    labels.put(part, spread(vector, part.ndim, dim))
    return True


def put_indexed(labels: Labels, op: Operation) -> None:
    """Write rows by their indices (`y[index] = x`): tie the channels along the dimensions behind these."""
    target, values, indices = op.given["self"], op.given["values"], op.given["indices"]
    count = len(indices)
    leading = all(each is not None and each.dtype in (torch.long, torch.bool) for each in indices)
    read = sum(each.ndim if each.dtype == torch.bool else 1 for each in indices) if leading and count else 0
    source = labels.of(values)
    if not read or (source is not None and len(varying(source)) != 1):
        return labels.fix_operands(op.name, op.operands)
    if labels.of(target) is None and source is not None:
        _label_filled(labels, target, varying(source)[0] - source.ndim)
    found = labels.of(target)
    if found is None and source is None:
        return None
    behind = target.ndim - read
    for each in (found, source):
        if each is None or any(d < each.ndim - behind for d in varying(each)):
            return labels.fix_operands(op.name, op.operands)
    assert found is not None and source is not None
    at, to = (varying(x)[0] - x.ndim for x in (found, source))
    if at != to or values.shape[to] != target.shape[at]:
        return labels.fix_operands(op.name, op.operands)
    for each in indices:
        labels.fix(labels.of(each), f"{labels.where()} reads positions from it ({op.name})")
    reason = f"{labels.where()} writes it into a tensor of fixed size"
    ours, others = (vector_along(x, d + x.ndim, x.shape[d]) for x, d in ((found, at), (source, to)))
    labels.tie(ours, others, reason)
    return labels.put(op.output, found)


def accumulate(labels: Labels, op: Operation) -> None:
    """Add rows of a tensor to those of another by their indices (index_add, scatter_add)."""
    target, source = op.given["self"], op.given.get("source", op.given.get("src"))
    if not isinstance(source, Tensor) or op.given["dim"] % target.ndim in (
        *varying(labels.of(target)), *varying(labels.of(source))
    ):  # fmt: skip
        return labels.fix_operands(op.name, op.operands)
    labels.fix(labels.of(op.given["index"]), f"{labels.where()} reads positions from it ({op.name})")
    for each in (labels.of(target), labels.of(source)):
        if each is not None:
            labels.note_sizes(each, each)  # the size of the indices
    return pointwise(labels, Operation(op.func, (target, source), {}, op.output))
