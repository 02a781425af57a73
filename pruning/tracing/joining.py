"""Join groups whose width is one attribute of a module: its code gives the same number to several views.

Attention often divides q, k and v by one `head_dim`. The widths of q and k and that of v are then two groups,
neither of which can be narrowed alone; channels at the same places of both are pruned together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn

from pruning.surgery.width_attributes import attributes_with
from pruning.tracing.record import Flow
from pruning.tracing.ties import NONE


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
        if np.isin(found.channels(extent.labels), channels).any():
            module = model.get_submodule(extent.module)
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
