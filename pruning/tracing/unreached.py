"""Layers and parameters that the traced passes did not reach, or not as layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from pruning.graph.computed import sources
from pruning.graph.groups import Group, Member
from pruning.graph.layers import layer_width, makes_channels, rule_for, rule_of
from pruning.graph.recurrent import RECURRENT, is_recurrent
from pruning.tracing.record import Flow, SideUse
from pruning.tracing.tables import MOST_ELEMENTS
from pruning.utils.modules import submodule

_OTHER_CODE = (
    "its own code uses its weight differently from its type; use a layer of torch to let it be pruned"
)

_OWN_RECURRENT = "it is a recurrent layer with code of its own; use torch's own type to let it be pruned"

_NOT_RUN = (
    "it does not run on the example inputs, and would not fit if channels that it reads were pruned. "
    "Give inputs that reach it, or ignore the layers before it"
)

#: Modules that only hold others.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def missed(model: nn.Module, found: Flow) -> Iterator[tuple[str, str]]:
    """Yield layers whose channels the pass did not label, each with the reason."""
    shown = {name for name, _ in found.sides} | found.read_elsewhere
    holders = {name.rpartition(".")[0] for name, side in found.sides if side == "self"}
    for name, layer in model.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, RECURRENT) and not is_recurrent(layer):
            yield name, _OWN_RECURRENT
            continue
        if not own or name in shown or not makes_channels(layer):
            continue
        weight = rule_of(layer).weight
        if (f"{name}.{weight}", "out") in found.sides or any(map(shown.__contains__, _sources(name, layer))):
            continue  # its weight is a layer of its own
        if weight and weight not in own:
            yield (
                name,
                "its weight is computed from others, by code or hooks; remove them, prune, and add them "
                "again",
            )
        elif rule_of(layer).kind == "weighted" and (f"{name}.{weight}", "self") in found.sides:
            yield name, _OTHER_CODE
        elif name not in holders:
            inside = any(f"{name}.{child}" in shown for child, _ in layer.named_children())
            yield name, _OTHER_CODE if inside else _NOT_RUN
    parameters = {name for name, _ in model.named_parameters()}
    for name, why in found.functional.items():
        if (name, "in") in found.sides or name not in parameters:
            continue
        owner, _, attribute = name.rpartition(".")
        rule = rule_for(submodule(model, owner))
        if (owner, "out") not in found.sides or rule is None or attribute not in rule.into:
            yield name, why


def _sources(name: str, layer: nn.Module) -> list[str]:
    """Return the full names of the parameters from which a layer computes its weight."""
    return [f"{name}.{key}".lstrip(".") for key in sources(layer, rule_of(layer).weight)]


def adopt_unreached(model: nn.Module, found: Flow) -> None:
    """Let parameters that no pass reached, such as the token of a mask, go with the channels beside them.

    The channels are the only ones of this size that the code of the module sees: in its other parameters, in
    its layers, and in what its modules put out. If there are several, nothing is done. A parameter whose
    shape ends with that of another one, with channels along several dimensions, has the same channels.
    """
    beside: dict[str, list[np.ndarray]] = {}
    for (name, side), use in found.sides.items():
        several = [use.labels]
        if side == "self":
            several = [
                np.moveaxis(use.labels, d, 0).reshape(size, -1)[:, 0]
                for d, size in enumerate(use.labels.shape)
            ]
        beside.setdefault(_scope(model, name), []).extend(several)
    for name, several in found.seen.items():
        if name:
            beside.setdefault(_scope(model, name), []).extend(several)
    for name, owner, _ in _unreached_tensors(model, found):
        if name == owner:
            continue
        shape = submodule(model, owner).get_parameter(name.rpartition(".")[2]).shape
        fitting = {
            (d, found.channels(labels).tobytes()): labels
            for d, size in enumerate(shape)
            for labels in beside.get(_scope(model, name), [])
            if len(labels) == size > 1
        }
        alike = _of_same_shape(model, found, name, shape)
        if len(fitting) == 1:
            (((dim, _), labels),) = fitting.items()
            alike = labels.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        if alike is not None:
            found.sides[name, "self"] = SideUse(np.broadcast_to(alike, shape).copy(), 0)


def _of_same_shape(model: nn.Module, found: Flow, name: str, shape: torch.Size) -> np.ndarray | None:
    """Return the labels of parameters of the same module with whose shape a shape ends, if these agree."""
    several = {
        found.channels(use.labels).tobytes(): use.labels
        for (other, side), use in found.sides.items()
        if side == "self" and shape[-use.labels.ndim :] == use.labels.shape
        if sum(size > 1 for size in use.labels.shape) > 1 and _scope(model, other) == _scope(model, name)
    }
    return next(iter(several.values())) if len(several) == 1 else None


def unreached(
    model: nn.Module, found: Flow, groups: Mapping[str, Group], ignored: Iterable[str]
) -> dict[str, str]:
    """Return the groups whose channels tensors may hold that the passes did not reach, with the reason.

    These are norms and embeddings (a BatchNorm for each domain) and parameters of modules (an optional
    embedding) of the width of a layer beside them. With narrower layers, other inputs would fail.

    Args:
        ignored: layers that the caller ignores; nothing is reported for them.
    """
    ignored = set(ignored)
    reasons: dict[str, str] = {}
    for name, owner, widths in _unreached_tensors(model, found):
        if owner in ignored:
            continue
        scope = _scope(model, name)
        beside = [
            group.name
            for group in groups.values()
            if any(_beside(model, member, scope, widths) for member in group.members)
        ]
        other = f"list {owner} as ignored if it is not used" if owner else "delete it if it is not used"
        why = (
            f"{name} does not run on the example inputs, and may hold the same channels; give a call that "
            f"reaches it by also=, or {other}"
        )
        reasons = dict.fromkeys(beside, why) | reasons
    return reasons


def _unreached_tensors(model: nn.Module, found: Flow) -> Iterator[tuple[str, str, set[int]]]:
    """Yield norms, embeddings and parameters outside layers: name, module to ignore, possible widths."""
    reached = {name for name, _ in found.sides} | found.read_elsewhere
    layers = [module for module in model.modules() if rule_for(module) is not None]
    inside = {id(child) for layer in layers for child in layer.modules()}
    for name, module in model.named_modules():
        rule = rule_for(module)
        if rule is not None:
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if held and name not in reached and rule.kind in ("channelwise", "norm", "embedding"):
                yield name, name, {layer_width(module, "out")}
        if id(module) in inside or isinstance(module, torch.jit.ScriptModule):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{attribute}".lstrip(".")
            if full not in reached and full not in found.functional and parameter.numel() <= MOST_ELEMENTS:
                yield full, name, {size for size in parameter.shape if size > 1}


def _scope(model: nn.Module, name: str) -> str:
    """Return the module whose code uses a module or parameter: the first that holds it and has code."""
    owner = name.rpartition(".")[0]
    while owner and isinstance(submodule(model, owner), _CONTAINERS):
        owner = owner.rpartition(".")[0]
    return owner


def _beside(model: nn.Module, member: Member, scope: str, widths: set[int]) -> bool:
    """Whether a layer is inside a module and has one of these widths on its side."""
    inside = not scope or f"{member.layer}.".startswith(f"{scope}.")
    if not inside or member.side == "self":
        return False
    return layer_width(submodule(model, member.layer), member.side) in widths
