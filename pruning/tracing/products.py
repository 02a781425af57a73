"""Rules for products of activations, such as those of attention.

In q·kᵀ, the positions of q and k within a head are summed over, so they are removed together; heads lie along
the batch dimension, where those of both operands are tied; positions of v pass on to the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.tracing.axes import ProductUse
from pruning.tracing.labels import Labels
from pruning.tracing.operation import Operation
from pruning.tracing.record import SideUse
from pruning.tracing.ties import varying


class AxesNeeded(BaseException):
    """The model multiplies activations that have channels, so the pass must follow single dimensions.

    It is no `Exception`, so that the model's code does not catch it.
    """


def batched_product(labels: Labels, op: Operation) -> None:
    """Multiply batches of matrices (bmm, baddbmm), or matrices (mm, addmm)."""
    product_of_activations(labels, op, *op.operands[-2:])
    if op.name in ("baddbmm", "addmm") and op.given.get("beta") != 0:
        bias, rank = op.operands[0], op.output.ndim
        added, made = labels.of(bias), labels.vectors(labels.of(op.output))
        arriving = {d + rank - bias.ndim: vector for d, vector in labels.vectors(added).items()}
        for dim, vector in made.items():
            if dim in arriving:
                labels.tie(vector, arriving[dim], f"{labels.where()} adds a tensor of fixed size to it")
            elif dim + bias.ndim >= rank and bias.shape[dim - rank] > 1:
                labels.fix(vector, f"{labels.where()} adds a tensor of fixed size to it")
        if alone := {d - rank + bias.ndim for d in arriving.keys() - made.keys()}:
            labels.fix_along(added, alone, f"{labels.where()} adds it to another tensor")


def product_of_activations(labels: Labels, op: Operation, left: Tensor, right: Tensor) -> None:
    """Multiply (batch, n, k) by (batch, k, m), or matrices without a batch."""
    if labels.found.axes is None:
        raise AxesNeeded
    axes, rank = labels.found.axes, left.ndim
    summed, added = rank - 1, rank - 2
    of_left, of_right = labels.vectors(labels.of(left)), labels.vectors(labels.of(right))
    product = f"{labels.where()} multiplies it by another activation"

    def together(ours: Tensor | None, others: Tensor | None, role: str, what: str) -> Tensor | None:
        if ours is None or others is None:
            labels.fix(others if ours is None else ours, f"{product}, {what} of which have no channels")
            return None
        labels.tie(ours, others, f"{product}, {what} of which are partly of fixed size")
        axes.roles[role].append(ours.numpy())
        return ours

    batch = together(of_left.get(0), of_right.get(0), "heads", "heads") if rank > 2 else None
    shared = together(of_left.get(summed), of_right.get(added), "qk", "positions")
    rows, columns = of_left.get(added), of_right.get(summed)
    for passed in (rows, columns):
        if passed is not None:
            axes.roles["v"].append(passed.numpy())
    made = {0: batch, added: rows, summed: columns}
    labels.put(op.output, labels.compose({d: v for d, v in made.items() if v is not None}, rank))
    _note_macs(labels, op, left, ({0: batch, 1: rows}, {0: shared, 1: columns}))
    if shared is not None and labels.place is not None:
        labels.found.reductions[labels.place] = SideUse(shared.numpy(), summed)
        for operand, known in ((left, labels.found.left), (right, labels.found.right)):
            held = labels.of(operand)
            assert held is not None
            known[labels.place] = axes.closure(held.numpy().ravel())


def _note_macs(
    labels: Labels,
    op: Operation,
    left: Tensor,
    held: tuple[dict[int, Tensor | None], dict[int, Tensor | None]],
) -> None:
    """Record the MACs of a product as those of its channels."""
    first, second = (
        labels.compose({d: vector for d, vector in side.items() if vector is not None}, 2) for side in held
    )
    if first is None and second is None:
        return
    macs = float(op.output.numel() * left.shape[-1])
    labels.found.other_macs -= macs
    labels.found.products.append(
        ProductUse(macs, *(None if x is None else x.numpy().ravel() for x in (first, second)))
    )


def grid_pointwise(
    labels: Labels, op: Operation, aligned: list[Tensor | None], first: int, tables: list[bool]
) -> None:
    """Apply an elementwise operator to a grid: tie the channels of other operands along its dimensions.

    Args:
        aligned: labels of the operands, of the rank of the output. first: the grid among them.
        tables: which operands are tables, whose elements are equal where their labels are.
    """
    result = aligned[first]
    assert result is not None
    rank, combines = op.output.ndim, f"{labels.where()} combines it ({op.name})"
    vectors, positions = labels.vectors(result), set[int]()
    is_table = op.operands[first] in labels.weights.computed
    for i, other in enumerate(aligned):
        if i == first:
            continue
        x = op.operands[i]
        shape = [1] * (rank - x.ndim) + list(x.shape)
        wide = [d for d in vectors if shape[d] > 1]
        other = label_uniform(labels, x, wide, rank) if other is None else other
        arriving = varying(other)
        for d in wide:
            if d in arriving:
                continue
            if x.stride(d - rank) == 0 or tables[i]:
                labels.note_sizes(vectors[d], vectors[d])
            else:
                labels.fix(vectors[d], f"{combines} with a tensor of fixed size")
                positions |= {d} if is_table and x not in labels.weights.computed else set()
        outside = [d for d in arriving if d not in vectors]
        if other is None or not arriving:
            continue
        if outside and len(arriving) > len(outside) and not labels.is_grid(other):
            outside = []  # a parameter: its elements along other dimensions share the channels
        if outside:
            labels.fix_along(other, outside, f"{combines} with channels along another dimension")
        shared = {d: vectors[d] for d in arriving if d in vectors}
        if labels.is_composite(other):
            theirs = labels.vectors(other)
            for d in shared.keys() & theirs.keys():
                labels.tie(vectors[d], theirs[d], f"{combines} with a tensor of fixed size")
            labels.fix_single(other, f"{combines} with one of its positions")
        elif (ours := labels.compose(shared, rank)) is not None:
            labels.tie(ours, other, f"{combines} with a tensor of fixed size")
    if positions:
        result = labels.compose({d: vector for d, vector in vectors.items() if d not in positions}, rank)
    labels.put(op.output, result)


def label_uniform(labels: Labels, x: Tensor, dims: list[int], rank: int) -> Tensor | None:
    """Give a uniform tensor new labels along dimensions of a result of this rank, and return them.

    So heads of all layers are tied that add the same zeros. The size may be a constant in the code.
    """
    if not dims or not labels.is_uniform(x) or any(x.stride(d - rank) == 0 for d in dims):
        return None
    labels.unmark_uniform([x])
    made = {d: torch.from_numpy(labels.found.ties.new(x.shape[d - rank])) for d in dims}
    for vector in made.values():
        labels.note_sizes(vector, vector)
    labels.put(x, labels.compose({d - rank + x.ndim: vector for d, vector in made.items()}, x.ndim))
    return labels.compose(made, rank)
