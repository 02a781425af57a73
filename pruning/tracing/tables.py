"""Tables: parameters and buffers outside the layers, such as biases of positions and masks, and sums of them.

Each element of a table has a label of its own, so the labels of what code makes of it say where equal
elements lie. Code may add tables whose elements lie along different dimensions (a bias for each head, a mask
for each window). Which of them holds channels shows when the sum is added to an activation.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.tracing.ties import NONE

#: Larger tables get no labels; channels that are combined with them are fixed.
MOST_ELEMENTS = 1_000_000


class Tables:
    """The labels of tables in one forward pass, and the tensors that are sums of several tables."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._others = WeakTensorKeyDictionary()

    def note(self, name: str, labels: np.ndarray) -> None:
        """Record the labels of a table, which are successive numbers."""
        first = int(labels.flat[0])
        self._ends[first], self._names[first] = first + labels.size, name

    def hold(self, labels: Tensor | None) -> bool:
        """Whether all labels of a tensor are those of tables, so that equal labels mean equal values."""
        if labels is None or not self._ends:
            return False
        flat = labels.numpy().ravel()
        starts = np.sort(np.fromiter(self._ends, dtype=np.int64))
        ends = np.fromiter((self._ends[start] for start in starts.tolist()), dtype=np.int64)
        place = np.searchsorted(starts, flat, side="right") - 1
        return bool(((flat != NONE) & (place >= 0) & (flat < ends[place])).all())

    def name_of(self, labels: Tensor) -> str:
        """Return the name of the table that holds the labels of a tensor, see `hold`."""
        return self._names[max(start for start in self._ends if start <= int(labels.min()))]

    def put_others(self, tensor: object, others: list[Tensor]) -> None:
        """Set the labels of the other tables of which a tensor is the sum."""
        if isinstance(tensor, Tensor) and (others or tensor in self._others):
            self._others[tensor] = others

    def others(self, tensor: Tensor) -> list[Tensor]:
        """Return the labels of the other tables of which a tensor is the sum."""
        return self._others.get(tensor, [])
