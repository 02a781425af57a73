"""Parameters that several layers share: their channels are tied, so that they can be narrowed once."""

from __future__ import annotations

import numpy as np
from torch import nn

from pruning.graph.layers import is_depthwise, parts, rule_for
from pruning.graph.rule import Side
from pruning.tracing.labels import Flow
from pruning.utils.modules import parameter_places


def tie_shared(model: nn.Module, found: Flow) -> set[str]:
    """Tie the channels of layers that share a parameter, and return the names of these parameters.

    A dimension along which all layers have channels ties these, such as that of the features of an embedding
    and of the head that has its weight. Along another dimension (the tokens), channels are fixed.

    Args:
        model: the traced model. found: the record of its passes; ties and fixed labels are added.
    """
    handled: set[str] = set()
    made = [found.ties.find(use.labels) for (_, side), use in found.sides.items() if side == "out"]
    known = np.unique(np.concatenate([np.arange(0), *made]))
    for places in parameter_places(model).values():
        if len(places) < 2:
            continue
        dims = [_sides(model, found, name, attribute) for name, attribute in places]
        if not all(dims):
            continue
        names = [f"{name}.{attribute}".lstrip(".") for name, attribute in places]
        handled.update(names)
        for dim in sorted(set().union(*dims)):
            labels = [found.sides[held[dim]].labels for held in dims if dim in held]
            # A layer that reads the model's input keeps its input channels, and so do the others.
            given = any(not np.isin(found.ties.find(each), known).all() for each in labels)
            if given or len(labels) < len(dims):
                reason = (
                    f"{names[0]} is the same tensor as {names[1]}, and one of the two layers has a fixed "
                    "size along this dimension; untie them to let it be pruned"
                )
                found.fixed += [(each, reason) for each in labels]
            for other in labels[1:]:
                found.ties.union(labels[0], other)
    return handled


def _sides(model: nn.Module, found: Flow, name: str, attribute: str) -> dict[int, tuple[str, Side]]:
    """Return by dimension of a parameter the side of the layer whose channels lie along it.

    Nothing is returned for a layer whose sides do not have one channel for each position.
    """
    layer = model.get_submodule(name)
    rule = rule_for(layer)
    if rule is None or rule.kind == "recurrent" or is_depthwise(layer) or parts(layer) > 1:
        return {}
    tensor = layer.get_parameter(attribute)
    sides: dict[int, tuple[str, Side]] = {}
    held: tuple[tuple[Side, int | None], ...] = (
        ("out", rule.out.get(attribute)),
        ("in", rule.into.get(attribute)),
    )
    for side, dim in held:
        if dim is None:
            continue
        use = found.sides.get((name, side))
        if use is None or len(use.labels) != tensor.shape[dim]:
            return {}
        sides[dim % tensor.ndim] = name, side
    return sides
