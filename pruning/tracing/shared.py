"""Parameters that several layers share, such as those of an embedding and of the output layer behind it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from pruning.graph.groups import Group
from pruning.graph.layers import rule_for


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Return the parameters that layers share: each full name, with the other names.

    A layer that has two names is one layer; its first name counts.
    """
    holders: dict[int, list[str]] = {}
    for layer, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(f"{layer}.{own}" if layer else own)
    return {
        name: [other for other in names if other != name]
        for names in holders.values()
        for name in (names if len(names) > 1 else ())
    }


def loses_alike(model: nn.Module, group: Group, names: Iterable[str]) -> bool:
    """Whether all layers that share a parameter lose the same elements of it with each channel of a group.

    Args:
        names: the full names of the parameter.
    """
    held = [_owners(model, group, name) for name in names]
    return all(owners == held[0] for owners in held)


def _owners(model: nn.Module, group: Group, name: str) -> dict[int, list[tuple[int, int]]]:
    """Return, by dimension of a parameter, its positions and the channels of the group that own them."""
    layer, _, own = name.rpartition(".")
    parameter = model.get_parameter(name)
    rule = rule_for(model.get_submodule(layer))
    found: dict[int, list[tuple[int, int]]] = {}
    for member in group.members:
        if (member.layer, member.side) == (name, "self"):
            dim: int | None = member.dim
        elif member.layer == layer and member.side != "self" and rule is not None:
            dim = (rule.out if member.side == "out" else rule.into).get(own)
        else:
            dim = None
        if dim is not None:
            pairs = np.stack([member.index.numpy(), member.channel.numpy()], 1).tolist()
            found.setdefault(dim % parameter.ndim, []).extend(sorted(map(tuple, pairs)))
    return found
