"""Read and narrow the tensors of a layer by channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.graph.computed import computed_value, is_computed, set_computed
from pruning.graph.layers import channels_stand_alone, is_depthwise, is_weighted, parts, rule_of, weight_of
from pruning.graph.recurrent import gate_tensors, gates, is_recurrent, narrow_hidden
from pruning.graph.rule import Side


class Reader(NamedTuple):
    """A weight that the input channels of a layer are multiplied with.

    Attributes:
        weight: the weight.
        bias: the bias that is added to the product, (output channels,), if there is one.
        out_dim, in_dim: the dimensions of the weight along which output and input channels lie.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    out_dim: int
    in_dim: int


def readers(layer: nn.Module) -> list[Reader]:
    """Return the weights of a layer that its input channels are multiplied with."""
    rule, found = rule_of(layer), []
    own = dict(layer.named_parameters(recurse=False))
    for name, dim in rule.into.items():
        if name in own and rule.kind == "recurrent":  # the rows are the gates
            found.append(Reader(own[name], own.get(name.replace("weight", "bias")), 0, dim))
        elif name in own and name in rule.out:
            found.append(Reader(own[name], own.get(rule.bias), rule.out[name], dim))
    return found


def weight_size(layer: nn.Module) -> int:
    """Return the number of elements of the weights that have input and output channels.

    >>> weight_size(nn.Conv2d(3, 8, 5))
    600
    """
    rule = rule_of(layer)
    weights = (getattr(layer, name, None) for name in rule.out if name in rule.into)
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor))


def output_tensors(layer: nn.Module) -> list[str]:
    """Return the names of the tensors of a layer that hold its output channels, weights first."""
    return gate_tensors(layer) if is_recurrent(layer) else list(rule_of(layer).out)


def output_weights(layer: nn.Module) -> list[str]:
    """Return the names of the weights of a layer that make its output channels."""
    if is_recurrent(layer):
        return [name for name in gate_tensors(layer) if name.startswith("weight")]
    return [rule_of(layer).weight]


def output_rows(layer: nn.Module, name: str, values: Tensor) -> Tensor:
    """Return a tensor of a layer as a matrix with one row for each output channel.

    Args:
        layer: a layer that has a rule.
        name: name of a tensor that holds output channels according to the rule.
        values: the tensor, or another of its shape, such as its gradient.

    Returns a tensor (output channels, elements of each).

    >>> output_rows(nn.Conv2d(3, 8, 5), "weight", torch.zeros(8, 3, 5, 5)).shape
    torch.Size([8, 75])
    """
    if is_recurrent(layer):  # rows are gates × hidden units
        return values.unflatten(0, (gates(layer), -1)).transpose(0, 1).flatten(1)
    values = rule_of(layer).merged(values)
    dim = 0 if is_depthwise(layer) else rule_of(layer).out[name] % values.ndim
    if dim == 1 and parts(layer) > 1:  # a transposed convolution: this dimension counts within one part
        values, dim = values.unflatten(0, (parts(layer), -1)).transpose(1, 2).flatten(0, 1), 0
    return values.movedim(dim, 0).reshape(values.shape[dim], -1)


def scale_rows(layer: nn.Module, name: str, values: Tensor, factors: Tensor) -> None:
    """Multiply the rows of a tensor of a layer, as `output_rows` returns them, by factors, in place.

    Args:
        layer, name, values: see `output_rows`.
        factors: (output channels,).

    >>> weight = torch.ones(2, 3)
    >>> scale_rows(nn.Linear(3, 2), "weight", weight, torch.tensor([0.0, 2.0]))
    >>> weight
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """
    if is_recurrent(layer):
        values, dim = values.unflatten(0, (gates(layer), -1)), 1
    else:
        values = rule_of(layer).merged(values)
        dim = 0 if is_depthwise(layer) else rule_of(layer).out[name] % values.ndim
    if dim == 1 and not is_recurrent(layer) and parts(layer) > 1:
        values, factors = values.unflatten(0, (parts(layer), -1)), factors.view(parts(layer), 1, -1)
        values.mul_(factors.reshape(*factors.shape, *[1] * (values.ndim - 3)))
        return
    values.mul_(factors.view(-1, *[1] * (values.ndim - dim - 1)))


def masks(layer: nn.Module) -> list[str]:
    """Return the buffers of a convolution or linear layer that have the shape of its weight.

    Code of a subclass multiplies the weight by such a buffer: the mask of a causal convolution.

    >>> layer = nn.Linear(4, 6)
    >>> layer.register_buffer("mask", torch.ones(6, 4))
    >>> masks(layer)
    ['mask']
    """
    weight = weight_of(layer)
    if not is_weighted(layer) or not isinstance(weight, Tensor) or weight.ndim < 2:
        return []
    return [name for name, buffer in layer.named_buffers(recurse=False) if buffer.shape == weight.shape]


def narrow(layer: nn.Module, side: Side, keep: Tensor) -> None:
    """Keep only the given channels of one side of a layer, in place.

    Args:
        layer: a layer that has a rule.
        side: `out` or `in`.
        keep: positions to keep, sorted; for a layer in several parts, the same number in each part.

    >>> layer = nn.Linear(4, 6)
    >>> narrow(layer, "out", torch.tensor([0, 2, 5]))
    >>> layer
    Linear(in_features=4, out_features=3, bias=True)
    """
    if side == "out" and is_recurrent(layer):
        narrow_hidden(layer, keep)
        return
    rule, depthwise, alone = rule_of(layer), is_depthwise(layer), channels_stand_alone(layer)
    size = rule.width(layer, side) // parts(layer)
    held = rule.out if side == "out" else rule.into
    like_weight = masks(layer) if rule.weight in held else []
    for name, dim in (*held.items(), *((name, held[rule.weight]) for name in like_weight)):
        # In training mode, an access may change a computed weight.
        tensor = computed_value(layer, name) if is_computed(layer, name) else getattr(layer, name, None)
        if tensor is None:
            continue
        index, dim = keep, 0 if depthwise else dim
        if (name == rule.weight or name in like_weight) and dim == 1 and parts(layer) > 1:
            index = keep[keep < size]  # this dimension counts channels within one part
        kept = _laid_out_as(tensor, rule.selected(tensor.detach(), dim, index))
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, nn.Parameter(kept, requires_grad=tensor.requires_grad))
        elif is_computed(layer, name):
            with torch.no_grad():
                set_computed(layer, name, kept)
        else:
            setattr(layer, name, kept)

    if count := rule.count(side):
        old = getattr(layer, count)
        if depthwise:
            setattr(layer, rule.in_count, len(keep) * getattr(layer, rule.in_count) // old)
        setattr(layer, count, (*old[:-1], len(keep)) if isinstance(old, tuple) else len(keep))
    if alone:
        setattr(layer, rule.parts, getattr(layer, rule.in_count) if depthwise else len(keep))
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()  # cuDNN needs the weights in one contiguous block


def ignore_channels(layer: nn.Module, side: Side, drop: Tensor) -> None:
    """Let a layer ignore channels of one side, in place: its weights for them are 0.

    Args:
        layer: a layer that has a rule. side: `in`, or `out`. drop: positions, sorted, as `narrow` takes them.

    >>> layer = nn.Linear(4, 6)
    >>> ignore_channels(layer, "in", torch.tensor([1]))
    >>> layer.weight[:, 1].abs().sum().item()
    0.0
    """
    rule = rule_of(layer)
    size = rule.width(layer, side) // parts(layer)
    for name, dim in (rule.out if side == "out" else rule.into).items():
        tensor = computed_value(layer, name) if is_computed(layer, name) else getattr(layer, name, None)
        if tensor is None:
            continue
        within = name == rule.weight and dim == 1 and parts(layer) > 1  # counts channels within one part
        index = (drop[drop < size] if within else drop).to(tensor.device)
        with torch.no_grad():
            if is_computed(layer, name):
                set_computed(layer, name, tensor.index_fill(dim, index, 0))
            else:
                rule.merged(tensor).index_fill_(dim, index, 0)


def _laid_out_as(tensor: Tensor, smaller: Tensor) -> Tensor:
    """Return the smaller tensor in the memory format (contiguous or channels last) of the other."""
    for layout, ndim in {torch.channels_last: 4, torch.channels_last_3d: 5}.items():
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            return smaller.contiguous(memory_format=layout)
    return smaller
