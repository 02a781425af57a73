"""The rule for elementwise operators, which tie the channels at the same places of their operands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pruning.tracing.labels import Labels
from pruning.tracing.operation import Operation
from pruning.tracing.products import grid_pointwise, label_uniform
from pruning.tracing.ties import compact, varying


def pointwise(labels: Labels, op: Operation) -> None:
    """Apply an elementwise operator: tie the channels at the same places of all operands."""
    if not isinstance(op.output, Tensor):
        return labels.fix_operands(op.name, op.operands)
    rank = op.output.ndim
    if any(t.ndim > rank for t in op.operands):
        return labels.fix_operands(op.name, op.operands)
    shapes = [[1] * (rank - t.ndim) + list(t.shape) for t in op.operands]
    aligned = [
        None if found is None else found.reshape([1] * (rank - found.ndim) + list(found.shape))
        for found in map(labels.of, op.operands)
    ]
    known = [i for i, found in enumerate(aligned) if found is not None]
    grids = [i for i in known if labels.is_grid(aligned[i])]
    if grids:
        return grid_pointwise(labels, op, aligned, max(grids, key=lambda i: len(varying(aligned[i]))))
    first = max(known, key=lambda i: (len(varying(aligned[i])), math.prod(shapes[i])))
    result = aligned[first]
    assert result is not None
    channel_dims = varying(result)
    combines = f"{labels.where()} combines it ({op.name})"
    for i, other in enumerate(aligned):
        if i == first:
            continue
        wide = [d for d in channel_dims if shapes[i][d] > 1]
        if other is None and labels.found.axes is not None:
            other = label_uniform(labels, op.operands[i], wide, rank)
        expanded = [d for d in wide if op.operands[i].stride(d - rank) == 0]
        uniform = other is None and labels.is_uniform(op.operands[i])
        if (expanded == wide or uniform) and not varying(other):
            # One value for all channels. The size that it was expanded to may be a constant in the code.
            if wide:
                labels.note_sizes(result, result)
            elif other is not None and not channel_dims:
                labels.tie(result, other, f"{combines} with a tensor of fixed size")
        elif other is None:
            labels.fix(result, f"{combines} with a tensor of fixed size")
        elif labels.found.reduced and _is_statistic(result, other):
            continue
        elif set(varying(other)) <= set(channel_dims) and wide == channel_dims:
            labels.tie(result, other, f"{combines} with a tensor of fixed size")
        else:
            for each in (result, other):
                labels.fix(each, f"{combines} with channels along another dimension")
    if len(channel_dims) > 1:  # of a parameter: after the ties its channels may lie along one dimension
        result = compact(torch.from_numpy(labels.found.ties.find(result.numpy())))
    return labels.put(op.output, result)


def _is_statistic(labels: Tensor, other: Tensor) -> bool:
    """Whether the second labels are those of a statistic of the first tensor, along its other dimensions."""
    for d, size in enumerate(other.shape):
        if size == 1 < labels.shape[d]:
            labels = labels.narrow(d, 0, 1)
    return labels.shape == other.shape and torch.equal(labels, other)
