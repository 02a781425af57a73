"""Channel groups: which slices of which layers must be removed together, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pruning.graph.layers import Side
from pruning.utils.tree import Inputs

#: A layer to leave unpruned: a name or pattern (`features.*`), a type, or the module itself.
Ignored = str | type[nn.Module] | nn.Module


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group.

    Attributes:
        layer: the name of the layer. On the side `self`, the full name of a parameter or buffer that the
            model uses without a layer of `pruning.graph.layers.TABLE` around it.
        side: which of the layer's channels these are.
        index: positions along that side of the layer, (positions,).
        channel: the channel of the group that owns each of these positions, (positions,). After a
            flatten, several positions belong to one channel.
        dim: the dimension of the layer's input (side `in`) or output along which the positions lie,
            negative; on the side `self`, a dimension of the tensor.
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
    """Slices of layers that are kept or removed together.

    Attributes:
        name: that of the first layer that makes the channels.
        channels: how many there are; they count from 0.
        members: the sides of layers that hold the channels.
    """

    name: str
    channels: int
    members: tuple[Member, ...]

    def side(self, side: Side) -> tuple[Member, ...]:
        """The members on one side of their layers."""
        return tuple(member for member in self.members if member.side == side)


@dataclass(frozen=True)
class WidthAttribute:
    """A module's attribute that its code views or splits channels by, and that follows their number.

    Attributes:
        module, attribute: where it is; an int, or a sequence of them.
        entries: which entries of a sequence hold the number; empty for an int.
        owned: by group, how many positions each channel contributes to the number, (channels,).
    """

    module: str
    attribute: str
    entries: tuple[int, ...]
    owned: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The attribute's full name, as `block1.width`."""
        return f"{self.module}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class LayerUse:
    """How often a forward pass of one example uses the weight of a layer.

    Attributes:
        uses: multiplications with each element; the layer costs `uses * weight.numel()` MACs.
        positions: output positions, at each of which a bias is added.
        bias: whether the layer has a bias, or gets one when the BatchNorm behind it is folded.
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
        ignored: the layers to leave unpruned, as asked, and those inside them.
        other_macs: MACs of products outside such layers (attention), for one example.
        inputs: the example inputs; whether folding changes nothing is checked on them.
        sizes: attributes of modules that follow the widths of the groups.
    """

    groups: dict[str, Group]
    skipped: dict[str, str]
    foldable: dict[str, str]
    uses: dict[str, LayerUse] = field(repr=False)
    ignored: frozenset[str] = frozenset()
    other_macs: float = 0.0
    inputs: Inputs = field(default=(), repr=False, compare=False)
    sizes: tuple[WidthAttribute, ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels of each group."""
        return {name: group.channels for name, group in self.groups.items()}
