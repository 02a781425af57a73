"""Attributes of modules that equal a width of their layers, and whether code names them."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pruning.graph.groups import Group, HeldWidth, Positions, WidthAttribute
from pruning.graph.layers import is_depthwise, layer_width, rule_for, rule_of
from pruning.graph.rule import Side
from pruning.surgery.width_attributes import attributes_with, numbers_of
from pruning.utils.modules import submodule

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
    for counted, layer, described in _widths(model, groups):
        parts = layer.split(".")
        for end in range(len(parts), -1, -1):
            owner = ".".join(parts[:end])
            if owner not in modules:
                continue
            kind = type(modules[owner])
            for attribute, entries in attributes_with(modules[owner], counted.size):
                if attribute in names_read(kind) - names_stored(kind):
                    held = WidthAttribute(owner, attribute, entries, counted)
                    key = owner, attribute, entries, hash(tuple(sorted(counted.owners)))
                    found.setdefault(key, HeldWidth(held, counted.size, described))
    return list(found.values())


def _widths(model: nn.Module, groups: Mapping[str, Group]) -> Iterator[tuple[Positions, str, str]]:
    """Yield the positions of the sides of layers, and the channels of groups: with a layer, and a name."""
    sides: dict[tuple[str, Side], dict[str, tuple[Tensor, Tensor]]] = {}
    for name, group in groups.items():
        for member in group.members:
            if member.side != "self":
                sides.setdefault((member.layer, member.side), {})[name] = member.index, member.channel
    for (layer, side), owners in sides.items():
        module = submodule(model, layer)
        width = layer_width(module, side)
        yield Positions(width, owners), layer, layer
        if is_depthwise(module) and (each := width // getattr(module, rule_of(module).in_count)) > 1:
            first = {
                name: (at[at % each == 0] // each, to[at % each == 0]) for name, (at, to) in owners.items()
            }
            yield Positions(width // each, first), layer, layer
    for name, group in groups.items():
        channels = torch.arange(group.channels)
        yield Positions(group.channels, {name: (channels, channels)}), name.partition("/")[0], f"group {name}"


# ---- What code reads


_READ: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()
_STORED: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()


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


def names_stored(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of attributes that `forward` and what it calls may set, such as the size of a cache.

    >>> class Net(nn.Module):
    ...     def forward(self, x):
    ...         self.last = x.shape
    >>> names_stored(Net)
    frozenset({'last'})
    """
    if kind in _STORED:
        return _STORED[kind]
    methods, called, left = _methods(kind), {"forward"}, ["forward"]
    while left:
        more = methods.get(left.pop(), frozenset()) & methods.keys() - called
        called |= more
        left += more
    functions = (getattr(kind, name) for name in called if isinstance(getattr(kind, name), FunctionType))
    steps = (step for function in functions for step in dis.get_instructions(function))
    _STORED[kind] = frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")
    return _STORED[kind]


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
