"""Join groups whose widths the code takes from one number, so that none of them can be narrowed alone.

Attention often divides q, k and v by one `head_dim`: channels at the same places of q, k and v are then
pruned together. Or it takes the size of a head from its input (`C // self.num_heads`): then each channel of
its input is pruned with the position of q, k and v that has its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn

from pruning.surgery.width_attributes import attributes_with
from pruning.tracing.grouping import is_along_axis
from pruning.tracing.record import Flow
from pruning.tracing.ties import NONE, is_among
from pruning.utils.modules import submodule


def tie_equal_sizes(
    model: nn.Module,
    found: Flow,
    labels: Mapping[str, np.ndarray],
    names: Iterable[str],
    reads: Mapping[str, set[str]],
) -> bool:
    """Tie channels at the same places of views whose sizes one attribute may hold; return whether any are.

    Args:
        labels: by group, the labels of its channels. names: groups that cannot be narrowed alone.
        reads: by module, the attributes that its code reads.
    """
    channels = np.unique(np.concatenate([np.arange(0), *(labels[name] for name in names)]))
    by_attribute: dict[tuple[str, str, tuple[int, ...]], list[np.ndarray]] = {}
    for extent in found.extents:
        if is_among(found.channels(extent.labels), channels).any():
            module = submodule(model, extent.module)
            for attribute, entries in attributes_with(module, len(extent.labels)):
                if reads and attribute not in reads.get(extent.module, ()):
                    continue
                by_attribute.setdefault((extent.module, attribute, entries), []).append(extent.labels)
    tied = False
    for first, *others in by_attribute.values():
        for other in others:
            held = (first != NONE) & (other != NONE)
            tied |= not np.array_equal(found.channels(first[held]), found.channels(other[held]))
            found.ties.union(first[held], other[held])
    if tied and found.axes is not None:
        found.axes.renew()
    return tied


def tie_inputs(model: nn.Module, found: Flow, labels: Mapping[str, np.ndarray], names: Iterable[str]) -> bool:
    """Tie the positions of q, k and v to the input channels with their numbers; return whether any are.

    Args:
        labels: by group, the labels of its channels. names: groups that cannot be narrowed alone.
    """
    bound = [labels[name] for name in names]
    channels = np.unique(np.concatenate([np.arange(0), *bound]))
    along = np.unique(np.concatenate([np.arange(0), *(each for each in bound if is_along_axis(found, each))]))
    tied = False
    for (name, side), use in list(found.sides.items()):
        read = found.sides.get((name, "in"))
        if side != "out" or read is None or len(use.labels) % len(read.labels):
            continue
        if not is_among(found.channels(use.labels), along).any():
            continue
        if not is_among(found.channels(read.labels), channels).all():
            continue
        for row in use.labels.reshape(-1, len(read.labels)):
            found.ties.union(row, read.labels)
            tied = True
    if tied and found.axes is not None:
        found.axes.renew()
    return tied


def tie_views(model: nn.Module, found: Flow, labels: Mapping[str, np.ndarray], names: Iterable[str]) -> bool:
    """Tie the channels of views to the input channels whose number code may give as their size.

    `values.view(B, C, H, W)`, with C channels of the input, needs as many values as there are inputs. Returns
    whether any are tied.

    Args:
        labels: by group, the labels of its channels. names: groups that cannot be narrowed alone.
    """
    channels = np.unique(np.concatenate([np.arange(0), *(labels[name] for name in names)]))
    tied = False
    for extent in found.extents:
        viewed = found.channels(extent.labels)
        if not is_among(viewed, channels).all():
            continue
        inside = f"{extent.module}." if extent.module else ""
        for (layer, side), use in list(found.sides.items()):
            if side != "in" or not layer.startswith(inside) or len(use.labels) != len(extent.labels):
                continue
            read = found.channels(use.labels)
            if is_among(read, channels).all() and not np.array_equal(read, viewed):
                found.ties.union(extent.labels, use.labels)
                tied = True
    if tied and found.axes is not None:
        found.axes.renew()
    return tied
