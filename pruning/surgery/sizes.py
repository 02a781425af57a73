"""Sizes that modules keep beside their layers, for their code to view or split channels by.

After `x.split(self.width, 1)` or `x.view(-1, self.features)` a model fits together only if the
attribute follows the widths of the layers. `pruning.rigid` finds such attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pruning.graph.groups import Trace
from pruning.graph.plan import Plan

#: A longer list is none of sizes.
MOST_SIZES = 64

#: Where a module keeps the names of those of its attributes that pruning has changed.
CHANGED = "_pruned_sizes"


def resize(model: nn.Module, trace: Trace, plan: Plan) -> None:
    """Give the sizes that modules keep the values of the plan, in place."""
    for size in trace.sizes:
        gone = 0
        for name, kept in plan.keep.items():
            if name in size.owned:
                drop = torch.ones(trace.groups[name].channels, dtype=torch.bool)
                drop[list(kept)] = False
                gone += int(size.owned[name][drop].sum())
        if not gone:
            continue
        module = model.get_submodule(size.module)
        value: Any = getattr(module, size.attribute)
        if size.entries:
            value = type(value)(v - gone if i in size.entries else v for i, v in enumerate(value))
        else:
            value -= gone
        setattr(module, size.attribute, value)
        setattr(module, CHANGED, sorted({*getattr(module, CHANGED, ()), size.attribute}))


def changed_sizes(module: nn.Module) -> dict[str, Any]:
    """What pruning has changed of the sizes that a module keeps, as plain data."""
    values = {attribute: getattr(module, attribute) for attribute in getattr(module, CHANGED, ())}
    return {
        attribute: list(value) if isinstance(value, tuple) else value for attribute, value in values.items()
    }


def holding(module: nn.Module, value: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The attributes of a module that are a number, or hold it: then with the entries that are."""
    own: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__[: type(module).__mro__.index(nn.Module)]):
        own.update(vars(kind))
    own.update(vars(module))
    for attribute, held in own.items():
        if attribute.startswith("__") or attribute == "_version":
            continue
        if type(held) is int and held == value:
            yield attribute, ()
        elif (
            type(held) in (list, tuple, torch.Size)
            and len(held) <= MOST_SIZES
            and {*map(type, held)} == {int}
        ):
            entries = tuple(i for i, v in enumerate(held) if v == value)
            if entries:
                yield attribute, entries
            if len(entries) > 1:
                yield from ((attribute, (i,)) for i in entries)
