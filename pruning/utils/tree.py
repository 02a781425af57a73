"""Tensors in nested inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """The tensors of an operation's arguments, in order; torch's pytree takes ten times as long."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_among(value)
        elif isinstance(value, dict):
            found += tensors_among(value.values())
    return found


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, whatever holds them: plain objects and dataclasses too."""
    found: list[Tensor] = []
    _collect(output, found, set())
    return found


def _collect(output: Any, found: list[Tensor], above: set[int]) -> None:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in above:  # objects may refer to each other
            above.add(id(leaf))
            for value in _held(leaf):
                _collect(value, found, above)


def _held(leaf: Any) -> list[Any]:
    """What an object that is no container of torch's pytree holds; nothing for code and modules."""
    if isinstance(leaf, type | nn.Module | ModuleType | FunctionType | MethodType | str | bytes):
        return []
    if isinstance(leaf, Mapping):  # of another type than dict, such as a UserDict
        return list(leaf.values())
    if isinstance(leaf, list | tuple | set | frozenset):
        return list(leaf)
    held = list(getattr(leaf, "__dict__", {}).values())
    for kind in type(leaf).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(leaf, name):
                held.append(getattr(leaf, name))
    return held


def fresh(inputs: Any) -> Any:
    """Inputs of their own for a pass: models may change theirs in place, or pop from them."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


def first_examples(inputs: Inputs, count: int) -> Any:
    """The first examples of a batch of inputs, whatever holds its tensors."""
    return pytree.tree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, inputs)
