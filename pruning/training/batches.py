"""Batches of (inputs, targets), whatever gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.errors import PruningError


class BatchSource(Protocol):
    """Whatever can be iterated many times and gives (inputs, targets): a DataLoader, a list."""

    def __iter__(self) -> Any: ...
    def __len__(self) -> int: ...


def pair(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, targets). Raises `PruningError` for one that is something else."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        described = f"a {type(batch).__name__} with {', '.join(map(repr, batch))}"
    else:
        held = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        described = f"a {type(batch).__name__}{held}"
    raise PruningError(
        f"a batch is {described}; a pair (inputs, targets) was expected. Let the loader give such pairs: "
        "inputs may be a tuple of what the model is called with, or a dict of it by name"
    )


def first_batch(batches: Iterable[Any]) -> tuple[Any, Any]:
    """The first (inputs, targets). Raises `PruningError` where there is none."""
    for batch in batches:
        return pair(batch)
    raise PruningError("the given batches are empty: at least one pair (inputs, targets) is needed")


def to_device(batch: tuple[Any, Any], device: torch.device) -> tuple[Any, Any]:
    """(inputs, targets) with every tensor on the device."""
    inputs, targets = pair(batch)

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            raise PruningError(
                "a batch holds numpy arrays: tensors were expected; torch.from_numpy(x).float() makes one"
            )
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, inputs), pytree.tree_map(move, targets)


def length(batches: Any) -> int | None:
    """How many batches there are; None where they cannot tell, as a DataLoader of an IterableDataset."""
    try:
        return len(batches)
    except TypeError:
        return None
