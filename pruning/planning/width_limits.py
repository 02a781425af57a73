"""The least and the greatest width of each group, and of what number it is a multiple."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from pruning.errors import PruningError
from pruning.graph.groups import Group, Trace
from pruning.planning.options import PlanOptions, per_group


def lowest_widths(trace: Trace, scored: Container[str], options: PlanOptions) -> np.ndarray:
    """Return the least width of each group, (groups,); a group without scores keeps all channels."""
    groups, multiples = list(trace.groups), width_multiples(trace, options).astype(int).tolist()
    floors = per_group(options.floor, groups) if options.floor is not None else {}
    shares = per_group(options.most, groups)

    def lowest(name: str, group: Group, multiple: int) -> int:
        channels, needed = group.channels, group.multiple
        if name not in scored:
            return channels
        by_share = math.ceil((channels * (1 - shares.get(name, 1.0)) - 1e-9) / multiple) * multiple
        floor = math.ceil(floors.get(name, multiple) / needed) * needed
        return min(channels, max(floor, by_share))

    each = zip(trace.groups.items(), multiples, strict=True)
    return np.array([lowest(name, group, multiple) for (name, group), multiple in each], dtype=np.float64)


def width_multiples(trace: Trace, options: PlanOptions) -> np.ndarray:
    """Return the numbers of which the widths of the groups are multiples, (groups,)."""
    return np.array([math.lcm(options.multiple, g.multiple) for g in trace.groups.values()], dtype=np.float64)


def width_range(trace: Trace, scored: Container[str], options: PlanOptions) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest width of each group, (groups,) each; equal for exact widths."""
    lowest = lowest_widths(trace, scored, options)
    highest = np.array([group.channels for group in trace.groups.values()], dtype=np.float64)
    exact: dict[str, int | str] = per_group(options.widths or {}, list(trace.groups))
    multiples = width_multiples(trace, options).astype(int).tolist()
    for i, (name, group) in enumerate(trace.groups.items()):
        if name in exact:
            lowest[i] = highest[i] = _exact_width(group, exact[name], multiples[i])
    return lowest, highest


def ways_to_narrow(trace: Trace, scored: Container[str], options: PlanOptions) -> str:
    """Return what lets a network become smaller, as the end of `Raise the budget`; empty if nothing does."""
    share, ways = "", []
    if (lowest_widths(trace, scored, options) > 1).any():
        share = ", or the share of a group that is dropped at most (`most`)"
        ways.append("lower the floors")
    if options.widths:
        ways.append("give fewer exact widths")
    if trace.ignored:
        ways.append("ignore fewer layers")
    return share + ", ".join(["", *ways[:-1], f"or {ways[-1]}"]) if ways else ""


def _exact_width(group: Group, wanted: int | str, multiple: int) -> int:
    """Convert an exact width to a number of channels: a count, or a percentage, rounded to a multiple."""
    text, channels = str(wanted).strip(), group.channels
    said = f"width {wanted!r} of group {group.name!r}: expected"
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            width = max(1, round(share * channels / multiple)) * multiple if 0 < share <= 1 else 0
            width = channels if share == 1 else min(width, channels)
        else:
            width = int(text)
    except ValueError:
        width = 0
    if not 1 <= width <= channels:
        raise PruningError(f"{said} a count from 1 to {channels}, or a percentage")
    if width % group.multiple and width < channels:
        raise PruningError(f"{said} a multiple of {group.multiple}, as products in the model's code need")
    return width
