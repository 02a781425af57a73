"""Channel groups: the slices of layers that must be removed together, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pruning.graph.rule import Rule, Side
from pruning.utils.batch import Batch
from pruning.utils.entries import Entry
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs

#: A layer to leave unpruned: a name or pattern (`features.*`), a type, or the module itself.
Ignored = str | type[nn.Module] | nn.Module

Value = TypeVar("Value")

#: Values for some groups: by name or pattern (`layer4.*`), or by a module that makes their channels.
ByGroup: TypeAlias = Mapping[str, Value] | Mapping[nn.Module, Value] | Mapping[str | nn.Module, Value]

#: Products of activations, which sum over channels of both operands.
PRODUCTS = frozenset(("bmm", "baddbmm", "mm"))


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group.

    Attributes:
        layer: the name of the layer. On the side `self`, the full name of a parameter or buffer that the
            model uses outside the layers of `pruning.graph.layers.TABLE`.
        side: `out` or `in` for the layer's output or input channels, `self` for such a tensor.
        index: positions along that side of the layer, (positions,).
        channel: the channel of the group that owns each of these positions, (positions,). After a
            flatten, one channel owns several positions.
        dim: the dimension of the layer's input (side `in`) or output along which the positions lie,
            negative; on the side `self`, a dimension of the tensor, or their number if the positions are its
            elements, because channels lie along several dimensions.
        scored: whether the weights at each position count for the first-order change of the loss when the
            channel is removed, (positions,); None if all do. Without a head, only the term of its values
            is missing, and without a position of queries and keys, one product that both are factors of.
    """

    layer: str
    side: Side
    index: Tensor
    channel: Tensor
    dim: int
    scored: Tensor | None = field(default=None, compare=False)

    def positions(self, channels: Tensor) -> Tensor:
        """The positions along this side that the given channels of the group own, sorted."""
        return self.index[torch.isin(self.channel, channels)].sort().values


@dataclass(frozen=True)
class Reduction:
    """An operator that computes a statistic over channels, such as the mean square in an RMSNorm.

    Attributes:
        module: name of the module whose code calls the operator. operator: its name.
        call: the number of this call, among those of this operator by this module, from 0.
        index, channel, dim: the positions along the operand's dimension `dim`, as in `Member`.
    """

    module: str
    operator: str
    call: int
    index: Tensor
    channel: Tensor
    dim: int

    @property
    def place(self) -> tuple[str, str, int]:
        """The module, the operator and the number of the call."""
        return self.module, self.operator, self.call


@dataclass(frozen=True)
class Group:
    """Slices of layers that are kept or removed together.

    Attributes:
        name: the name of the first layer that makes the channels.
        channels: the number of channels, which are numbered from 0.
        members: the sides of layers that hold the channels.
        reductions: statistics over these channels, which after pruning are those of the kept channels.
        multiple: an operator of the model's code takes only widths that are multiples of this number.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    reductions: tuple[Reduction, ...] = ()
    multiple: int = 1

    def side(self, side: Side) -> tuple[Member, ...]:
        """The members on one side of their layers."""
        return tuple(member for member in self.members if member.side == side)

    @property
    def is_summed(self) -> bool:
        """Whether products of activations sum over the channels, as q·kᵀ does."""
        return any(reduction.operator in PRODUCTS for reduction in self.reductions)

    def dropped(self, kept: Iterable[int]) -> Tensor:
        """Whether each channel is none of those that are kept, (channels,)."""
        dropped = torch.ones(self.channels, dtype=torch.bool)
        dropped[list(kept)] = False
        return dropped


@dataclass(frozen=True)
class Positions:
    """Positions along a dimension that channels of groups own; a position may have owners in several.

    Attributes:
        size: the number of positions, those without a channel included.
        owners: by group, positions and the channels that own them, (positions,) each.
    """

    size: int
    owners: Mapping[str, tuple[Tensor, Tensor]]

    def dropped(self, dropped: Mapping[str, Tensor]) -> Tensor:
        """Return the positions that are removed, sorted.

        Args:
            dropped: by group, whether each channel is removed, (channels,).

        >>> heads = torch.arange(6), torch.arange(6) // 3
        >>> Positions(6, {"heads": heads}).dropped({"heads": torch.tensor([True, False])})
        tensor([0, 1, 2])
        """
        removed = [
            index[dropped[group][channel]]
            for group, (index, channel) in self.owners.items()
            if group in dropped
        ]
        return torch.cat([torch.zeros(0, dtype=torch.long), *removed]).unique()


@dataclass(frozen=True)
class ProductUse:
    """A product of two activations, such as q·kᵀ in attention.

    Attributes:
        macs: multiply-adds for one example, of all channels. rows: positions in the batch and the rows of
            the product. columns: positions that it sums over, and those in its columns.
    """

    macs: float
    rows: Positions
    columns: Positions


@dataclass(frozen=True)
class Rescale:
    """A factor that makes up for a scale which the code computes from a width, as 1/√d in attention.

    Attributes:
        layer, side: a layer (side `out`) whose outputs are multiplied, or a tensor (side `self`).
        index: the positions of its outputs, (positions,). dim: of a tensor, the dimension of the positions.
        summed: the positions from whose number the code computes the scale.
        power: the factor is the share of these that is kept, to this power.
    """

    layer: str
    side: Side
    index: Tensor
    dim: int
    summed: Positions
    power: float


@dataclass(frozen=True)
class WidthAttribute:
    """An attribute of a module that holds a number of channels, which its code uses in a view or split.

    Attributes:
        module: name of the module. attribute: name of the attribute, an int or a sequence of ints.
        entries: indices of the entries of a sequence that hold the number; empty for an int.
        counted: the positions that the number counts.
    """

    module: str
    attribute: str
    entries: tuple[int, ...]
    counted: Positions

    @property
    def name(self) -> str:
        """The attribute's full name, as `block1.width`."""
        return f"{self.module}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class HeldWidth:
    """An attribute of a module that equals a width, and may be one.

    Attributes:
        attribute: the attribute, and the channels that it may count.
        value: the number that it holds.
        owner: what has this width: the name of a layer, or a group.
    """

    attribute: WidthAttribute
    value: int
    owner: str

    @property
    def place(self) -> tuple[str, str]:
        """The module and the name of the attribute."""
        return self.attribute.module, self.attribute.attribute

    @property
    def groups(self) -> Set[str]:
        """The groups whose channels the attribute may count."""
        return self.attribute.counted.owners.keys()

    def __str__(self) -> str:
        return (
            f"{self.attribute.name} = {self.value} was the width of {self.owner} and is not read in the "
            "traced passes; if other code needs it, name a call of that code by also=, or ignore the layer"
        )


@dataclass(frozen=True)
class LayerUse:
    """How often a forward pass of one example uses the weight and the bias of a layer.

    Attributes:
        uses: multiplications by each weight element; the layer costs `uses * weight.numel()` MACs.
        positions: number of output positions, at each of which the bias is added.
        bias: whether the layer has a bias, or gets one when the BatchNorm behind it is folded.
    """

    uses: float
    positions: float
    bias: bool = False


@dataclass(frozen=True)
class Trace:
    """The result of tracing a model.

    Attributes:
        groups: the prunable groups, by the name of their first layer.
        skipped: layers whose outputs cannot be pruned, with the reason and the cure.
        foldable: BatchNorm layers that can be folded into the layer before: layer name to norm name.
        uses: how often each convolution and linear layer is used.
        ignored: names of the layers that the caller ignores, and of the layers inside them.
        other_macs: MACs of products outside such layers that do not depend on the groups, for one example.
        inputs: the example inputs, on which folding and surgery are checked.
        sizes: attributes of modules to update with the widths of the groups.
        batch: the batch of the example inputs.
        outputs: which outputs of the model count; the others may change their size.
        also: other ways to call the model, which were traced with it.
        inferred: rules of types of modules that multiply by a weight of their own.
        products: products of activations whose MACs depend on the groups.
        rescales: factors that keep scales which the code computes from widths.
        stale: attributes that equal a width and that the traced passes do not read. Pruning leaves them.
        foreign: modules whose code calls operators of other libraries than torch.

    >>> import torch
    >>> from pruning import trace
    >>> traced = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(1, 3))
    >>> traced.widths, list(traced.skipped)
    ({'0': 4}, ['1'])
    """

    groups: dict[str, Group]
    skipped: dict[str, str]
    foldable: dict[str, str]
    uses: dict[str, LayerUse] = field(repr=False)
    ignored: frozenset[str] = frozenset()
    other_macs: float = 0.0
    inputs: Inputs = field(default=(), repr=False, compare=False)
    sizes: tuple[WidthAttribute, ...] = ()
    batch: Batch = field(default_factory=Batch, compare=False)
    outputs: Outputs = field(default=None, repr=False, compare=False)
    also: tuple[Entry, ...] = field(default=(), repr=False, compare=False)
    inferred: Mapping[type[nn.Module], Rule] = field(default_factory=dict, repr=False, compare=False)
    products: tuple[ProductUse, ...] = field(default=(), repr=False)
    rescales: tuple[Rescale, ...] = field(default=(), repr=False)
    stale: tuple[HeldWidth, ...] = field(default=(), repr=False, compare=False)
    foreign: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels of each group."""
        return {name: group.channels for name, group in self.groups.items()}
