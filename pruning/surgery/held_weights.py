"""Narrow parameters that code multiplies by outside of the layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from pruning.graph.layers import is_of_layer, rule_for
from pruning.graph.rule import Side
from pruning.utils.held_weight import HeldWeight
from pruning.utils.modules import submodule


def narrows_with_layer(name: str, held: HeldWeight, sides: Iterable[tuple[str, Side]]) -> bool:
    """Whether a parameter that code multiplies by is narrowed with a layer that runs, as a tied weight is.

    Args:
        name: the full name of the parameter. held: the parameter as a layer.
        sides: the sides of all layers that belong to groups.
    """
    owner = name.rpartition(".")[0]
    return is_of_layer(held.owner, held.attribute) and any(layer == owner for layer, _ in sides)


def set_counts(layer: nn.Module) -> None:
    """Let the counts of a linear layer or convolution be those of its weight, in place.

    >>> layer = nn.Linear(4, 6)
    >>> layer.weight = nn.Parameter(layer.weight[:2])
    >>> set_counts(layer)
    >>> layer
    Linear(in_features=4, out_features=2, bias=True)
    """
    rule = rule_for(layer)
    weight = None if rule is None else getattr(layer, rule.weight, None)
    if rule is None or rule.kind != "weighted" or not isinstance(weight, Tensor):
        return
    for count, held in ((rule.out_count, rule.out), (rule.in_count, rule.into)):
        if count:
            setattr(layer, count, weight.shape[held[rule.weight]])


def set_parametrized_counts(model: nn.Module, names: Iterable[str]) -> None:
    """Let the counts of layers follow the parameters of their parametrizations, once all are narrowed.

    Args:
        model: changed in place. names: parameters and layers that were narrowed.
    """
    owners = (f".{name}".partition(".parametrizations.")[::2] for name in names)
    for layer in {owner[1:] for owner, inside in owners if inside}:
        set_counts(submodule(model, layer))
