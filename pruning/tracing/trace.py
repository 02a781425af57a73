"""From what flowed together to channel groups: tracing a model.

`pruning.tracing` follows the channels through the model; here what is tied becomes groups,
with the reason for every layer that is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Ignored, LayerUse, Member, Trace
from pruning.graph.layers import MAKERS, RECURRENT, Side, layer_width, parts
from pruning.surgery.batchnorm import can_fold
from pruning.tracing.labels import Flow, SideUse, Ties
from pruning.tracing.probing import Rigid
from pruning.tracing.tracer import flow
from pruning.utils.modules import buffers_unchanged, call, eval_mode
from pruning.utils.tree import Inputs, tensors

_OWN_WAY = "its own code computes with its weight in another way than its type does"

_NOT_RUN = (
    "it does not run on the example inputs: should it read channels that are pruned, it will no longer fit. "
    "Give inputs that reach it, or ignore the layers before it"
)


@buffers_unchanged
def trace(
    model: nn.Module, inputs: Inputs, ignored: Iterable[Ignored] = (), *, compare: bool = True
) -> Trace:
    """Find the channel groups of a model.

    Args:
        model: any module; it is not changed, nor is its mode.
        inputs: example inputs with a batch dimension, on the model's device.
        ignored: layers whose outputs are to stay as they are; a pattern, type or instance
            that matches no layer is an error.
        compare: of layers with code of their own, see by the model's outputs whether they mix channels.

    Raises `PruningError` when the model does not run on the inputs.
    """
    _refuse(model, inputs)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    keep = _match(model, ignored)
    shared = _shared_parameters(model)
    found = flow(model, call, inputs)
    ran = {name for name, layer in model.named_modules() if isinstance(layer, MAKERS) and found.calls[name]}

    groups: dict[str, Group] = {}
    labels: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for group, numbers, reason in _groups(model, found):
        producers = [m.layer for m in group.side("out") if m.layer in ran]
        reason = reason or _obstacle(group, model, keep, frozen, shared)
        if reason:
            skipped.update(dict.fromkeys(producers, reason))
            continue
        groups[group.name], labels[group.name] = group, numbers
    rigid = Rigid(model, inputs, found, groups, labels)
    stay, sizes = rigid.tied()
    if compare:
        stay |= rigid.mixed([name for name in groups if name not in stay], sizes)
    for name, reason in stay.items():
        skipped.update({member.layer: reason for member in groups.pop(name).side("out")})
    makers = {member.layer for group in groups.values() for member in group.members if member.side == "out"}
    skipped = {layer: why for layer, why in skipped.items() if layer in ran and layer not in makers}
    skipped.update(_unseen(model, found))

    foldable = _foldable(model, found)
    uses = {
        name: LayerUse(used, positions, model.get_submodule(name).bias is not None or name in foldable)
        for name, (used, positions) in found.uses.items()
    }
    return Trace(groups, skipped, foldable, uses, frozenset(keep), found.other_macs, inputs, sizes)


def _refuse(model: nn.Module, inputs: Inputs) -> None:
    """Say what is wrong with a model or inputs that cannot be traced."""
    if torch.is_inference_mode_enabled():
        raise PruningError("torch.inference_mode() is on: its tensors cannot be trained; leave it first")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"{name} is TorchScript, which" if name else "TorchScript"
            raise PruningError(f"{where} has no layers to narrow; give the nn.Module that it was made of")
    empty = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if empty:
        raise PruningError(f"{empty[0]} has no values yet; run the model once on an example")
    if any(x.ndim and not len(x) for x in tensors(inputs)[:1]):
        raise PruningError("the example inputs are a batch of no examples; give at least one")


def require_groups(model: nn.Module, traced: Trace) -> None:
    """Raise `PruningError`, with the reasons, where no group of a model can be narrowed."""
    if not traced.groups:
        kind = type(model).__name__
        reasons = "; ".join(f"{layer or kind}: {why}" for layer, why in traced.skipped.items())
        raise PruningError(f"{kind} has no prunable group ({reasons or 'no layer was found'})")


def _unseen(model: nn.Module, found: Flow) -> Iterator[tuple[str, str]]:
    """Layers that would have channels, had the pass shown them; each with the reason why it did not."""
    shown = {name for name, _ in found.sides} | found.borrowed
    holders = {name.rpartition(".")[0] for name, side in found.sides if side == "self"}
    for name, layer in model.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, RECURRENT):
            yield name, "recurrent layers keep their hidden size"
            continue
        if not own or name in shown or ("weight" in own and name in holders):
            continue
        if isinstance(layer, MAKERS) and "weight" not in own:
            yield name, "its weight is computed from others; remove what does that to let it be pruned"
        elif isinstance(layer, MAKERS):
            inside = any(f"{name}.{child}" in shown for child, _ in layer.named_children())
            yield name, _OWN_WAY if inside else _NOT_RUN
    yield from found.functional.items()


def _groups(model: nn.Module, found: Flow) -> Iterator[tuple[Group, np.ndarray, str]]:
    """Channels that are tied, by the layers that make them: each group with its labels.

    Layers one of whose channels are tied to those of another make channels of one group.
    Within it channels that own different numbers of positions (some take part in a sum,
    others do not) are groups apart, so that every channel of a group costs the same; and
    so are those that must stay, which come with the reason.
    """
    made = [found.ties.root(use.labels) for (_, side), use in found.sides.items() if side == "out"]
    known = np.unique(np.concatenate([np.arange(0), *made]))  # of layers; others do not matter
    reasons: dict[int, str] = {}
    for labels, reason in found.fixed:
        for number in np.intersect1d(found.ties.root(labels), known).tolist():
            reasons.setdefault(number, reason)
    sides = _settled_sides(found, known, reasons)

    # Components: channels that one layer makes belong together.
    together = Ties()
    together.new(1 + max((int(side.labels.max()) for side in sides.values() if len(side.labels)), default=0))
    makers = [
        (name, side.labels)
        for (name, which), side in sides.items()
        if which == "out" and isinstance(model.get_submodule(name), MAKERS)
    ]
    for _, labels in makers:
        together.tie(labels[:-1], labels[1:])

    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    keys = list(sides)
    component_of: dict[int, list[tuple[int, np.ndarray]]] = {}
    for i, key in enumerate(keys):
        components = together.root(sides[key].labels)
        by_component = np.argsort(components, kind="stable")
        bounds = np.flatnonzero(np.diff(components[by_component], prepend=-2))
        for place in np.split(by_component, bounds[1:]):
            component_of.setdefault(int(components[place[0]]), []).append((i, np.sort(place)))

    roots: dict[int, str] = {}
    for name, labels in sorted(makers, key=lambda maker: order[maker[0]]):
        roots.setdefault(int(together.root(labels[:1])[0]), name)
    for component, root in roots.items():
        places = component_of[component]
        channels = _in_order(sides[root, "out"].labels, [sides[keys[i]].labels[at] for i, at in places])
        number = {int(label): c for c, label in enumerate(channels)}
        owned = np.zeros((len(channels), len(places) + 1), dtype=np.int64)
        members = []
        for column, (i, at) in enumerate(places):
            channel = np.array([number[int(label)] for label in sides[keys[i]].labels[at]])
            np.add.at(owned[:, column], channel, 1)
            members.append((keys[i], at, channel, sides[keys[i]].dim))
        owned[:, -1] = [int(label) in reasons for label in channels]
        _, kind, first = _unique_rows(owned)
        for count, which in enumerate(np.argsort(first)):
            chosen = np.flatnonzero(kind == which)
            renumber = np.full(len(channels), -1)
            renumber[chosen] = np.arange(len(chosen))
            parts_of = []
            for (layer, side), at, channel, dim in members:
                inside = renumber[channel] >= 0
                if inside.any():
                    index = torch.from_numpy(at[inside])
                    parts_of.append(
                        Member(layer, side, index, torch.from_numpy(renumber[channel[inside]]), dim)
                    )
            name = root if not count else f"{root}/{count + 1}"
            reason = next((reasons[int(x)] for x in channels[chosen] if int(x) in reasons), "")
            yield Group(name, len(chosen), tuple(parts_of)), channels[chosen], reason


def _settled_sides(
    found: Flow, known: np.ndarray, reasons: dict[int, str]
) -> dict[tuple[str, Side], SideUse]:
    """Every side with its final labels, a vector; tensors of their own where channels touch them."""
    sides = {}
    for (name, side), use in found.sides.items():
        labels, dim = found.ties.root(use.labels), use.dim
        if side == "self":
            if not np.isin(labels, known).any():
                continue
            rows = [d for d, size in enumerate(labels.shape) if size > 1]
            lying = [d for d in rows if (labels != labels.take([0], axis=d)).any()]
            if len(lying) > 1:
                for number in np.intersect1d(labels, known).tolist():
                    reasons.setdefault(number, f"the parameter {name} holds it along several dimensions")
                continue
            dim = lying[0] if lying else (rows[0] if rows else 0)
            labels = np.moveaxis(labels, dim, 0).reshape(labels.shape[dim] if labels.ndim else 1, -1)[:, 0]
        sides[name, side] = SideUse(labels, dim)
    return sides


def _in_order(first: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """All labels, each once, by their first place in the vectors."""
    everything = np.concatenate([first, *others])
    labels, place = np.unique(everything, return_index=True)
    return labels[np.argsort(place)]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows, the number of each row's, and where each is first."""
    distinct, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return distinct, kind.reshape(-1), first


def _obstacle(
    group: Group, model: nn.Module, keep: dict[str, str], frozen: set[str], shared: dict[str, str]
) -> str:
    """Why a group is left as it is; empty when it can be pruned."""
    if not group.side("in"):
        return "no layer that surgery knows consumes its channels; they may be the model's output"
    for member in group.members:
        if member.side == "self":
            continue
        layer = model.get_submodule(member.layer)
        # None of the parts of such a layer could be given up.
        if 1 < parts(layer) == layer_width(layer, member.side):
            return (
                f"{member.layer} works on {parts(layer)} parts with one channel each, none of which "
                "can be given up; list it as ignored or give it fewer groups"
            )
    if group.channels < 2:
        if all(len(member.index) == 1 for member in group.side("out")):
            return "it has one channel, and a group is never emptied"
        return "its channels can only be removed all together (tied in parts), and a group is never emptied"
    for member in group.members:
        owner = member.layer.rpartition(".")[0] if member.side == "self" else member.layer
        if member.side != "in" and owner in keep:
            return f"ignored, as asked by {keep[owner]}"
        if member.side == "self":
            names = [member.layer]
        else:
            names = [f"{owner}.{p}" for p, _ in model.get_submodule(owner).named_parameters(recurse=False)]
        for full in names:
            if full in frozen:
                return f"{full} is frozen; set requires_grad=True to let it be pruned"
            if full in shared:
                return f"{full} is the same tensor as {shared[full]}; untie them to let it be pruned"
        if nn.utils.parametrize.is_parametrized(model.get_submodule(owner)):
            return f"{owner} is parametrized; remove the parametrization to let it be pruned"
    return ""


def _match(model: nn.Module, ignored: Iterable[Ignored]) -> dict[str, str]:
    """The names of the layers to ignore, each with what asked for it."""
    keep: dict[str, str] = {}
    first = {id(module): name for name, module in model.named_modules()}  # of several names of a module
    for entry in ignored:
        described = entry if isinstance(entry, str) else getattr(entry, "__name__", type(entry).__name__)
        matched = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if (isinstance(entry, str) and fnmatchcase(name, entry))
            or (isinstance(entry, type) and isinstance(module, entry))
            or module is entry
        ]
        if not matched:
            raise PruningError(
                f"ignored layer {described!r} matches no layer of {type(model).__name__}; give a name or "
                "pattern from named_modules(), a module type, or one of its modules"
            )
        for name in matched:
            inner = model.get_submodule(name).modules()
            keep.update({first[id(module)]: repr(described) for module in inner})
    return keep


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that two layers hold: each full name with the other's.

    A layer that is registered under two names is one layer, and counts under the first.
    """
    holders: dict[int, str] = {}
    shared: dict[str, str] = {}
    for layer, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{layer}.{own}" if layer else own
            other = holders.setdefault(id(parameter), name)
            if other != name:
                shared.update({name: other, other: name})
    return shared


def _foldable(model: nn.Module, found: Flow) -> dict[str, str]:
    """BatchNorm layers that alone read the output of the layer before them."""
    pairs = {}
    shared = _shared_parameters(model)
    with eval_mode(model):
        for name, readers in found.follows.items():
            norm_name = readers[0] if readers else ""
            if not norm_name or set(readers) != {norm_name}:
                continue
            if (
                can_fold(model, name, norm_name)
                and found.calls[name] == found.calls[norm_name] == len(readers)
                and found.sides[name, "out"].dim == found.sides[norm_name, "out"].dim
                and not found.borrowed & {name, norm_name}
                and f"{name}.weight" not in shared
                and f"{name}.bias" not in shared
            ):
                pairs[name] = norm_name
    return pairs
