"""Find which attributes of its modules the code of a model reads in a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def attribute_reads(model: nn.Module) -> Iterator[dict[str, set[str]]]:
    """Yield a mapping that receives, by name of a module, the attributes of it that are read in the block.

    For the block, modules have types of their own, which derive from theirs.

    >>> model = nn.Sequential(nn.Linear(3, 4))
    >>> with attribute_reads(model) as reads:
    ...     model[0].out_features
    4
    >>> reads["0"]
    {'out_features'}
    """
    reads: dict[str, set[str]] = {}
    kinds = {name: type(module) for name, module in model.named_modules()}
    try:
        for name, module in model.named_modules():
            module.__class__ = _recording(kinds[name], reads.setdefault(name, set()))
        yield reads
    finally:
        for name, module in model.named_modules():
            module.__class__ = kinds[name]


def _recording(kind: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """Return a type that derives from another and records the attributes that are read."""

    def read_attribute(self: nn.Module, name: str) -> object:
        read.add(name)
        return kind.__getattribute__(self, name)

    members = {"__getattribute__": read_attribute, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
