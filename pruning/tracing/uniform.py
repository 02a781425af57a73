"""Follow uniform tensors, all elements of which are equal, so that one of another size can replace them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from pruning.tracing.labels import Labels
from pruning.tracing.operation import shares_memory, writes
from pruning.utils.tree import tensors_among

#: Operations that create a uniform tensor; one of random numbers is like it, for checks make them equal.
_FILLING = frozenset(
    f"aten::{name}"
    for name in (
        "zeros",
        "ones",
        "full",
        "new_zeros",
        "new_ones",
        "new_full",
        "randn",
        "rand",
        "empty",
        "new_empty",
    )
)

#: Operations that create a uniform tensor of the size of another one, whose values they do not read.
_FILLING_LIKE = frozenset(
    f"aten::{name}_like" for name in ("zeros", "ones", "full", "rand", "randn", "randint")
)

#: Operations that write into a tensor, after which its parts have channels.
_ASSIGNING = frozenset(
    ("aten::zero_", "aten::fill_", "aten::copy_", "aten::index_put_", "aten::_index_put_impl_")
)

#: Operations that give all elements of a tensor one value again.
_REFILLING = frozenset(("aten::zero_", "aten::fill_"))

_COPYING = frozenset(("aten::_to_copy", "aten::clone"))


def fills(labels: Labels, name: str, args: tuple[object, ...]) -> bool:
    """Whether an operation makes a uniform tensor whose size follows no width."""
    if name in _FILLING_LIKE:
        return isinstance(args[0], Tensor) and labels.has_one_channel(args[0])
    copies = name in _COPYING and any(map(labels.is_uniform, tensors_among(args)))
    return name in _FILLING or copies


def pass_uniform(
    labels: Labels, func: OpOverload, operands: list[Tensor], output: object, followed: bool
) -> None:
    """Note which tensors are uniform after an operation.

    Args:
        followed: whether the operation is outside of layers.
    """
    uniform = bool(operands) and all(map(labels.is_uniform, operands))
    if func._schema.name in _REFILLING and uniform:
        return
    if writes(func) and func._schema.name not in _ASSIGNING:
        labels.filled.forget(operands[0])
    if writes(func) or (followed and shares_memory(func)):
        labels.unmark_uniform(operands)
    if not uniform or not isinstance(output, Tensor) or writes(func):
        return
    if labels.of(output) is None and (shares_memory(func) or torch.Tag.pointwise in func.tags):
        labels.mark_uniform(output)
