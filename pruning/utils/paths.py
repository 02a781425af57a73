"""Find and replace the tensors and lists in nested inputs, each with its path."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T")

#: Where a tensor or a list is in nested inputs: indices of sequences and keys of mappings.
Path: TypeAlias = tuple[int | str, ...]


def _entries(value: object) -> list[tuple[int | str, object]]:
    """Return the entries of a sequence or mapping with their keys; nothing for other objects."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def tensors_with_paths(inputs: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors of nested inputs, each after its path."""
    if isinstance(inputs, Tensor):
        yield path, inputs
    for key, value in _entries(inputs):
        yield from tensors_with_paths(value, (*path, key))


def lists_with_paths(inputs: object, path: Path = ()) -> Iterator[tuple[Path, list[object]]]:
    """Yield the sequences in nested inputs that are not empty, each after its path."""
    if isinstance(inputs, list | tuple) and inputs and not hasattr(inputs, "_fields"):
        yield path, list(inputs)
    for key, value in _entries(inputs):
        yield from lists_with_paths(value, (*path, key))


def map_with_paths(change: Callable[[Path, object], object], value: T, path: Path = ()) -> T:
    """Return nested inputs in which `change` replaced tensors and sequences, given their paths."""
    changed = change(path, value)
    if changed is not value:
        return changed  # type: ignore[return-value]
    entries = [(key, map_with_paths(change, each, (*path, key))) for key, each in _entries(value)]
    if not entries:
        return value
    if isinstance(value, UserDict):
        made = type(value).__new__(type(value))
        made.__dict__.update({**vars(value), "data": dict(entries)})
        return made
    if isinstance(value, Mapping):
        return dict(entries)  # type: ignore[return-value]
    values = [each for _, each in entries]
    return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)  # type: ignore
