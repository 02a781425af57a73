"""Build channel groups from tied labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from pruning.graph.groups import Group, Member, Positions, Reduction
from pruning.graph.layers import makes_channels
from pruning.graph.rule import Side
from pruning.tracing.record import Flow, SideUse
from pruning.tracing.ties import NONE, Ties, is_among, unique
from pruning.utils.modules import submodule


@dataclass(frozen=True)
class _Part:
    """Positions of one side of a layer that belong to one component, sorted; `dim` as in `SideUse`.

    A position that belongs to several channels is listed once for each.
    """

    layer: str
    side: Side
    positions: np.ndarray
    labels: np.ndarray
    dim: int


#: By layer (or tensor) and side, the labels of the channels that each position belongs to, (positions, most).
_Sides = dict[tuple[str, Side], SideUse]


def channel_groups(model: nn.Module, found: Flow) -> Iterator[tuple[Group, np.ndarray, str]]:
    """Yield each channel group with its labels and the reason why it is fixed, "" if it is not.

    Layers that share a tied channel belong to the same connected component. A component is split into
    groups by the number of positions that its channels own (only some may take part in a sum), so that
    all channels of a group cost the same. Fixed channels form groups of their own. Positions of attention
    may belong to two groups, the heads and the positions within a head; such a group is named after the
    layer and what products do along it (`attention.query/heads`).
    """
    sides, reasons = _final_sides(found)
    reductions = {
        place: SideUse(found.channels(use.labels), use.dim) for place, use in found.reductions.items()
    }
    taken: set[str] = set()
    for root, made, parts_of in _components(model, found, sides):
        role = found.axes.role_of(made) if found.axes is not None and is_along_axis(found, made) else ""
        name = f"{root}/{role}" if role else root
        for group, channels, reason in _split(name, made, parts_of, reasons):
            count, unique = 2, group.name
            while unique in taken:
                unique, count = f"{group.name}/{count}", count + 1
            taken.add(unique)
            whole = replace(
                group,
                name=unique,
                reductions=tuple(_over(channels, reductions)),
                multiple=_multiple(found, channels),
            )
            yield _with_scored(found, whole, role), channels, reason


def _multiple(found: Flow, channels: np.ndarray) -> int:
    """Return the number of which a group's width has to be a multiple, given the labels of its channels."""
    multiple = 1
    for labels, needed in found.aligned:
        index, owner = positions_of(channels, found.channels(labels))
        if len(index):
            each = int(np.bincount(owner).max())  # positions of one channel
            multiple = math.lcm(multiple, needed // math.gcd(needed, each))
    return multiple


def _with_scored(found: Flow, group: Group, role: str) -> Group:
    """Return a group whose members say which positions count for the change of the loss.

    Args:
        role: what products do along the channels, see `Axes.role_of`.
    """
    places = {reduction.place for reduction in group.reductions} & found.right.keys()
    if role == "heads":
        outside = [*found.left.values(), *found.right.values()]
    else:
        outside = [found.right[place] for place in places]
    if not outside:
        return group
    factors = np.unique(np.concatenate(outside))
    kept = {
        (member.layer, member.side): torch.from_numpy(
            ~is_among(found.sides[member.layer, member.side].labels[member.index], factors)
        )
        for member in group.side("out")
    }
    if not any(scored.any() for scored in kept.values()):
        return group
    members = [
        replace(member, scored=kept[member.layer, member.side]) if member.side == "out" else member
        for member in group.members
    ]
    return replace(group, members=tuple(members))


def is_along_axis(found: Flow, labels: np.ndarray) -> bool:
    """Whether final labels are those along one dimension of a grid."""
    if found.axes is None:
        return False
    made = np.concatenate([np.arange(0), *found.axes.vectors_made])
    return bool(is_among(labels, found.ties.find(made)).all())


def positions_of(channels: np.ndarray, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions that belong to channels of a group, given by their labels, and these channels."""
    order = np.argsort(channels)
    index, column = np.nonzero(is_among(sets, channels))
    return index, order[np.searchsorted(channels, sets[index, column], sorter=order)]


def positions_by_group(sets: np.ndarray, labels: Mapping[str, np.ndarray]) -> Positions:
    """Return which positions belong to which groups.

    Args:
        sets: final labels of each position, (positions, most). labels: by group, those of its channels.
    """
    owners = {}
    held = is_among(np.concatenate([np.arange(0), *labels.values()]), sets)
    starts = np.cumsum([0, *map(len, labels.values())])
    for start, (name, channels) in zip(starts.tolist(), labels.items(), strict=False):
        if held[start : start + len(channels)].any():
            index, owner = positions_of(channels, sets)
            owners[name] = torch.from_numpy(index), torch.from_numpy(owner)
    return Positions(len(sets), owners)


def _over(channels: np.ndarray, reductions: dict[tuple[str, str, int], SideUse]) -> Iterator[Reduction]:
    """Yield the statistics and products over channels of one group, given by their labels."""
    for place, use in reductions.items():
        index, owner = positions_of(channels, use.labels)
        if len(index):
            yield Reduction(*place, torch.from_numpy(index), torch.from_numpy(owner), use.dim)


def _final_sides(found: Flow) -> tuple[_Sides, dict[int, str]]:
    """Return all sides with the final labels of their channels, and why labels are fixed.

    The labels of a tensor outside the layers are reduced to a vector along its channel dimension;
    tensors without channels are omitted.
    """
    made = [found.channels(use.labels).ravel() for (_, side), use in found.sides.items() if side == "out"]
    known = np.unique(np.concatenate([np.arange(0), *made]))  # labels of layer outputs
    known = known[known != NONE]
    reasons: dict[int, str] = {}
    for labels, reason in found.fixed:
        channels = found.channels(labels)
        for label in unique(channels[is_among(channels, known)])[0].tolist():
            reasons.setdefault(label, reason)
    sides: _Sides = {}
    for (name, side), use in found.sides.items():
        sets, dim = found.channels(use.labels.ravel()), use.dim
        if side == "self":
            if not is_among(sets, known).any():
                continue
            labels = sets.reshape(*use.labels.shape, -1)
            wide = [d for d, size in enumerate(use.labels.shape) if size > 1]
            channel_dims = [d for d in wide if (labels != labels.take([0], axis=d)).any()]
            if len(channel_dims) > 1:
                if _is_rectangle(labels):  # its elements are positions, see `Member.dim`
                    sides[name, side] = SideUse(sets, use.labels.ndim)
                    continue
                why = f"the parameter {name} holds its channels along several dimensions"
                for label in np.intersect1d(labels, known).tolist():
                    reasons.setdefault(label, why)
                continue
            dim = channel_dims[0] if channel_dims else (wide[0] if wide else 0)
            size, most = (use.labels.shape[dim] if use.labels.ndim else 1), labels.shape[-1]
            sets = np.moveaxis(labels, dim, 0).reshape(size, -1, most)[:, 0]
        sides[name, side] = SideUse(sets, dim)
    return sides, reasons


def _is_rectangle(labels: np.ndarray) -> bool:
    """Whether a tensor stays a rectangle without any of its channels: each lies along one dimension alone.

    Args:
        labels: those of each element, (*shape, most).

    >>> _is_rectangle(np.array([[[1, 3], [1, 4]], [[2, 3], [2, 4]]])), _is_rectangle(np.array([[[1], [2]]]).T)
    (True, True)
    >>> _is_rectangle(np.array([[[1], [2]], [[3], [4]]]))
    False
    """
    for label in np.unique(labels[labels != NONE]):
        held = (labels == label).any(-1)
        places = np.nonzero(held)
        along = [len(np.unique(place)) for place in places]
        if not any(held.sum() == held.size // size * n for size, n in zip(held.shape, along, strict=True)):
            return False
    return True


def _components(
    model: nn.Module, found: Flow, sides: _Sides
) -> Iterator[tuple[str, np.ndarray, list[_Part]]]:
    """Yield each connected component: the first layer that makes its channels, their labels, its parts."""
    connected = Ties()
    connected.new(1 + max((int(use.labels.max()) for use in sides.values() if use.labels.size), default=0))
    axes = [] if found.axes is None else [found.ties.find(vector) for vector in found.axes.vectors_made]
    for vector in axes:
        vector = vector[vector < connected.size]
        connected.union(vector[:-1], vector[1:])
    along_axes = np.unique(np.concatenate([np.arange(0), *axes]))
    makers = [
        (name, use.labels)
        for (name, side), use in sides.items()
        if side == "out" and makes_channels(submodule(model, name))
    ]
    for _, labels in makers:
        plain = labels[(labels != NONE) & ~is_among(labels, along_axes)] if len(along_axes) else labels[:, 0]
        connected.union(plain[:-1], plain[1:])

    parts_of: dict[int, list[_Part]] = {}
    for (name, side), use in sides.items():
        at, column = np.nonzero(use.labels != NONE)
        labels = use.labels[at, column]
        components = connected.find(labels)
        for in_order in _by_value(components):
            part = _Part(name, side, at[in_order], labels[in_order], use.dim)
            parts_of.setdefault(int(components[in_order[0]]), []).append(part)

    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    roots: dict[int, tuple[str, np.ndarray]] = {}
    for name, labels in sorted(makers, key=lambda maker: _place(order, maker[0])):
        flat = labels[labels != NONE]
        components = connected.find(flat)
        distinct, first = np.unique(components, return_index=True)
        for component in distinct[np.argsort(first)].tolist():
            if component not in roots:
                roots[component] = name, flat[components == component]
    for component, (root, made) in roots.items():
        yield root, made, parts_of[component]


def _place(order: Mapping[str, int], name: str) -> tuple[int, bool]:
    """Return the place of a layer among the modules; a parameter follows the module that holds it."""
    known = order.get(name)
    return (order[name.rpartition(".")[0]], True) if known is None else (known, False)


def _by_value(values: np.ndarray) -> list[np.ndarray]:
    """Return for each distinct value, in order, the places where it occurs, sorted."""
    if not len(values) or (values == values[0]).all():
        return [np.arange(len(values))] if len(values) else []
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def _split(
    root: str, made: np.ndarray, parts_of: list[_Part], reasons: dict[int, str]
) -> Iterator[tuple[Group, np.ndarray, str]]:
    """Split a component into groups whose channels own equal numbers of positions of each part.

    Args:
        root: the name of the first group. made: the labels of its channels.
    """
    channels = _in_order(made, [part.labels for part in parts_of])
    order = np.argsort(channels)
    owned = np.zeros((len(channels), len(parts_of) + 1), dtype=np.int64)
    channel_of = []
    for column, part in enumerate(parts_of):
        channel = order[np.searchsorted(channels, part.labels, sorter=order)]
        owned[:, column] = np.bincount(channel, minlength=len(channels))
        channel_of.append(channel)
    owned[:, -1] = [label in reasons for label in channels.tolist()] if reasons else 0
    kind, first = _unique_rows(owned)
    for count, which in enumerate(np.argsort(first)):
        chosen = np.flatnonzero(kind == which)
        renumbered = np.full(len(channels), -1)
        renumbered[chosen] = np.arange(len(chosen))
        members = []
        for part, channel in zip(parts_of, channel_of, strict=True):
            inside = renumbered[channel] >= 0
            if inside.any():
                index = torch.from_numpy(part.positions[inside])
                owner = torch.from_numpy(renumbered[channel[inside]])
                members.append(Member(part.layer, part.side, index, owner, part.dim))
        name = root if not count else f"{root}/{count + 1}"
        fixed = owned[chosen[0], -1]
        reason = reasons[int(channels[chosen[0]])] if fixed else ""
        yield Group(name, len(chosen), tuple(members)), channels[chosen], reason


def _in_order(first: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Return the distinct labels in the order of their first occurrence."""
    everything = np.concatenate([first, *others])
    labels, place = np.unique(everything, return_index=True)
    return labels[np.argsort(place)]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the number of its distinct row, and where each distinct row occurs first."""
    if (rows == rows[0]).all():
        return np.zeros(len(rows), dtype=np.int64), np.zeros(1, dtype=np.int64)
    _, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return kind.reshape(-1), first
