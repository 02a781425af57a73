"""Tracing: find the channel groups of a model, with the reason for every layer that has none.

`pruning.tracing.tracer` follows the channels through a forward pass, `pruning.tracing.grouping` builds
groups from the tied labels, and `pruning.tracing.probing` finds groups whose width the code fixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from pruning.errors import PruningError
from pruning.graph.computed import can_be_narrowed, refresh_computed
from pruning.graph.groups import Group, Ignored, LayerUse, Member, ProductUse, Trace
from pruning.graph.inferred import inferred_rule
from pruning.graph.layers import (
    bias_of,
    is_weighted,
    layer_width,
    makes_channels,
    parts,
    require_rules,
    rule_for,
)
from pruning.surgery.batchnorm import can_fold
from pruning.tracing.cures import with_cure
from pruning.tracing.grouping import channel_groups, positions_by_group
from pruning.tracing.passes import flow
from pruning.tracing.probing import WidthProbe
from pruning.tracing.record import Flow
from pruning.tracing.shared import frozen_reason, loses_alike, shared_parameters, tie_shared
from pruning.tracing.size_attributes import merged
from pruning.tracing.ties import NONE
from pruning.tracing.unreached import adopt_unreached, missed, unreached
from pruning.tracing.unread import Unread, find_unread
from pruning.utils.batch import find_batch
from pruning.utils.entries import Also, entries_of
from pruning.utils.held_weight import HeldWeight
from pruning.utils.modules import buffers_unchanged, call, eval_mode, submodule
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs, tensors
from pruning.utils.wrappers import unwrapped, without_prefixes


@buffers_unchanged
def trace(
    model: nn.Module,
    inputs: Inputs,
    ignored: Iterable[Ignored] = (),
    *,
    compare: bool = True,
    batch_size: int | None = None,
    outputs: Outputs = None,
    also: Iterable[Also] = (),
) -> Trace:
    """Find the channel groups of a model.

    Args:
        model: any module; neither it nor its mode is changed.
        inputs: example inputs on the model's device: a tensor, a sequence of arguments, or a mapping.
        ignored: layers whose outputs are not pruned: names, patterns, types or modules.
        compare: whether to compare outputs of narrowed copies, to find layers whose code mixes channels.
        batch_size: number of examples in the inputs; by default found by `pruning.utils.batch.find_batch`.
        outputs: which outputs keep their size: names such as `["logits"]`, or a function of what the model
            returns; by default all.
        also: other ways to call the model, traced together with the inputs: functions of the model, such as
            `lambda model: model.sample(2)`, which return the outputs that count, and inputs. A function
            runs on a copy, which it may change (a reparameterization).

    Returns the groups, and for every other layer that makes channels the reason why it is skipped.
    Raises `PruningError` for a model that does not run on the inputs, and for invalid arguments or rules.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    >>> traced = trace(model, torch.zeros(1, 3, 9, 9))
    >>> traced.widths
    {'0': 8}
    >>> [(member.layer, member.side) for member in traced.groups["0"].members]
    [('0', 'out'), ('2', 'in')]
    >>> print(traced.skipped["2"])
    its channels are the model's output, whose size is kept; outputs= (--outputs) says which outputs count
    """
    ignored_by = _match(model, ignored)
    _require_traceable(model, inputs, ignored_by)
    refresh_computed(model)
    entries = entries_of(also)
    found = flow(model, call, inputs, outputs, entries)
    groups, labels, reasons = _prunable(model, found, ignored_by)

    probe = WidthProbe(model, inputs, found, groups, labels, outputs, entries)
    unread = _probed(probe, ignored_by, compare)
    for name, reason in unread.reasons.items():
        reasons.update({member.layer: reason for member in groups.pop(name).side("out")})

    foldable = _foldable(model, found)
    batch = find_batch(model, inputs, batch_size, found.done)
    layers = [*model.modules(), *(submodule(model, name) for name in _held_weights(model, found))]
    inferred = {type(m): rule for m in layers if (rule := inferred_rule(type(m))) is not None}
    return Trace(
        groups, _skipped(model, found, groups, reasons), foldable,
        _uses(model, found, foldable, batch.size), frozenset(ignored_by), found.other_macs / batch.size,
        inputs, unread.sizes, batch, outputs, entries, inferred,
        _products(found, {name: labels[name] for name in groups}, batch.size), probe.rescales(groups),
        unread.stale, frozenset(found.foreign),
    )  # fmt: skip


def _probed(probe: WidthProbe, ignored_by: dict[str, str], compare: bool) -> Unread:
    """Return the groups that cannot be narrowed as they are, and the attributes that hold widths.

    Groups that can only be narrowed together take the place of their parts in the probe.
    """
    model, found, groups = probe.model, probe.found, probe.groups
    bound, sizes = probe.code_bound()
    # Attributes of joined groups first: they count the channels of these, and not those of their parts.
    sizes = merged((probe.joined(bound, lambda: _prunable(model, found, ignored_by)[:2]), sizes))
    if compare:
        bound |= probe.mixing([name for name in groups if name not in bound], sizes)
    sizes = merged((probe.known_sizes(), sizes))
    apart = unreached(model, found, groups, ignored_by)
    left = [name for name in groups if name not in bound and name not in apart]
    unread = find_unread(probe, left, sizes)
    return replace(unread, reasons=apart | bound | unread.reasons)


def _products(found: Flow, labels: Mapping[str, np.ndarray], size: int) -> tuple[ProductUse, ...]:
    """Return the products of activations for one of `size` examples, whose channels have these labels."""
    return tuple(
        ProductUse(
            product.macs / size,
            *(
                positions_by_group(np.full((1, 1), NONE) if x is None else found.channels(x), labels)
                for x in (product.rows, product.columns)
            ),
        )
        for product in found.products
    )


def _uses(model: nn.Module, found: Flow, foldable: Mapping[str, str], size: int) -> dict[str, LayerUse]:
    """Return how often each layer is used for one of `size` examples."""
    return {
        name: LayerUse(
            used / size, positions / size, bias_of(submodule(model, name)) is not None or name in foldable
        )
        for name, (used, positions) in found.uses.items()
    }


def _prunable(
    model: nn.Module, found: Flow, ignored_by: dict[str, str]
) -> tuple[dict[str, Group], dict[str, np.ndarray], dict[str, str]]:
    """Return the groups that can be pruned, the labels of their channels, and why others cannot."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= {f"{name}.weight" for name in frozen if (name, "out") in found.sides}
    tie_shared(model, found)
    adopt_unreached(model, found)
    shared = shared_parameters(model, found)
    groups: dict[str, Group] = {}
    labels: dict[str, np.ndarray] = {}
    reasons: dict[str, str] = {}
    for group, channels, reason in channel_groups(model, found):
        reason = reason or _obstacle(group, model, ignored_by, frozen, shared)
        if reason:
            reasons.update({member.layer: reason for member in group.side("out")})
        else:
            groups[group.name], labels[group.name] = group, channels
    return groups, labels, reasons


def _held_weights(model: nn.Module, found: Flow) -> list[str]:
    """Return the parameters that are layers of their own, see `HeldWeight`."""
    outputs = (name for name, side in found.sides if side == "out")
    return [name for name in outputs if isinstance(submodule(model, name), HeldWeight)]


def _skipped(
    model: nn.Module, found: Flow, groups: dict[str, Group], reasons: dict[str, str]
) -> dict[str, str]:
    """Return the layers that make channels but belong to no group, with the reason."""
    pruned = {member.layer for group in groups.values() for member in group.side("out")}
    ran = {
        name
        for name, layer in model.named_modules()
        if makes_channels(layer) and (found.calls[name] or (name, "out") in found.sides)
    }
    ran.update(_held_weights(model, found))
    skipped = {layer: why for layer, why in reasons.items() if layer in ran and layer not in pruned}
    return {
        layer: with_cure(why) for layer, why in (skipped | found.refused | dict(missed(model, found))).items()
    }


def _require_traceable(model: nn.Module, inputs: Inputs, ignored: Iterable[str]) -> None:
    """Raise `PruningError` for a model or inputs that cannot be traced, but for layers that are ignored."""
    ignored = set(ignored)
    if torch.is_inference_mode_enabled():
        raise PruningError("torch.inference_mode() is on, and its tensors cannot be trained; turn it off")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and name not in ignored:
            where = f"{name} is TorchScript, which" if name else "TorchScript"
            cure = f", or list {name} as ignored" if name else ""
            raise PruningError(
                f"{where} has no layers to narrow; give the nn.Module that it was made from{cure}"
            )
    empty = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if empty:
        raise PruningError(f"{empty[0]} has no values yet; run the model once on an example")
    if any(x.ndim and not len(x) for x in tensors(inputs)[:1]):
        raise PruningError("the example inputs are a batch of no examples; give at least one example")
    require_rules(model)


def require_groups(model: nn.Module, traced: Trace) -> None:
    """Raise `PruningError`, with the reasons, if no group of a model can be narrowed."""
    if not traced.groups:
        kind = type(model).__name__
        reasons = "; ".join(f"{layer or kind}: {why}" for layer, why in traced.skipped.items())
        raise PruningError(
            f"{kind} has no prunable group ({reasons or 'no layer was found'}); free a layer as its reason "
            'says (see "Read a refusal" in the documentation), or register your own layers (register_layer) '
            "and operators (register_operator)"
        )


def _obstacle(
    group: Group,
    model: nn.Module,
    ignored_by: dict[str, str],
    frozen: set[str],
    shared: Mapping[str, list[str]],
) -> str:
    """Return why a group cannot be pruned; empty when it can."""
    if not group.side("in") and not group.is_summed:
        return (
            "no layer that surgery knows consumes its channels; they may be the model's output, or code that "
            "is not torch's takes them"
        )
    for member in group.members:
        if member.side == "self":
            continue
        layer = submodule(model, member.layer)
        if 1 < parts(layer) == layer_width(layer, member.side):
            return (
                f"{member.layer} works on {parts(layer)} parts with one channel each, none of which "
                "can be given up; list it as ignored or give it fewer groups"
            )
    if group.channels < 2:
        if all(len(member.index) == 1 for member in group.side("out")):
            return "it has one channel, and a group is never emptied"
        return "its channels are all tied to each other, and a group is never emptied"
    trained = any(
        f"{m.layer}.weight" not in frozen for m in group.side("out") if is_weighted(submodule(model, m.layer))
    )
    for member in group.members:
        owner = member.layer.rpartition(".")[0] if member.side == "self" else member.layer
        layer = submodule(model, owner)
        held = isinstance(layer, HeldWeight)
        holder = owner.rpartition(".")[0] if held else owner
        if member.side != "in" and holder in ignored_by:
            return f"ignored, as asked by {ignored_by[holder]}"
        if member.side == "self":
            names = [member.layer]
        else:
            names = [f"{owner}.{p}" for p, _ in layer.named_parameters(recurse=False)]
        for full in names:
            if full in frozen and not (trained and _is_table(layer, member)):
                return frozen_reason(model, full, owner if held else full)
            if full in shared and not loses_alike(model, group, [full, *shared[full]]):
                return f"{full} is the same tensor as {shared[full][0]}; untie them to let it be pruned"
        if member.side != "self" and (problem := _computed(owner, layer)):
            return problem
    return ""


def _is_table(layer: nn.Module, member: Member) -> bool:
    """Whether a member holds fixed values that are added to channels, such as the sines of positions."""
    rule = rule_for(layer)
    return member.side == "self" or (rule is not None and rule.kind == "embedding")


def _computed(name: str, layer: nn.Module) -> str:
    """Return why a layer whose tensors are computed from others cannot be pruned; empty when it can."""
    rule = rule_for(layer)
    held = [] if rule is None else [*rule.out, *rule.into]
    if hasattr(layer, "weight_fake_quant"):
        return (
            f"{name} is prepared for quantization-aware training (prepare_qat), with a scale for each "
            "channel; prune first and call prepare_qat on the result, to let it be pruned"
        )
    if nn.utils.parametrize.is_parametrized(layer) and not can_be_narrowed(layer, held):
        return (
            f"{name} is parametrized, and a part of its weight cannot be computed in the same way; remove "
            "the parametrization, prune, and add it again"
        )
    return ""


def _match(model: nn.Module, ignored: Iterable[Ignored]) -> dict[str, str]:
    """Return the names of the layers to ignore, each with the entry that matches it."""
    ignored_by: dict[str, str] = {}
    first = {id(module): name for name, module in model.named_modules()}  # a module may have several names
    for entry in ignored:
        if isinstance(entry, nn.Module):
            entry = unwrapped(entry)
        described = entry if isinstance(entry, str) else getattr(entry, "__name__", type(entry).__name__)
        matched = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if (
                isinstance(entry, str)
                and (fnmatchcase(name, entry) or fnmatchcase(name, without_prefixes(entry)))
            )
            or (isinstance(entry, type) and isinstance(module, entry))
            or module is entry
        ]
        if not matched:
            raise PruningError(
                f"ignored layer {described!r} matches no layer of {type(model).__name__}; give a name or "
                "pattern from named_modules(), a module type, or one of its modules"
            )
        for name in matched:
            inner = submodule(model, name).modules()
            ignored_by.update({first[id(module)]: repr(described) for module in inner})
    return ignored_by


def _foldable(model: nn.Module, found: Flow) -> dict[str, str]:
    """Return the layers whose output only a BatchNorm reads and can be folded into: layer to norm."""
    pairs = {}
    shared = shared_parameters(model, found)
    with eval_mode(model):
        for name, readers in found.readers.items():
            norm_name = readers[0] if readers else ""
            if not norm_name or set(readers) != {norm_name}:
                continue
            if (
                can_fold(model, name, norm_name)
                and found.calls[name] == found.calls[norm_name] == len(readers)
                and found.sides[name, "out"].dim == found.sides[norm_name, "out"].dim
                and not found.read_elsewhere & {name, norm_name}
                and f"{name}.weight" not in shared
                and f"{name}.bias" not in shared
            ):
                pairs[name] = norm_name
    return pairs
