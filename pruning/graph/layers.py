"""Layer knowledge, in one table: which tensors of a layer hold which of its channels."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

#: Of a layer, or `self` for a tensor that a model uses without a layer of the table around it.
Side = Literal["out", "in", "self"]


class DeformableConv(nn.Module, ABC):
    """torchvision's DeformConv2d and its subclasses, told without importing torchvision.

    Beside its input it takes offsets, and perhaps a mask: where and how much its kernel reads.
    """

    weight: Tensor
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]

    @classmethod
    def __subclasshook__(cls, subclass: type) -> bool:
        return any(
            base.__module__ == "torchvision.ops.deform_conv" and base.__name__ == "DeformConv2d"
            for base in subclass.__mro__
        )


@dataclass(frozen=True)
class Rule:
    """Where a type of layer keeps its channels.

    Attributes:
        out: tensors that hold output channels, with the dimension they lie along. A norm's
            channels go in and out at once; they count as output channels.
        into: tensors that hold input channels, likewise.
        out_count, in_count: the attributes that say how many there are.
        parts: the attribute that says into how many equal parts they are divided.
    """

    out: dict[str, int]
    into: dict[str, int]
    out_count: str
    in_count: str = ""
    parts: str = ""

    def width(self, layer: nn.Module, side: Side) -> int:
        """Channels on one side of a layer."""
        count = getattr(layer, self.out_count if side == "out" else self.in_count)
        return count[-1] if isinstance(count, tuple) else count


_CONV = Rule({"weight": 0, "bias": 0}, {"weight": 1}, "out_channels", "in_channels", "groups")

_TRANSPOSED = Rule({"weight": 1, "bias": 0}, {"weight": 0}, "out_channels", "in_channels", "groups")

_STATISTICS = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}

#: Convolutions and linear layers: a weight between channels that come in and channels that go out.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, DeformableConv)

#: Layers that make channels.
MAKERS = (*WEIGHTED, nn.Embedding, nn.EmbeddingBag)

#: Layers that read channels and keep their hidden size.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

#: The first row whose type fits is taken. A new layer type is a row of this table, here.
TABLE: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Rule], ...] = (
    (nn.modules.conv._ConvTransposeNd, _TRANSPOSED),
    ((nn.modules.conv._ConvNd, DeformableConv), _CONV),
    (nn.Linear, Rule({"weight": 0, "bias": 0}, {"weight": 1}, "out_features", "in_features")),
    (nn.modules.batchnorm._NormBase, Rule(_STATISTICS, {}, "num_features")),  # InstanceNorm too
    (nn.GroupNorm, Rule({"weight": 0, "bias": 0}, {}, "num_channels", parts="num_groups")),
    (nn.LayerNorm, Rule({"weight": -1, "bias": -1}, {}, "normalized_shape")),
    (nn.RMSNorm, Rule({"weight": -1}, {}, "normalized_shape")),
    (nn.PReLU, Rule({"weight": 0}, {}, "num_parameters")),
    ((nn.Embedding, nn.EmbeddingBag), Rule({"weight": 1}, {}, "embedding_dim")),
    (nn.RNNBase, Rule({}, {"weight_ih_l0": 1, "weight_ih_l0_reverse": 1}, "hidden_size", "input_size")),
    (nn.RNNCellBase, Rule({}, {"weight_ih": 1}, "hidden_size", "input_size")),
)


def count_deformable() -> None:
    """Let PyTorch's flop counter know torchvision's deformable convolution, where that is loaded.

    It counts as a convolution; reading between pixels counts nothing.
    """
    operation = getattr(torch.ops.torchvision, "deform_conv2d", None)
    if operation is not None and operation not in flop_registry:

        @register_flop_formula(operation)
        def flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
            return 2 * math.prod(out_shape) * math.prod(weight[1:])


def rule_for(layer: nn.Module) -> Rule | None:
    """The row of `TABLE` for a layer, or None where there is none."""
    return next((rule for types, rule in TABLE if isinstance(layer, types)), None)


def layer_width(layer: nn.Module, side: Side) -> int:
    """Channels on one side of a layer that has a row in the table."""
    rule = rule_for(layer)
    assert rule is not None, f"{type(layer).__name__} has no row in pruning.layers.TABLE"
    return rule.width(layer, side)


def channels_stand_alone(layer: nn.Module) -> bool:
    """Whether a layer in parts has one channel in each, as a depthwise convolution does.

    Then channels need not go in equal numbers from every part: the parts go with them.
    """
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups == layer.num_channels
    return is_depthwise(layer)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a convolution's or linear layer's input along which its channels lie, from the end."""
    return -1 - len(getattr(layer, "kernel_size", ()))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each channel is convolved alone, into one or several, so that they go in and out at once."""
    if not isinstance(layer, (nn.modules.conv._ConvNd, DeformableConv)):
        return False
    if not 1 < layer.groups == layer.in_channels:
        return False
    # The weight of a transposed one that makes several holds them along two dimensions.
    return not isinstance(layer, nn.modules.conv._ConvTransposeNd) or layer.out_channels == layer.groups


def holds_layers(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer holds others: the norm behind it, as in detectron2."""
    return isinstance(layer, WEIGHTED) and any(map(rule_for, layer.children()))


def readers(layer: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
    """The weights of a layer that input channels meet, each with the bias that is added to the product."""
    rule = rule_for(layer)
    assert rule is not None, f"{type(layer).__name__} has no row in pruning.layers.TABLE"
    own = dict(layer.named_parameters(recurse=False))
    return [(own[name], own.get(name.replace("weight", "bias"))) for name in rule.into if name in own]


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's own recurrent ones, which can be taken as a whole."""
    return isinstance(layer, RECURRENT) and type(layer).__module__ == nn.RNNBase.__module__


def parts(layer: nn.Module) -> int:
    """Into how many equal parts a layer divides its channels; each must lose as many."""
    rule = rule_for(layer)
    if rule is None or not rule.parts or channels_stand_alone(layer):
        return 1
    return getattr(layer, rule.parts)


def output_rows(layer: nn.Module, name: str, values: Tensor) -> Tensor:
    """A tensor of a layer by output channels: (output channels, elements of each).

    Args:
        name: of the tensor, one that the layer's row says to hold output channels.
        values: the tensor, or others of its shape, such as its gradient.
    """
    rule = rule_for(layer)
    assert rule is not None, f"{type(layer).__name__} has no row in pruning.layers.TABLE"
    dim = 0 if is_depthwise(layer) else rule.out[name] % values.ndim
    if dim == 1 and parts(layer) > 1:  # a transposed convolution: this dimension counts within one part
        values, dim = values.unflatten(0, (parts(layer), -1)).transpose(1, 2).flatten(0, 1), 0
    return values.movedim(dim, 0).reshape(values.shape[dim], -1)


def narrow(layer: nn.Module, side: Side, keep: Tensor) -> None:
    """Keep only some channels of one side of a layer, in place.

    Args:
        keep: positions to keep, sorted; for a layer in several parts, as many in each.
    """
    rule, depthwise, alone = rule_for(layer), is_depthwise(layer), channels_stand_alone(layer)
    assert rule is not None, f"{type(layer).__name__} has no row in pruning.layers.TABLE"
    size = rule.width(layer, side) // parts(layer)
    for name, dim in (rule.out if side == "out" else rule.into).items():
        tensor = getattr(layer, name, None)
        if tensor is None:
            continue
        index, dim = keep, 0 if depthwise else dim
        if name == "weight" and dim == 1 and parts(layer) > 1:
            index = keep[keep < size]  # this dimension counts channels within one part
        kept = _laid_out_as(tensor, tensor.detach().index_select(dim, index.to(tensor.device)))
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, nn.Parameter(kept, requires_grad=tensor.requires_grad))
        else:
            setattr(layer, name, kept)

    count = rule.out_count if side == "out" else rule.in_count
    old = getattr(layer, count)
    if depthwise:
        setattr(layer, rule.in_count, len(keep) * getattr(layer, rule.in_count) // old)
    setattr(layer, count, (*old[:-1], len(keep)) if isinstance(old, tuple) else len(keep))
    if alone:
        setattr(layer, rule.parts, getattr(layer, rule.in_count) if depthwise else len(keep))
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()  # on a GPU they lie in one piece


def _laid_out_as(tensor: Tensor, smaller: Tensor) -> Tensor:
    """A tensor with its channels last in memory where those of another one lie so."""
    for layout, ndim in {torch.channels_last: 4, torch.channels_last_3d: 5}.items():
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            return smaller.contiguous(memory_format=layout)
    return smaller
