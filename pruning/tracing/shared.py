"""Parameters that several layers share, such as those of an embedding and of the output layer behind it.

The channels of such layers are tied. A group is then narrowed only if all layers lose the same elements.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from pruning.graph.groups import Group
from pruning.graph.layers import is_depthwise, is_of_layer, parts, rule_for
from pruning.graph.rule import Side
from pruning.tracing.record import Flow
from pruning.tracing.ties import is_among
from pruning.utils.modules import parameter_places, submodule


def shared_parameters(model: nn.Module, found: Flow) -> dict[str, list[str]]:
    """Return the parameters that layers share: each full name, with the other names.

    A layer that has two names is one layer; its first name counts.
    """
    several = [_names(places) for places in _places(model, found) if len(places) > 1]
    return {name: [other for other in names if other != name] for names in several for name in names}


def _places(model: nn.Module, found: Flow) -> list[list[tuple[str, str]]]:
    """Return for each parameter the layers that hold it, each with the name of the attribute.

    A parameter that code multiplies by is a layer of its own (`HeldWeight`), beside a layer that holds it.
    """
    several = []
    for places in parameter_places(model).values():
        layers: list[tuple[str, str]] = []
        for place in places:
            name = ".".join(filter(None, place))
            held = (name, "in") in found.sides
            runs = (place[0], "in") in found.sides or (place[0], "out") in found.sides
            if not held or (runs and is_of_layer(submodule(model, place[0]), place[1])):
                layers.append(place)
            if held:
                layers.append((name, "weight"))
        several.append(layers)
    return several


def _names(places: Iterable[tuple[str, str]]) -> list[str]:
    """Return the full names of a parameter."""
    return [f"{layer}.{own}" if layer else own for layer, own in places]


def tie_shared(model: nn.Module, found: Flow) -> None:
    """Tie the channels of layers that share a parameter.

    A dimension along which all layers have channels ties these, such as that of the features of an embedding
    and of the head that has its weight. Along another dimension (the tokens), channels are fixed.

    Args:
        model: the traced model. found: the record of its passes; ties and fixed labels are added.
    """
    _label_unreached(model, found)
    made = [found.ties.find(use.labels) for (_, side), use in found.sides.items() if side == "out"]
    known = np.unique(np.concatenate([np.arange(0), *made]))
    for places in _places(model, found):
        if len(places) < 2:
            continue
        dims = [_sides(model, found, name, attribute) for name, attribute in places]
        if not all(dims):
            continue
        names = _names(places)
        for dim in sorted(set().union(*dims)):
            labels = [found.sides[held[dim]].labels for held in dims if dim in held]
            # A layer that reads the model's input keeps its input channels, and so do the others.
            given = any(not is_among(found.ties.find(each), known).all() for each in labels)
            if given or len(labels) < len(dims):
                reason = (
                    f"{names[0]} is the same tensor as {names[1]}, and one of the two layers has a fixed "
                    "size along this dimension; untie them to let it be pruned"
                )
                found.fixed += [(each, reason) for each in labels]
            for other in labels[1:]:
                found.ties.union(labels[0], other)


def _label_unreached(model: nn.Module, found: Flow) -> None:
    """Give layers that no call reaches the labels of a layer whose parameter they share.

    In encoder-decoder models of transformers, the embeddings of both share the weight of a third that does
    not run.
    """
    for places in _places(model, found):
        dims = {place: _sides(model, found, *place) for place in places}
        known = next((held for held in dims.values() if held), None)
        for name, attribute in places if known else ():
            layer = submodule(model, name)
            rule = rule_for(layer)
            if rule is None or {(name, "out"), (name, "in")} & found.sides.keys():
                continue
            tensor = layer.get_parameter(attribute)
            held: tuple[tuple[Side, int | None], ...] = (
                ("out", rule.out.get(attribute)),
                ("in", rule.into.get(attribute)),
            )
            for side, dim in held:
                if known is not None and dim is not None and dim % tensor.ndim in known:
                    found.sides[name, side] = found.sides[known[dim % tensor.ndim]]


def _sides(model: nn.Module, found: Flow, name: str, attribute: str) -> dict[int, tuple[str, Side]]:
    """Return by dimension of a parameter the side of the layer whose channels lie along it.

    Nothing is returned for a layer whose sides do not have one channel for each position.
    """
    layer = submodule(model, name)
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
    holder = submodule(model, layer)
    parameter, rule = holder.get_parameter(own), rule_for(holder)
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
            found.setdefault(dim % parameter.ndim if dim < parameter.ndim else dim, []).extend(
                sorted(map(tuple, pairs))
            )
    return found


def frozen_reason(model: nn.Module, name: str, shown: str) -> str:
    """Return why a frozen parameter is not pruned; one of an average names the module that it averages.

    Args:
        name: the full name of the parameter. shown: the name to show.
    """
    twin = trainable_twin(model, name)
    if not twin:
        return f"{shown} is frozen; set requires_grad=True to let it be pruned"
    return (
        f"{shown} is frozen and has the form of {twin}, as an average of it has; if code updates it from "
        f"{twin}, put a deepcopy of the pruned {twin} in its place. Otherwise set requires_grad=True to let "
        "it be pruned"
    )


def trainable_twin(model: nn.Module, name: str) -> str:
    """Return the module beside that of a frozen parameter that has the same form and trains, or "".

    In self-supervised networks (BYOL, MoCo) the frozen one is an average of the other, which code updates.

    >>> pair = nn.ModuleDict({"online": nn.Linear(2, 3), "target": nn.Linear(2, 3).requires_grad_(False)})
    >>> trainable_twin(pair, "target.weight")
    'online'
    """
    parts_of_name = name.split(".")
    for depth in range(1, len(parts_of_name)):
        parent, own = submodule(model, ".".join(parts_of_name[: depth - 1])), parts_of_name[depth - 1]
        form = _form(parent._modules[own]) if own in parent._modules else None
        for other, sibling in parent._modules.items() if form else ():
            trains = sibling is not None and any(p.requires_grad for p in sibling.parameters())
            if other != own and trains and _form(sibling) == form:
                return ".".join([*parts_of_name[: depth - 1], other])
    return ""


def _form(module: nn.Module | None) -> dict[str, tuple[int, ...]]:
    return {} if module is None else {name: tuple(p.shape) for name, p in module.named_parameters()}
