"""Build channel groups from tied labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from pruning.graph.groups import Group, Member, Reduction
from pruning.graph.layers import makes_channels
from pruning.graph.rule import Side
from pruning.tracing.labels import Flow, SideUse
from pruning.tracing.ties import Ties


@dataclass(frozen=True)
class _Part:
    """Sorted positions of one side of a layer that belong to one component; `dim` as in `SideUse`."""

    layer: str
    side: Side
    positions: np.ndarray
    labels: np.ndarray
    dim: int


def channel_groups(model: nn.Module, found: Flow) -> Iterator[tuple[Group, np.ndarray, str]]:
    """Yield each channel group with its labels and the reason why it is fixed, "" if it is not.

    Layers that share a tied channel belong to the same connected component. A component is split into
    groups by the number of positions that its channels own (only some may take part in a sum), so that
    all channels of a group cost the same. Fixed channels form groups of their own.
    """
    sides, reasons = _final_sides(found)
    reductions = _reductions(found)
    for root, parts_of in _components(model, sides):
        for group, channels, reason in _split(root, sides[root, "out"].labels, parts_of, reasons):
            yield replace(group, reductions=tuple(_over(channels, reductions))), channels, reason


def _reductions(found: Flow) -> dict[tuple[str, str, int], SideUse]:
    """Return the statistics over channels, with each label replaced by the smallest one tied to it."""
    return {place: SideUse(found.ties.find(use.labels), use.dim) for place, use in found.reductions.items()}


def _over(channels: np.ndarray, reductions: dict[tuple[str, str, int], SideUse]) -> Iterator[Reduction]:
    """Yield the statistics over channels of one group, given by their labels."""
    order = np.argsort(channels)
    for place, use in reductions.items():
        index = np.flatnonzero(np.isin(use.labels, channels))
        if len(index):
            owner = order[np.searchsorted(channels, use.labels[index], sorter=order)]
            yield Reduction(*place, torch.from_numpy(index), torch.from_numpy(owner), use.dim)


def _final_sides(found: Flow) -> tuple[dict[tuple[str, Side], SideUse], dict[int, str]]:
    """Return all sides with each label replaced by the smallest one tied to it, and why labels are fixed.

    The labels of a tensor outside the layers are reduced to a vector along its channel dimension;
    tensors without channels are omitted.
    """
    made = [found.ties.find(use.labels) for (_, side), use in found.sides.items() if side == "out"]
    known = np.unique(np.concatenate([np.arange(0), *made]))  # labels of layer outputs
    reasons: dict[int, str] = {}
    for labels, reason in found.fixed:
        for label in np.intersect1d(found.ties.find(labels), known).tolist():
            reasons.setdefault(label, reason)
    sides = {}
    for (name, side), use in found.sides.items():
        labels, dim = found.ties.find(use.labels), use.dim
        if side == "self":
            if not np.isin(labels, known).any():
                continue
            wide = [d for d, size in enumerate(labels.shape) if size > 1]
            channel_dims = [d for d in wide if (labels != labels.take([0], axis=d)).any()]
            if len(channel_dims) > 1:
                why = f"the parameter {name} holds its channels along several dimensions"
                for label in np.intersect1d(labels, known).tolist():
                    reasons.setdefault(label, why)
                continue
            dim = channel_dims[0] if channel_dims else (wide[0] if wide else 0)
            labels = np.moveaxis(labels, dim, 0).reshape(labels.shape[dim] if labels.ndim else 1, -1)[:, 0]
        sides[name, side] = SideUse(labels, dim)
    return sides, reasons


def _components(
    model: nn.Module, sides: dict[tuple[str, Side], SideUse]
) -> Iterator[tuple[str, list[_Part]]]:
    """Yield each connected component: the first layer that makes its channels, and its parts of sides."""
    connected = Ties()
    connected.new(1 + max((int(use.labels.max()) for use in sides.values() if len(use.labels)), default=0))
    makers = [
        (name, use.labels)
        for (name, side), use in sides.items()
        if side == "out" and makes_channels(model.get_submodule(name))
    ]
    for _, labels in makers:
        connected.union(labels[:-1], labels[1:])

    parts_of: dict[int, list[_Part]] = {}
    for (name, side), use in sides.items():
        components = connected.find(use.labels)
        by_component = np.argsort(components, kind="stable")
        bounds = np.flatnonzero(np.diff(components[by_component], prepend=-2))
        for chosen in np.split(by_component, bounds[1:]):
            at = np.sort(chosen)
            part = _Part(name, side, at, use.labels[at], use.dim)
            parts_of.setdefault(int(components[chosen[0]]), []).append(part)

    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    roots: dict[int, str] = {}
    for name, labels in sorted(makers, key=lambda maker: order[maker[0]]):
        roots.setdefault(int(connected.find(labels[:1])[0]), name)
    for component, root in roots.items():
        yield root, parts_of[component]


def _split(
    root: str, made: np.ndarray, parts_of: list[_Part], reasons: dict[int, str]
) -> Iterator[tuple[Group, np.ndarray, str]]:
    """Split a component into groups whose channels own equal numbers of positions of each part.

    Args:
        root: the layer that names the groups. made: the labels of its channels.
    """
    channels = _in_order(made, [part.labels for part in parts_of])
    number = {int(label): c for c, label in enumerate(channels)}
    owned = np.zeros((len(channels), len(parts_of) + 1), dtype=np.int64)
    channel_of = []
    for column, part in enumerate(parts_of):
        channel = np.array([number[int(label)] for label in part.labels])
        np.add.at(owned[:, column], channel, 1)
        channel_of.append(channel)
    owned[:, -1] = [int(label) in reasons for label in channels]
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
        reason = next((reasons[int(x)] for x in channels[chosen] if int(x) in reasons), "")
        yield Group(name, len(chosen), tuple(members)), channels[chosen], reason


def _in_order(first: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Return the distinct labels in the order of their first occurrence."""
    everything = np.concatenate([first, *others])
    labels, place = np.unique(everything, return_index=True)
    return labels[np.argsort(place)]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the number of its distinct row, and where each distinct row occurs first."""
    _, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return kind.reshape(-1), first
