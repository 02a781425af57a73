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
from torch.utils.data import DataLoader, SequentialSampler, Subset

from pruning.errors import PruningError
from pruning.utils.batch import usual_batch
from pruning.utils.paths import Path, map_with_paths, tensors_with_paths
from pruning.utils.tree import Inputs

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


def like_examples(batches: Iterable[object], examples: Inputs, device: torch.device) -> list[Batch]:
    """Return batches whose inputs have the types of example inputs, on a device.

    Floating-point tensors are converted to the type of the example's tensor at the same place.

    Raises:
        PruningError: if a batch has no example, if its inputs are integers where the examples are not, or if
            they are not finite where the examples are.

    >>> [(inputs, _)] = like_examples([(torch.ones(2).double(), None)], torch.ones(2), torch.device("cpu"))
    >>> inputs.dtype
    torch.float32
    """
    given = {path: tensor for path, tensor in tensors_with_paths(examples) if tensor.numel()}
    wanted = {path: tensor for path, tensor in given.items() if tensor.is_floating_point()}
    is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in wanted.values())
    found = []
    for number, batch in enumerate(batches):
        inputs, targets = to_device(batch, device)

        def convert(path: Path, value: object, number: int = number) -> object:
            if not isinstance(value, Tensor) or path not in given:
                return value
            where = f"calibration batch {number}"
            if not value.numel():
                raise PruningError(f"{where} has inputs of shape {tuple(value.shape)}: leave it out")
            if path not in wanted:
                return value
            if not value.is_floating_point():
                kinds = f"{value.dtype} inputs, the example inputs are {wanted[path].dtype}"
                raise PruningError(f"{where} has {kinds}: prepare both in the same way")
            if is_finite and not bool(torch.isfinite(value).all()):
                raise PruningError(f"{where} has inputs that are not finite: leave it out, or correct it")
            return value.to(wanted[path].dtype)

        found.append((map_with_paths(convert, inputs), targets))
    return found


def spread_examples(batches: BatchSource, count: int | None) -> list[Batch]:
    """Return batches that hold at most this many examples, evenly spread over the given ones; None for all.

    Batches are often sorted by class, so the first examples alone would show a few classes. Targets are
    selected like the inputs if they are a tensor with an entry for each example.

    >>> batches = [(torch.arange(4.0)[:, None], None), (torch.arange(4.0, 8.0)[:, None], None)]
    >>> [inputs.flatten().tolist() for inputs, _ in spread_examples(batches, 3)]
    [[0.0, 2.0], [4.0]]
    """
    if count is not None and isinstance(batches, DataLoader):
        batches = _thinned(batches, count)
    found, seen, left = list[Batch](), 0, count
    step = 1
    for number, batch in enumerate(batches):
        inputs, targets = pair(batch)
        if left is None:
            found.append((inputs, targets))
            continue
        examples = usual_batch(inputs)
        if not number and count:  # the last batch may be smaller, so this is at least every step-th one
            step = max(1, len(batches) * examples.size // count)
        places = torch.arange(-seen % step, examples.size, step)[:left]
        if len(places):
            if isinstance(targets, Tensor) and targets.ndim and len(targets) == examples.size:
                targets = targets[places.to(targets.device)]
            found.append((examples.at(inputs, places), targets))
        seen, left = seen + examples.size, left - len(places)
        if not left:
            break
    return found


def _thinned(loader: DataLoader[Any], count: int) -> BatchSource:
    """Return a loader that reads only the examples that are selected, if it takes them in their order."""
    dataset: Any = loader.dataset
    in_order = isinstance(loader.sampler, SequentialSampler) and loader.batch_size is not None
    if not in_order or type(loader).__init__ is not DataLoader.__init__:
        return loader
    chosen = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    return type(loader)(
        Subset(dataset, chosen),
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def length(batches: object) -> int | None:
    """Return the number of batches; None if it is unknown, as for a DataLoader of an IterableDataset."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
