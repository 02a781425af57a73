"""Modules as keys of the options of a plan, in place of the names of groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.planning.options import PlanOptions
from pruning.utils.wrappers import unwrapped

Value = TypeVar("Value")


def with_group_names(options: PlanOptions, model: nn.Module, trace: Trace) -> PlanOptions:
    """Return options in which the names of groups take the place of modules among the keys.

    A module stands for the groups whose channels it makes, or layers inside it make.

    Args:
        options: of a plan for the model. model: the model. trace: of the model.

    Raises:
        PruningError: for a key that is neither a text nor a module of the model, and for a module that
            makes the channels of no group; the message gives the reason.

    >>> import torch
    >>> from pruning.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> traced = trace(model, torch.zeros(1, 4))
    >>> with_group_names(PlanOptions(widths={model[0]: 4}), model, traced).widths
    {'0': 4}
    """
    return replace(
        options,
        floor=_named("floor", options.floor, model, trace),
        most=_named("most", options.most, model, trace),
        widths=_named("widths", options.widths, model, trace),
    )


def _named(what: str, setting: Value, model: nn.Module, trace: Trace) -> Value:
    """Return a setting with names in place of the modules among its keys, if it is a mapping."""
    if not isinstance(setting, Mapping) or all(isinstance(key, str) for key in setting):
        return setting
    named = {}
    for key, value in setting.items():
        for name in [key] if isinstance(key, str) else _groups_of(what, key, model, trace):
            named[name] = value
    return named  # type: ignore[return-value]


def _groups_of(what: str, key: object, model: nn.Module, trace: Trace) -> list[str]:
    """Return the groups whose channels a module makes; raise `PruningError` if there are none."""
    kind, listed = type(key).__name__, ", ".join(trace.widths)
    how = f"give a name or pattern of groups ({listed}) or a module that makes their channels"
    if not isinstance(key, nn.Module):
        raise PruningError(f"{what}: {key!r} is of type {kind}; {how}")
    inner = unwrapped(key)
    name = next((name for name, module in model.named_modules() if module is inner), None)
    if name is None:
        raise PruningError(f"{what}: the {kind} is no module of {type(model).__name__}; {how}")
    inside = {f"{name}.{each}".strip(".") for each, _ in inner.named_modules()}
    found = [group.name for group in trace.groups.values() if inside & {m.layer for m in group.side("out")}]
    if not found:
        why = next((f" ({trace.skipped[layer]})" for layer in trace.skipped if layer in inside), "")
        raise PruningError(f"{what}: {name} ({kind}) makes no channels that can be removed{why}; {how}")
    return found
