"""The rule for elementwise operators, which tie the channels at the same places of their operands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pruning.tracing.labels import Labels
from pruning.tracing.operation import Operation
from pruning.tracing.products import AxesNeeded, grid_pointwise, label_uniform
from pruning.tracing.ties import compact, varying

#: Operators that add tables, or take one from another.
_SUMS = ("add", "sub", "rsub")


def pointwise(labels: Labels, op: Operation) -> None:
    """Apply an elementwise operator: tie the channels at the same places of all operands."""
    if not isinstance(op.output, Tensor):
        return labels.fix_operands(op.name, op.operands)
    rank = op.output.ndim
    if any(t.ndim > rank for t in op.operands):
        return labels.fix_operands(op.name, op.operands)
    several = [[_aligned(found, rank) for found in labels_of_all(labels, t)] for t in op.operands]
    tables = [bool(each) and all(map(labels.tables.hold, each)) for each in several]
    adds = op.name in _SUMS or max(map(len, several)) > 1
    if adds and sum(map(len, several)) > 1 and tables == list(map(bool, several)):
        return _add_tables(labels, op, several)
    held = [each[0] for each, table in zip(several, tables, strict=True) if each and not table]
    dims = {d for found in held for d in varying(found)}
    aligned = [
        _of_table(labels, each, dims) if table and held else next(iter(each), None)
        for each, table in zip(several, tables, strict=True)
    ]
    known = [i for i, found in enumerate(aligned) if found is not None]
    grids = [i for i in known if labels.is_grid(aligned[i])]
    if grids:
        # Positions of a table are no channels of the activation that it is added to.
        active = [i for i in grids if op.operands[i] not in labels.weights.computed]
        first = max(active or grids, key=lambda i: len(varying(aligned[i])))
        return grid_pointwise(labels, op, aligned, first, tables)
    return _along_one_dimension(labels, op, aligned, tables)


def labels_of_all(labels: Labels, tensor: Tensor) -> list[Tensor]:
    """Return the labels of a tensor; of a sum of tables, those of each table."""
    first = labels.of(tensor)
    return [] if first is None else [first, *labels.tables.others(tensor)]


def _aligned(found: Tensor, rank: int) -> Tensor:
    return found.reshape([1] * (rank - found.ndim) + list(found.shape))


def _of_table(labels: Labels, several: list[Tensor], dims: set[int]) -> Tensor | None:
    """Return the labels of the one of several added tables that lies along dimensions with channels."""
    chosen = [
        found for found in several if dims & {*varying(found)} or (len(several) == 1 and not varying(found))
    ]
    other = chosen[0] if len(chosen) == 1 else None
    for found in several:
        if found is not other:
            labels.fix(found, f"{labels.where()} combines it with channels along another dimension")
    return other


def _add_tables(labels: Labels, op: Operation, several: list[list[Tensor]]) -> None:
    """Combine tables: tie the elements of those that lie along the same dimensions; keep the others apart.

    Args:
        several: for each operand the labels of the tables of which it is the sum.
    """
    combines = f"{labels.where()} combines it ({op.name})"
    apart: list[Tensor] = []
    found = [each for of_operand in several for each in of_operand]
    for each in sorted(found, key=lambda each: -len(varying(each))):
        dims = {*varying(each)}
        beside = next((i for i, other in enumerate(apart) if dims & {*varying(other)} or not dims), None)
        if beside is None:
            apart.append(each)
            continue
        other = apart[beside]
        if labels.found.reduced and _is_statistic(other, each):
            continue
        if dims <= {*varying(other)}:
            labels.tie(other, each, f"{combines} with a tensor of fixed size")
            if len(varying(other)) > 1:  # after the ties its channels may lie along one dimension
                apart[beside] = compact(torch.from_numpy(labels.found.ties.find(other.numpy())))
        else:
            for fixed in (other, each):
                labels.fix(fixed, f"{combines} with channels along another dimension")
    for x, own in zip(op.operands, several, strict=True):
        along = [d for d in range(-x.ndim, 0) if x.shape[d] > 1 and x.stride(d)]
        for each in () if own or labels.is_uniform(x) else apart:
            if {d + op.output.ndim for d in along} & {*varying(each)}:
                labels.fix(each, f"{combines} with a tensor of fixed size")
    labels.put(op.output, apart[0])
    labels.tables.put_others(op.output, apart[1:])


def _is_outer(shape: list[int], shape_of_other: list[int], found: Tensor, other: Tensor) -> bool:
    """Whether each of two tensors has one position along the dimension of the channels of the other."""
    ours, others = varying(found), varying(other)
    return all(shape_of_other[d] == 1 for d in ours) and all(shape[d] == 1 for d in others)


def _share_rows(labels: Labels, table: Tensor, other: Tensor) -> bool:
    """Whether elements of a table share the channels of an activation along its other dimensions."""
    if not labels.tables.hold(table) or labels.tables.hold(other):
        return False
    name = labels.tables.name_of(table)
    labels.found.rows.add(name)
    return name in labels.found.shared_rows


def _along_one_dimension(
    labels: Labels, op: Operation, aligned: list[Tensor | None], tables: list[bool]
) -> None:
    """Apply an elementwise operator to tensors whose channels lie along one dimension each.

    Args:
        aligned: labels of the operands, of the rank of the output. tables: which operands are tables.
    """
    rank = op.output.ndim
    shapes = [[1] * (rank - t.ndim) + list(t.shape) for t in op.operands]
    known = [i for i, found in enumerate(aligned) if found is not None]
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
        equal = [d for d in wide if op.operands[i].stride(d - rank) == 0 or (tables[i] and other is None)]
        uniform = other is None and labels.is_uniform(op.operands[i])
        if (equal == wide or uniform) and not varying(other):
            # One value for all channels. The size that it was expanded to may be a constant in the code.
            if wide:
                labels.note_sizes(result, result)
            elif other is not None and not channel_dims:
                labels.tie(result, other, f"{combines} with a tensor of fixed size")
        elif other is None:
            labels.fix(result, f"{combines} with a tensor of fixed size")
        elif labels.found.reduced and _is_statistic(result, other):
            continue
        elif set(varying(other)) <= set(channel_dims) and (
            wide == channel_dims or _share_rows(labels, result, other)
        ):
            labels.tie(result, other, f"{combines} with a tensor of fixed size")
            if op.name == "add" and id(op.operands[i]) in labels.loose and len(channel_dims) == 1:
                labels.found.biases.append((other.numpy().ravel(), result.numpy().ravel()))
        elif not (tables[first] or tables[i]) and _is_outer(shapes[first], shapes[i], result, other):
            if labels.found.axes is None:
                raise AxesNeeded
            result = labels.compose({**labels.vectors(result), **labels.vectors(other)}, rank)
            assert result is not None
            channel_dims = varying(result)
        else:
            for each in (result, other):
                labels.fix(each, f"{combines} with channels along another dimension")
    if len(channel_dims) > 1 and not labels.is_grid(result):
        # Of a parameter: after the ties its channels may lie along one dimension.
        result = compact(torch.from_numpy(labels.found.ties.find(result.numpy())))
    return labels.put(op.output, result)


def _is_statistic(labels: Tensor, other: Tensor) -> bool:
    """Whether the second labels are those of a statistic of the first tensor, along its other dimensions."""
    for d, size in enumerate(other.shape):
        if size == 1 < labels.shape[d]:
            labels = labels.narrow(d, 0, 1)
    return labels.shape == other.shape and torch.equal(labels, other)
