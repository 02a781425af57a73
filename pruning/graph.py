"""Channel groups: which slices of which layers must be removed together, as plain data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning.layers import Side
from pruning.modes import eval_mode, hooked, on_input, require_module

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
#: A layer to leave as it is: a name or pattern (`features.*`), a type, or the module itself.
Ignored = str | type[nn.Module] | nn.Module


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group.

    `index[i]`, a position along that side of the layer, belongs to channel `channel[i]` of
    the group: after a flatten, several positions belong to one channel. `dim` is the
    dimension of the layer's input (or output, on that side) along which they lie.

    On the side `self`, `layer` is the full name of a parameter or buffer that the model uses
    without a layer of `pruning.layers.TABLE` around it, and `dim` one of its own dimensions.
    """

    layer: str
    side: Side
    index: Tensor
    channel: Tensor
    dim: int

    def positions(self, channels: Tensor) -> Tensor:
        """The positions along this side that the given channels of the group own, sorted."""
        return self.index[torch.isin(self.channel, channels)].sort().values


@dataclass(frozen=True)
class Group:
    """Slices of layers that are kept or removed together; channels count from 0."""

    name: str
    channels: int
    members: tuple[Member, ...]

    def side(self, side: Side) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.side == side)


@dataclass(frozen=True)
class Size:
    """A size that a module keeps in an attribute, for its code to view or split channels by.

    Attributes:
        module, attribute: where it is kept, a whole number or a sequence of them.
        entries: which entries of a sequence are this size; empty for a number.
        owned: by group, how many of its positions each channel is, (channels,).
    """

    module: str
    attribute: str
    entries: tuple[int, ...]
    owned: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class LayerUse:
    """How often a forward pass of one example uses a weight of a layer.

    A layer costs `uses * weight.numel()` MACs, whatever its widths. `positions` counts the
    output positions, at each of which a bias is added. `bias` tells whether the layer has
    one, or gets one when the BatchNorm behind it is folded.
    """

    uses: float
    positions: float
    bias: bool = False


@dataclass(frozen=True)
class Trace:
    """What tracing found out about a model.

    Attributes:
        groups: the prunable groups, by the name of their first layer.
        skipped: layers whose outputs cannot be pruned, with the reason and the cure.
        foldable: BatchNorm layers that directly follow a layer: layer name to norm name.
        uses: for every convolution and linear layer, how often it is used.
        ignored: the layers that were asked to stay as they are, those inside them included.
        other_macs: of products outside such layers (attention), for one example.
        inputs: the example inputs; whether folding changes nothing is checked on them.
        sizes: kept by modules beside their layers; they follow the widths of the groups.
    """

    groups: dict[str, Group]
    skipped: dict[str, str]
    foldable: dict[str, str]
    uses: dict[str, LayerUse] = field(repr=False)
    ignored: frozenset[str] = frozenset()
    other_macs: float = 0.0
    inputs: Any = field(default=None, repr=False, compare=False)
    sizes: tuple[Size, ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        return {name: group.channels for name, group in self.groups.items()}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model on example inputs: a tensor, a sequence of arguments, or keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are; one without any, such as an exported file, takes the CPU.

    Raises `PruningError` for what is no module.
    """
    require_module(model)
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


def call_until(model: nn.Module, inputs: Inputs, layer: str, side: Side) -> Any:
    """The first input of a layer (side `in`) or its output (`out`) in a forward pass, which ends there."""
    found: list[Any] = []

    def receives(x: Tensor) -> None:
        found.append(x)
        raise _Reached

    def returns(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    module = model.get_submodule(layer)
    handle = on_input(module, receives) if side == "in" else module.register_forward_hook(returns)
    with hooked([handle]), eval_mode(model), contextlib.suppress(_Reached):
        call(model, fresh(inputs))
    return found[0]


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """The tensors of an operation's arguments, in order; torch's pytree takes ten times as long."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_among(value)
        elif isinstance(value, dict):
            found += tensors_among(value.values())
    return found


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, whatever holds them: plain objects and dataclasses too."""
    found: list[Tensor] = []
    _collect(output, found, set())
    return found


def _collect(output: Any, found: list[Tensor], above: set[int]) -> None:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in above:  # objects may refer to each other
            above.add(id(leaf))
            for value in _held(leaf):
                _collect(value, found, above)


def _held(leaf: Any) -> list[Any]:
    """What an object that is no container of torch's pytree holds; nothing for code and modules."""
    if isinstance(leaf, type | nn.Module | ModuleType | FunctionType | MethodType | str | bytes):
        return []
    if isinstance(leaf, Mapping):  # of another type than dict, such as a UserDict
        return list(leaf.values())
    if isinstance(leaf, list | tuple | set | frozenset):
        return list(leaf)
    held = list(getattr(leaf, "__dict__", {}).values())
    for kind in type(leaf).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(leaf, name):
                held.append(getattr(leaf, name))
    return held


def fresh(inputs: Any) -> Any:
    """Inputs of their own for a pass: models may change theirs in place, or pop from them."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


def first_examples(inputs: Inputs, count: int) -> Any:
    """The first examples of a batch of inputs, whatever holds its tensors."""
    return pytree.tree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, inputs)
