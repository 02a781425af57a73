"""Join groups whose width is one attribute of a module: its code gives the same number to several views.

Attention often divides q, k and v by one `head_dim`. The widths of q and k and that of v are then two groups,
neither of which can be narrowed alone; channels at the same places of both are pruned together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from pruning.graph.groups import Group
from pruning.tracing.record import Flow

#: The last part of the name of a joined group.
JOINED = "width"


def joined_groups(
    names: Iterable[str],
    groups: Mapping[str, Group],
    attributes: Mapping[str, set[tuple[str, str]]],
) -> Iterator[tuple[list[str], Group]]:
    """Yield sets of groups that share an attribute, each with the group that they form together.

    Args:
        names: groups that cannot be narrowed alone. groups: all groups.
        attributes: by group, the module and name of each attribute that may hold its width.
    """
    waiting = [name for name in names if attributes.get(name)]
    while waiting:
        first, *waiting = waiting
        together, shared = [first], set(attributes[first])
        while more := [
            name
            for name in waiting
            if attributes[name] & shared and groups[name].channels == groups[first].channels
        ]:
            together += more
            shared.update(*(attributes[name] for name in more))
            waiting = [name for name in waiting if name not in more]
        if len(together) > 1:
            parts = [groups[name] for name in together]
            yield (
                together,
                replace(
                    groups[first],
                    name=f"{first.rpartition('/')[0] or first}/{JOINED}",
                    members=tuple(member for part in parts for member in part.members),
                    reductions=tuple(reduction for part in parts for reduction in part.reductions),
                ),
            )


def tie_groups(found: Flow, labels: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Tie the channels at the same places of several groups, and return their labels."""
    first, *others = (labels[name] for name in names)
    for other in others:
        found.ties.union(first, other)
    if found.axes is not None:
        found.axes.renew()
    return found.ties.find(first)
