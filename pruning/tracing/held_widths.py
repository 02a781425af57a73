"""Attributes of modules that equal a width of their layers, and whether code reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pruning.graph.groups import Group, HeldWidth, WidthAttribute
from pruning.graph.layers import layer_width, rule_for
from pruning.graph.rule import Side
from pruning.surgery.width_attributes import attributes_with, numbers_of

#: Methods whose use of an attribute changes nothing in a network that is made.
_DESCRIBING = frozenset(("extra_repr", "__repr__", "__str__", "__init_subclass__"))


def held_widths(model: nn.Module, groups: Mapping[str, Group]) -> list[HeldWidth]:
    """Return the attributes that equal a width of the groups, and that the code of their modules reads.

    They belong to the modules that hold the layers, the nearest first.
    """
    found: dict[tuple[str, str, tuple[int, ...], int], HeldWidth] = {}
    modules = {
        name: module
        for name, module in model.named_modules()
        if rule_for(module) is None and names_read(type(module)) & numbers_of(module).keys()
    }
    for value, layer, owned in _widths(model, groups):
        parts = layer.split(".")
        for end in range(len(parts), -1, -1):
            owner = ".".join(parts[:end])
            for attribute, entries in attributes_with(modules[owner], value) if owner in modules else ():
                if attribute in names_read(type(modules[owner])):
                    held = WidthAttribute(owner, attribute, entries, owned)
                    key = owner, attribute, entries, hash(tuple(sorted(owned)))
                    found.setdefault(key, HeldWidth(held, value, layer))
    return list(found.values())


def _widths(model: nn.Module, groups: Mapping[str, Group]) -> Iterator[tuple[int, str, dict[str, Tensor]]]:
    """Yield widths with a layer that has each, and by group how many positions each channel contributes."""
    sides: dict[tuple[str, Side], dict[str, Tensor]] = {}
    for name, group in groups.items():
        for member in group.members:
            if member.side != "self":
                counts = torch.bincount(member.channel, minlength=group.channels)
                sides.setdefault((member.layer, member.side), {})[name] = counts
    for (layer, side), owned in sides.items():
        yield layer_width(model.get_submodule(layer), side), layer, owned
    for name, group in groups.items():
        yield group.channels, name.partition("/")[0], {name: torch.ones(group.channels, dtype=torch.long)}


# ---- What code reads


_READ: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()


def names_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of attributes in the code of a module's class, without that which only makes it.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.made, self.read = 3, 4
    ...         self.grow()
    ...     def grow(self):
    ...         self.made += 1
    ...     def forward(self, x):
    ...         return x[:, :self.read]
    >>> sorted(names_read(Net) & {"made", "read"})
    ['read']
    """
    if kind in _READ:
        return _READ[kind]
    methods = _methods(kind)
    making = {"__init__"}
    while True:  # methods that are called by such methods alone
        users = {
            name: {other for other in methods if name in methods[other] and other != name} for name in methods
        }
        more = {name for name, by in users.items() if by and by <= making} - making
        if not more:
            break
        making |= more
    used = (names for name, names in methods.items() if name not in making | _DESCRIBING)
    _READ[kind] = frozenset().union(*used)
    return _READ[kind]


def _methods(kind: type[nn.Module]) -> dict[str, frozenset[str]]:
    """Return the methods of a class below `nn.Module`, with the names in their code."""
    methods: dict[str, frozenset[str]] = {}
    for base in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        for name, held in vars(base).items():
            function = getattr(held, "fget", None) or getattr(held, "__func__", None) or held
            if isinstance(function, FunctionType):
                code = getattr(function, "__wrapped__", function).__code__
                methods[name] = methods.get(name, frozenset()) | frozenset(_names(code))
    return methods


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant  # of getattr


def attributes_read(
    probe: nn.Module, places: Iterable[tuple[str, str]], run: Callable[[nn.Module], object]
) -> set[tuple[str, str]]:
    """Return which attributes, given by module and name, a run of a copy of a model reads.

    Args:
        probe: a copy of the model; its modules get other classes.
        places: the attributes. run: runs the copy; an error ends it.
    """
    names: dict[str, set[str]] = {}
    for module, attribute in places:
        names.setdefault(module, set()).add(attribute)
    seen: set[tuple[str, str]] = set()
    for name, attributes in names.items():
        _watch(probe.get_submodule(name), name, attributes, seen)
    try:
        with torch.no_grad():
            run(probe)
    except Exception:  # of the model, whatever it raises
        return seen
    return seen


def _watch(module: nn.Module, name: str, attributes: set[str], seen: set[tuple[str, str]]) -> None:
    """Let a module note the attributes that are read."""
    kind = type(module)

    def read(self: nn.Module, attribute: str) -> object:
        if attribute in attributes:
            seen.add((name, attribute))
        return kind.__getattribute__(self, attribute)

    watched = type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})
    module.__class__ = watched
