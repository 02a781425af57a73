"""Scales of products that the code computes from a width, as 1/√d in attention: where to make up for them.

Where the code divides q·kᵀ by a power of the width of q, as `F.scaled_dot_product_attention` does, the scale
grows as q and k lose channels. The pruned model keeps the scale of the dense model if q is multiplied by the
ratio of the scales, in the layer that makes it. Whether the code does so is found by comparing outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pruning.graph.groups import Group, Member, Reduction, Rescale
from pruning.graph.layers import makes_channels, rule_for
from pruning.graph.rule import Side
from pruning.tracing.grouping import positions_by_group
from pruning.tracing.record import Flow
from pruning.tracing.ties import is_among
from pruning.utils.modules import submodule

#: Powers of the width that scales of products are tried for.
POWERS = (0.5, 1.0)


def rescaling_choices(
    model: nn.Module, found: Flow, groups: Mapping[str, Group], labels: Mapping[str, np.ndarray]
) -> dict[str, list[tuple[Rescale, ...]]]:
    """Return, by group that a product sums over, the ways in which the scale may be made up for.

    A norm of one of the operands removes a factor from what it normalizes, so its own scales are another
    place for the factor.
    """
    choices: dict[str, list[tuple[Rescale, ...]]] = {}
    for name, group in groups.items():
        summed = [reduction for reduction in group.reductions if reduction.place in found.left]
        if not summed:
            continue
        by_place = []
        for reduction in summed:
            sets = found.channels(found.reductions[reduction.place].labels)
            counted = positions_by_group(sets, labels)
            by_place.append((counted, _places(model, found, group, reduction)))
        most = max(len(places) for _, places in by_place)
        choices[name] = [
            tuple(
                Rescale(*place, counted, power)
                for counted, places in by_place
                if places
                for place in places[min(i, len(places) - 1)]
            )
            for power in POWERS
            for i in range(most)
        ]
    return choices


#: A layer or a tensor outside the layers, its side, positions, and the dimension along which they lie.
_Place = tuple[str, Side, Tensor, int]


def _places(model: nn.Module, found: Flow, group: Group, product: Reduction) -> list[list[_Place]]:
    """Return what may be multiplied together: a layer, with biases outside it, or a norm behind it."""
    left = found.left[product.place]
    added = [own[is_among(made, left)] for own, made in found.biases]
    left = np.unique(np.concatenate([left, *added]))
    makers: list[_Place] = []
    biases: list[_Place] = []
    for (name, side), use in found.sides.items():
        if side == "out" and makes_channels(submodule(model, name)):
            index = np.flatnonzero(is_among(use.labels, left))
            if len(index):
                makers.append((name, side, torch.from_numpy(index), 0))
        elif side == "self" and use.labels.ndim == 1 and (held := is_among(use.labels, left)).any():
            biases.append((name, side, torch.from_numpy(np.flatnonzero(held)), 0))
    norms: list[_Place] = [
        (member.layer, member.side, member.index.unique(), member.dim)
        for member in group.members
        if _is_scale(model, found, member, product.module, left)
    ]
    return [*([maker, *biases] for maker in makers[-1:]), *([norm] for norm in norms)]


def _is_scale(model: nn.Module, found: Flow, member: Member, module: str, left: np.ndarray) -> bool:
    """Whether a member may scale the left operand of a product: a norm of it, or a tensor beside it.

    Args:
        module: whose code multiplies. left: the labels of the operand.
    """
    if member.side == "self":
        if member.dim == found.sides[member.layer, "self"].labels.ndim:
            return False  # its elements are positions
        return f"{member.layer}.".startswith(f"{module}." if module else "")
    rule = rule_for(submodule(model, member.layer)) if member.side == "out" else None
    if rule is None or rule.kind != "norm":
        return False
    return bool(is_among(found.sides[member.layer, member.side].labels, left).any())
