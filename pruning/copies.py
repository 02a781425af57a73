"""Copies of models, whatever a pass has left in them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph import tensors_among

Model = TypeVar("Model", bound=nn.Module)
#: What every module has: its parameters and children, which can be copied.
_OWN = frozenset(vars(nn.Module()))
_PLAIN = {int, float, bool, str, type(None)}
_CONTAINERS = (dict, OrderedDict, set, list)


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
        # A module has a dozen containers, nearly all empty, on which deepcopy spends most of its time;
        # some keep long lists of numbers, too.
        for name, own in vars(module).items():
            if type(own) in _CONTAINERS and (not own or (type(own) is list and {*map(type, own)} <= _PLAIN)):
                known[id(own)] = own.copy()
            elif name not in _OWN:
                for leaf in tensors_among((own,)):
                    if not leaf.is_leaf:
                        known.setdefault(id(leaf), convert(leaf.detach()))
    try:
        return copy.deepcopy(model, known)
    except RuntimeError as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied, and pruning leaves the given model as it is: {error}"
        ) from error
