"""Batches of (inputs, targets), from any source."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.utils.batch import usual_batch

#: A pair: the inputs of the model, and the targets that the loss compares its outputs with.
Batch: TypeAlias = tuple[Any, Any]


class BatchSource(Protocol):
    """Batches that can be iterated several times and have a length: a DataLoader or a list."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def pair(batch: object) -> Batch:
    """Return a batch as (inputs, targets).

    Raises:
        PruningError: if the batch is not a pair.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    described = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        described += f" with {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list):
        described += f" of {len(batch)}"
    raise PruningError(
        f"a batch is {described}; a pair (inputs, targets) was expected. Let the loader yield such pairs; "
        "inputs may be a tuple of the model's arguments, or a dict of its keyword arguments"
    )


def first_batch(batches: Iterable[object]) -> Batch:
    """Return the first batch as (inputs, targets).

    Raises:
        PruningError: if there is no batch, or if it is not a pair.
    """
    for batch in batches:
        return pair(batch)
    raise PruningError("the given batches are empty: at least one pair (inputs, targets) is needed")


def to_device(batch: object, device: torch.device) -> Batch:
    """Return a batch as (inputs, targets) with every tensor on a device.

    Raises:
        PruningError: if the batch is not a pair, or if it holds numpy arrays.
    """
    inputs, targets = pair(batch)

    def move(leaf: object) -> object:
        if isinstance(leaf, np.ndarray):
            raise PruningError(
                "a batch holds numpy arrays: tensors were expected; convert with torch.from_numpy(x).float()"
            )
        if isinstance(leaf, UserDict):  # a tokenizer's, which is a leaf for torch
            changed = copy.copy(leaf)
            changed.data = pytree.tree_map(move, leaf.data)
            return changed
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, inputs), pytree.tree_map(move, targets)


def first_examples(batches: Iterable[object], count: int | None) -> list[Batch]:
    """Return batches that hold at most this many examples; all of them for None.

    Targets are cut like the inputs if they are a tensor with an entry for each example.

    >>> [len(x) for x, _ in first_examples([(torch.zeros(4, 2), None), (torch.zeros(4, 2), None)], 6)]
    [4, 2]
    """
    found, seen = list[Batch](), 0
    for batch in batches:
        if count is not None and seen >= count:
            break
        inputs, targets = pair(batch)
        examples = usual_batch(inputs)
        room = examples.size if count is None else min(examples.size, count - seen)
        if room < examples.size:
            inputs = examples.first(inputs, room)
            if isinstance(targets, Tensor) and targets.ndim and len(targets) == examples.size:
                targets = targets[:room]
        found.append((inputs, targets))
        seen += room
    return found


def length(batches: object) -> int | None:
    """Return the number of batches; None if it is unknown, as for a DataLoader of an IterableDataset."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
