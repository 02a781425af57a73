"""Tensors filled with one value (`torch.zeros`), into parts of which code writes channels."""

from __future__ import annotations

import weakref

from torch import Tensor


class FilledTensors:
    """Find the filled tensor that a tensor is a part of, by their memory.

    >>> import torch
    >>> filled, whole = FilledTensors(), torch.zeros(2, 3)
    >>> filled.note(whole)
    >>> filled.find(whole[:, 1:]) is whole, filled.find(torch.zeros(2, 3))
    (True, None)
    """

    def __init__(self) -> None:
        self._by_memory: dict[int, weakref.ref[Tensor]] = {}

    def note(self, tensor: Tensor) -> None:
        """Record a filled tensor."""
        self._by_memory[_memory(tensor)] = weakref.ref(tensor)

    def find(self, part: Tensor) -> Tensor | None:
        """Return the filled tensor that a tensor is a part of; None if there is none, or it was changed."""
        held = self._by_memory.get(_memory(part)) if self._by_memory else None
        found = None if held is None else held()
        return found if found is not None and _memory(found) == _memory(part) else None

    def forget(self, part: Tensor) -> None:
        """Record that other values may have been written into a filled tensor."""
        if self._by_memory:
            self._by_memory.pop(_memory(part), None)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
