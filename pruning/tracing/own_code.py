"""Layers with code of their own: whether they compute the same with a part of their inputs.

Code that looks at all inputs of a filter (its mean, its norm, its largest weight) does not. Such a layer is
found by running it alone, which takes a fraction of the time of comparing narrowed models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.graph.groups import Group, Member
from pruning.graph.layer_tensors import narrow
from pruning.graph.layers import is_weighted, layer_width, parts
from pruning.utils.compare import compare
from pruning.utils.held_weight import HeldWeight
from pruning.utils.modules import call, copied, hooked, submodule
from pruning.utils.tree import Inputs, fresh


def has_own_code(layer: nn.Module) -> bool:
    """Whether the code of a layer is not torch's own.

    >>> has_own_code(nn.Linear(3, 4))
    False
    """
    codes = (getattr(type(layer), name, type(layer)) for name in ("forward", "_conv_forward"))
    return any(getattr(code, "__module__", "").partition(".")[0] != "torch" for code in codes)


def inexact_readers(model: nn.Module, inputs: Inputs, groups: Mapping[str, Group]) -> dict[str, str]:
    """Return the groups with a reader that computes something else without a part of its inputs.

    Args:
        model: it is not changed. inputs: example inputs. groups: those to look at.

    Returns by group a description of the difference.
    """
    probe, found, handles = copied(model).eval(), dict[str, str](), list[RemovableHandle]()
    for name, group in groups.items():
        for member in group.side("in"):
            layer = submodule(probe, member.layer)
            if isinstance(layer, HeldWeight) or not is_weighted(layer) or not has_own_code(layer):
                continue
            hook = partial(_try, found=found, name=name, member=member, drop=_half(layer, group, member))
            handles.append(layer.register_forward_pre_hook(hook))
            _fill_zeros(layer)
    if handles:
        with hooked(handles), torch.no_grad():
            call(probe, fresh(inputs))
    return found


def _fill_zeros(layer: nn.Module) -> None:
    """Fill parameters that are 0 with noise: with a gain of 0, all weights would give the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _half(layer: nn.Module, group: Group, member: Member) -> Tensor:
    """Return every other channel's positions; a layer in parts loses the same number in each."""
    drop = member.positions(torch.arange(0, group.channels, 2))
    each = layer_width(layer, "in") // parts(layer)
    counts = torch.bincount(drop // each, minlength=parts(layer))
    return drop if (counts == counts[0]).all() and counts[0] < each else drop[:0]


def _try(
    layer: nn.Module, args: tuple[object, ...], found: dict[str, str], name: str, member: Member, drop: Tensor
) -> None:
    """Compare a layer that reads zeros with one that has no such inputs."""
    if name in found or not len(drop) or len(args) != 1 or not isinstance(x := args[0], Tensor):
        return
    try:
        smaller = copy.deepcopy(layer)
        smaller._forward_pre_hooks.clear()
        keep = torch.ones(layer_width(layer, "in"), dtype=torch.bool)
        keep[drop] = False
        narrow(smaller, "in", keep.nonzero().flatten())
        masked = layer.forward(x.index_fill(member.dim, drop.to(x.device), 0))
        kept = smaller(x.index_select(member.dim, keep.nonzero().flatten().to(x.device)))
    except Exception:  # of foreign code: the comparison of whole models tells
        return
    if isinstance(masked, Tensor) and isinstance(kept, Tensor) and masked.shape == kept.shape:
        found.update({name: problem} if (problem := compare([masked], [kept])[0]) else {})
