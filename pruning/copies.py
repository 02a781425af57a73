"""Copies of models, whatever a pass has left in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning.errors import PruningError

Model = TypeVar("Model", bound=nn.Module)
#: What every module has: its parameters and children, which can be copied.
_OWN = frozenset(vars(nn.Module()))


def copied(
    model: Model, memo: dict[int, Any] | None = None, convert: Callable[[Tensor], Any] = Tensor.detach
) -> Model:
    """A deep copy of a model.

    A model may keep tensors of its last pass (an activation, a weight that hooks compute), which
    Python's deepcopy refuses for their history; the copy has them without it.

    Args:
        memo: what stands for which object in the copy, by id, as deepcopy takes it.
        convert: makes the copy's tensors out of those that have a history.

    Raises `PruningError` for a model that cannot be copied.
    """
    known = {} if memo is None else memo
    for module in model.modules():
        for leaf in pytree.tree_leaves([value for key, value in vars(module).items() if key not in _OWN]):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                known.setdefault(id(leaf), convert(leaf.detach()))
    try:
        return copy.deepcopy(model, known)
    except RuntimeError as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied, and pruning leaves the given model as it is: {error}"
        ) from error
