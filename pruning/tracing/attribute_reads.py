"""Find which attributes of its modules the code of a model reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def attribute_reads(
    model: nn.Module, modules: Collection[str] | None = None
) -> Iterator[dict[str, set[str]]]:
    """Yield a mapping that receives, by name of a module, the attributes of it that are read in the block.

    For the block, these modules have types of their own, which derive from theirs.

    Args:
        modules: names of the modules; by default, all.

    >>> model = nn.Sequential(nn.Linear(3, 4))
    >>> with attribute_reads(model) as reads:
    ...     model[0].out_features
    4
    >>> "out_features" in reads["0"], "in_features" in reads["0"]
    (True, False)
    """
    reads: dict[str, set[str]] = {}
    watched = [
        (name, module, type(module))
        for name, module in model.named_modules()
        if modules is None or name in modules
    ]
    try:
        for name, module, kind in watched:
            module.__class__ = _recording(kind, reads.setdefault(name, set()))
        yield reads
    finally:
        for _, module, kind in watched:
            module.__class__ = kind


def attributes_read(
    model: nn.Module, places: Collection[tuple[str, str]], run: Callable[[nn.Module], object]
) -> set[tuple[str, str]]:
    """Return which attributes, given by module and name, a run of a model reads.

    Args:
        places: the attributes. run: runs the model; an error ends it.
    """
    modules = {module for module, _ in places}
    with torch.no_grad(), attribute_reads(model, modules) as reads, contextlib.suppress(Exception):
        run(model)  # which may raise anything
    return {(module, attribute) for module, attribute in places if attribute in reads.get(module, ())}


def _recording(kind: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """Return a type that derives from another and records the attributes that are read."""

    def read_attribute(self: nn.Module, name: str) -> object:
        read.add(name)
        return kind.__getattribute__(self, name)

    members = {"__getattribute__": read_attribute, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
