"""Attributes of modules that follow the widths of layers.

A module whose code runs `x.split(self.width, 1)` or `x.view(-1, self.features)` works with narrower layers
only if the attribute is updated. `pruning.tracing.probing` finds such attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.utils.modules import submodule

#: Longer lists are not searched for widths.
MOST_ENTRIES = 64

#: The attribute that stores the names of a module's attributes that pruning has changed.
CHANGED = "_pruned_sizes"


def update_attributes(model: nn.Module, trace: Trace, plan: Plan) -> None:
    """Set the width attributes of a trace to their values under a plan, in place."""
    dropped = {name: trace.groups[name].dropped(kept) for name, kept in plan.keep.items()}
    for size in trace.sizes:
        removed = len(size.counted.dropped(dropped))
        if not removed:
            continue
        module = submodule(model, size.module)
        value = getattr(module, size.attribute)
        if size.entries:
            value = type(value)(v - removed if i in size.entries else v for i, v in enumerate(value))
        else:
            value -= removed
        setattr(module, size.attribute, value)
        mark_changed(module, [size.attribute])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            attention = getattr(module.layers[0], "self_attn", None)
            # Torch's kernel for padded sequences takes an even number of heads, which its constructor checks.
            if isinstance(attention, nn.MultiheadAttention) and attention.num_heads % 2:
                module.use_nested_tensor = False
                mark_changed(module, ["use_nested_tensor"])


def mark_changed(module: nn.Module, attributes: list[str]) -> None:
    """Record that pruning changed attributes of a module, so that checkpoints store their values."""
    setattr(module, CHANGED, sorted({*getattr(module, CHANGED, ()), *attributes}))


def changed_attributes(module: nn.Module) -> dict[str, int | list[int]]:
    """Return the attributes of a module that pruning has changed, as plain data."""
    values = {attribute: getattr(module, attribute) for attribute in getattr(module, CHANGED, ())}
    return {
        attribute: list(value) if isinstance(value, tuple) else value for attribute, value in values.items()
    }


def attributes_with(module: nn.Module, value: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the attributes of a module that equal a number, or are sequences with it, and the entries.

    A sequence with several such entries is yielded with all of them, then with each alone.

    >>> module = nn.Module()
    >>> module.width, module.parts = 5, [3, 5, 5]
    >>> list(attributes_with(module, 5))
    [('width', ()), ('parts', (1, 2)), ('parts', (1,)), ('parts', (2,))]
    """
    for attribute, held in numbers_of(module).items():
        if isinstance(held, int):
            if held == value:
                yield attribute, ()
            continue
        entries = tuple(i for i, v in enumerate(held) if v == value)
        if entries:
            yield attribute, entries
        if len(entries) > 1:
            yield from ((attribute, (i,)) for i in entries)


def numbers_of(module: nn.Module) -> dict[str, int | Sequence[int]]:
    """Return the attributes of a module, and of its class, that are whole numbers or sequences of these.

    >>> numbers_of(nn.Unflatten(1, (2, 3)))
    {'dim': 1, 'unflattened_size': (2, 3)}
    """
    own: dict[str, object] = {}
    for kind in reversed(type(module).__mro__[: type(module).__mro__.index(nn.Module)]):
        own.update(vars(kind))
    own.update(vars(module))
    found: dict[str, int | Sequence[int]] = {}
    for attribute, held in own.items():
        if attribute.startswith("__") or attribute == "_version":
            continue
        if type(held) is int or (
            isinstance(held, list | tuple)
            and type(held) in (list, tuple, torch.Size)
            and len(held) <= MOST_ENTRIES
            and {*map(type, held)} == {int}
        ):
            found[attribute] = held
    return found
