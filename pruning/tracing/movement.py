"""Rules for operators that move data: views, permutations, slices, shuffles.

`move` covers most of them: it applies the operator to the labels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.operation import Operation, first_operand
from pruning.tracing.ties import NONE, compact, spread, varying, vector_along


@first_operand
def move(labels: Labels, op: Operation, first: Tensor) -> None:
    """Apply the operator to the labels of its first operand."""
    _move(labels, op, first)


def _move(labels: Labels, op: Operation, first: Tensor) -> None:
    x = op.operands[0]
    full = first.expand(x.shape)
    moved = op.func(*[full if a is x else a for a in op.args], **op.kwargs)
    for leaf, found in zip(pytree.tree_leaves(op.output), pytree.tree_leaves(moved), strict=True):
        labels.put(leaf, compact(found))


@first_operand
def view(labels: Labels, op: Operation, first: Tensor) -> None:
    """Reshape; the given sizes may be constants in the code."""
    found = compact(first.expand(op.operands[0].shape).reshape(op.output.shape))
    labels.found.reshapes.note(labels.path[-1], op.operands[0], op.output, first, found)
    if labels.found.axes is None:
        found = _along_one_dimension(labels, found)
    labels.note_sizes(first, found)
    labels.put(op.output, found)


def _along_one_dimension(labels: Labels, found: Tensor) -> Tensor:
    """Reduce channels that a view spreads over several dimensions to the largest of these.

    They are tied across the other dimensions, whose sizes are assumed to be constants in the code.
    """
    channel_dims = varying(found)
    if len(channel_dims) < 2:
        return found
    largest = max(channel_dims, key=lambda d: (found.shape[d], d))
    flat = found.movedim(largest, -1).reshape(-1, found.shape[largest])
    for row in flat[1:]:
        labels.tie(flat[0], row, FIXED_SIZE)
    return spread(flat[0], found.ndim, largest)


@first_operand
def split(labels: Labels, op: Operation, first: Tensor) -> None:
    """Slice or split along a dimension: equal parts keep channels at the same places.

    Whether a slice is one of several equal parts is known after the pass (`Labels.close_slices`).
    """
    x = op.operands[0]
    if not x.ndim:
        return None
    dim = (op.given.get("dim") or 0) % x.ndim
    pieces = pytree.tree_leaves(op.output)
    lengths = [1 if piece.ndim < x.ndim else piece.shape[dim] for piece in pieces]
    if dim in varying(first) and 0 < lengths[0] < x.shape[dim]:  # an empty slice holds no channels
        start, step = (op.given.get("start") or 0) % x.shape[dim], op.given.get("step") or 1
        reason = f"{labels.where()} selects channels of it by position"
        alone, grid, whole = varying(first) == [dim], labels.is_grid(first), first
        if grid:  # positions are selected along one of its dimensions
            vector = labels.vectors(first).get(dim)
            if vector is None:
                return _move(labels, op, first)
            first, alone = spread(vector, first.ndim, dim), True
        equal = all(n == lengths[0] for n in lengths) and not (
            x.shape[dim] % lengths[0] or start % lengths[0]
        )
        if alone and step > 1 and not x.shape[dim] % step:
            labels.note_positions(_counted(first, dim, start, lengths), reason)
            labels.tie_neighbors(first, dim, step)
        elif not alone and (len(pieces) == 1 or not equal):  # of a parameter or a buffer: a table
            whole = labels.tie_positions(first, [dim], reason)
        elif pieces[0].ndim < x.ndim or step != 1:
            labels.fix(first, reason)
            if grid:
                labels.select_along(whole, [dim], reason)
        else:
            labels.note_positions(_counted(first, dim, start, lengths), reason)
            if len(pieces) > 1:  # their size may be a part of an attribute: `x.split(self.channels // 2)`
                labels.note_sizes(first, first)
            if len(pieces) == 1 and alone:
                labels.note_slice(first, dim, start, lengths[0])
            elif equal:
                labels.tie_equal_parts(first, dim, lengths[0])
        first = whole
    return _move(labels, op, first)


def selects_one(labels: Labels, op: Operation) -> bool:
    """Whether an operation selects one position of a dimension along which channels lie, or passes it on."""
    if op.name in ("slice", "select", "detach", "alias", "unsqueeze") and labels.is_deferred(op.operands[0]):
        return True
    if op.name not in ("slice", "select"):
        return False
    x, output = op.operands[0], op.output
    dim = (op.given.get("dim") or 0) % x.ndim
    one = output.ndim < x.ndim or output.shape[dim] == 1
    return one and x.shape[dim] > 1 and dim in varying(labels.of(x))


def _counted(first: Tensor, dim: int, start: int, lengths: list[int]) -> Iterator[Tensor]:
    """Yield labels whose number the code may hold: those of each piece, and those before a slice's bounds."""
    for length in lengths:
        ends = {(0, start), (0, start + length)} if len(lengths) == 1 else set()
        for begin, end in sorted({(start, start + length), *ends}):
            if 0 < end - begin < first.shape[dim]:
                yield first.narrow(dim, begin, end - begin)
        start += length


@first_operand
def pad(labels: Labels, op: Operation, first: Tensor) -> None:
    """Pad with a constant; positions added along the channel dimension belong to no channel."""
    pads = list(op.given["pad"])
    if all(not any(pads[2 * (first.ndim - 1 - d) : 2 * (first.ndim - d)]) for d in varying(first)):
        return labels.put(op.output, first)
    full = first.expand(op.operands[0].shape)
    return labels.put(op.output, compact(torch.constant_pad_nd(full, pads, NONE)))


@first_operand
def shift(labels: Labels, op: Operation, first: Tensor) -> None:
    """Roll, sort or gather along dimensions; fix channels that lie along one of them."""
    dims = op.given.get("dims", op.given.get("dim", []))
    touched = {d % first.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    along = touched & set(varying(first))
    if along and len(varying(first)) > len(along) and not labels.is_grid(first):  # of a table
        first = labels.tie_positions(first, along, f"{labels.where()} rearranges its channels by position")
    elif not touched or along:
        labels.fix_along(first, touched, f"{labels.where()} rearranges its channels by position")
        if not labels.is_grid(first):
            return
    for leaf in pytree.tree_leaves(op.output):
        labels.put(leaf, first)
    return


@first_operand
def index(labels: Labels, op: Operation, first: Tensor) -> None:
    """Index neighboring dimensions with integer tensors; fix channels that lie along one of them."""
    indices = op.given["indices"]
    used = [d for d, each in enumerate(indices) if each is not None]
    integer = all(each is None or each.dtype == torch.long for each in indices)
    taken, axes = set(used) & set(varying(first)), labels.found.axes
    if taken and integer and len(varying(first)) > len(taken):
        reason = f"{labels.where()} picks from it by position"
        if axes is not None and labels.is_grid(first):
            first = labels.select_along(first, taken, reason)
        else:  # a parameter or a buffer, such as a table of positions
            first = labels.tie_positions(first, taken, reason)
        taken = set()
    if not integer or taken or used != list(range(used[0], used[-1] + 1)):
        return labels.fix(first, f"{labels.where()} picks from it by position")
    narrowed = first
    for d in reversed(used):
        narrowed = narrowed.select(d, 0)
    for _ in range(max(each.ndim for each in indices if each is not None)):
        narrowed = narrowed.unsqueeze(used[0])
    return labels.put(op.output, narrowed)


@first_operand
def restride(labels: Labels, op: Operation, first: Tensor) -> None:
    """Pass labels on where only the memory layout changes: `as_strided` to the same shape."""
    if list(op.given["size"]) == list(op.operands[0].shape):
        labels.put(op.output, first)
    else:
        labels.fix_operands(op.name, op.operands)


@first_operand
def as_complex(labels: Labels, op: Operation, first: Tensor) -> None:
    """Join real and imaginary parts, which lie along the last dimension: tie them."""
    real, *imaginary = first.unbind(-1)
    for part in imaginary:  # none where channels do not lie along this dimension
        labels.tie(real, part, FIXED_SIZE)
    labels.put(op.output, compact(real))


@first_operand
def as_real(labels: Labels, op: Operation, first: Tensor) -> None:
    """Give real and imaginary parts, along a new last dimension, the channels of their numbers."""
    labels.put(op.output, first.unsqueeze(-1))


@first_operand
def pixel_shuffle(labels: Labels, op: Operation, first: Tensor) -> None:
    """Shuffle pixels: tie the input channels that become the pixels of one output channel."""
    if varying(first) not in ([], [first.ndim - 3]):
        return labels.fix(first, f"{labels.where()} shuffles pixels of channels along another dimension")
    vector = vector_along(first, first.ndim - 3, op.operands[0].shape[-3])
    by_output = vector.reshape(op.output.shape[-3], -1)
    for column in by_output.T[1:]:
        labels.tie(by_output[:, 0], column, FIXED_SIZE)
    return labels.put(op.output, spread(by_output[:, 0].contiguous(), op.output.ndim, -3))


@first_operand
def channel_shuffle(labels: Labels, op: Operation, first: Tensor) -> None:
    """Interleave the channels of `groups` parts, and tie the parts."""
    x = op.operands[0]
    if varying(first) not in ([], [1]):
        return labels.fix(first, f"{labels.where()} shuffles channels along another dimension")
    by_part = vector_along(first, 1, x.shape[1]).reshape(op.given["groups"], -1)
    for other in by_part[1:]:
        labels.tie(by_part[0], other, FIXED_SIZE)
    return labels.put(op.output, spread(by_part.T.flatten(), x.ndim, 1))


@first_operand
def unfold_patches(labels: Labels, op: Operation, first: Tensor) -> None:
    """Unfold patches (F.unfold): every channel becomes one row per kernel position."""
    x = op.operands[0]
    if varying(first) not in ([], [1]) or x.ndim != 4:
        return labels.fix(first, f"{labels.where()} unfolds channels along another dimension")
    vector = vector_along(first, 1, x.shape[1]).repeat_interleave(op.output.shape[1] // x.shape[1])
    return labels.put(op.output, vector.reshape(1, -1, 1))
