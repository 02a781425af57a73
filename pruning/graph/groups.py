"""Channel groups: which slices of which layers must be removed together, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruning.graph.layers import Side

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
