"""A plan: for each group, the channels it keeps; and the layers that go as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from pruning.budget import LABELS, Budget
from pruning.cost import CostModel
from pruning.errors import PruningError
from pruning.graph import Trace


@dataclass(frozen=True)
class Plan:
    """Which channels each group keeps; frozen, printable, and plain data in JSON.

    >>> plan = Plan(keep={"conv1": (0, 2, 5)})
    >>> plan.widths
    {'conv1': 3}
    >>> Plan.from_json(plan.to_json()) == plan
    True

    `removed` names layers that were removed as a whole before (`pruning.depth`): the groups
    are those of the model without them.

    Raises `PruningError` for a group that would keep nothing, or a channel twice.
    """

    keep: Mapping[str, tuple[int, ...]]
    removed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep = {}
        for group, channels in self.keep.items():
            chosen = tuple(sorted(int(c) for c in channels))
            if not chosen:
                raise PruningError(f"group {group!r} would keep no channel; a group is never emptied")
            if chosen[0] < 0 or len(set(chosen)) != len(chosen):
                raise PruningError(f"group {group!r} keeps {chosen}: channels count from 0, each once")
            keep[group] = chosen
        object.__setattr__(self, "keep", MappingProxyType(keep))
        object.__setattr__(self, "removed", tuple(self.removed))

    @property
    def widths(self) -> dict[str, int]:
        return {group: len(channels) for group, channels in self.keep.items()}

    def to_json(self) -> dict[str, Any]:
        keep = {group: list(channels) for group, channels in self.keep.items()}
        return {"keep": keep, "removed": list(self.removed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        keep = {group: tuple(channels) for group, channels in data["keep"].items()}
        return cls(keep, tuple(data.get("removed", ())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return False
        return dict(self.keep) == dict(other.keep) and self.removed == other.removed

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.keep.items())), self.removed))

    def __repr__(self) -> str:
        removed = f", removed={self.removed!r}" if self.removed else ""
        return f"Plan(keep={dict(self.keep)!r}{removed})"


def plan_within(
    budget: Budget,
    trace: Trace,
    cost_model: CostModel,
    scores: Mapping[str, Tensor],
    *,
    per_cost: bool = True,
    floor: int | Mapping[str, int] = 1,
    most: float = 1.0,
    multiple: int = 1,
) -> Plan:
    """Choose the channels to keep so that the budget is met, dropping the least important.

    One step after the other, the group whose least important channels matter least gives
    them up; once the budget is met, the last dropped come back wherever they still fit.

    Args:
        budget: resolved limits (`Budget.resolve`).
        scores: per group one score per channel; groups without scores are kept whole.
        per_cost: weigh a score by what the channel frees under the limits that are not met
            yet, both as shares; without it the raw scores are ranked over all groups.
        floor: channels that every group (or each named one) keeps at least.
        most: largest share of a group's channels dropped in this plan.
        multiple: widths are multiples of this many channels, or the full width, or the floor.

    Equal scores are told apart by position: the later channel goes first.
    Raises `PruningError` when the floors make the budget unreachable; it says what is least.
    """
    groups = cost_model.groups
    order = {g: _ascending(g, scores[g], trace.groups[g].channels) for g in groups if g in scores}
    lowest = np.array([_lowest(g, order, trace.groups[g].channels, floor, most) for g in groups], float)
    least = cost_model(lowest)
    if over := budget.excess(least):
        reached = " and ".join(f"{getattr(least, what):,} {LABELS[what]}" for what in over)
        floors = ", ".join(f"{g} {int(w)}" for g, w in zip(groups, lowest, strict=True))
        raise PruningError(
            f"the budget {budget} cannot be reached: at the floor of every group ({floors}) the network "
            f"still has {reached}. Raise the budget, lower the floors, or ignore fewer layers"
        )

    widths = cost_model.full.copy()
    history: list[tuple[int, int]] = []
    while over := budget.excess(cost_model(widths)):
        # Down to the next multiple, or to the floor where that comes first.
        steps = np.minimum(np.where(widths % multiple, widths % multiple, multiple), widths - lowest)
        freed = cost_model.freed(widths, steps)
        gain = np.sum([freed[what] / excess for what, excess in over.items()], axis=0)
        best, best_value = -1, np.inf
        for i, group in enumerate(groups):
            if steps[i] <= 0 or gain[i] <= 0:
                continue
            ranked = order[group][1]
            gone = int(cost_model.full[i] - widths[i])
            loss = float(ranked[gone : gone + int(steps[i])].sum())
            value = loss / gain[i] if per_cost else loss / steps[i]
            if value < best_value or best < 0:
                best, best_value = i, value
        assert best >= 0, "the floors reach the budget, so some group can still give channels"
        widths[best] -= steps[best]
        history.append((best, int(steps[best])))

    settled: set[int] = set()  # groups whose last dropped channels do not fit any more
    for group_index, step in reversed(history):
        trial = widths.copy()
        trial[group_index] += step
        if group_index in settled or budget.excess(cost_model(trial)):
            settled.add(group_index)
        else:
            widths = trial

    keep = {}
    for i, group in enumerate(groups):
        gone = int(cost_model.full[i] - widths[i])
        kept = order[group][0][gone:] if group in order else range(trace.groups[group].channels)
        keep[group] = tuple(int(c) for c in kept)
    return Plan(keep)


def _ascending(group: str, scores: Tensor, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels from the least important on, with their scores."""
    values = scores.detach().double().cpu().numpy()
    if values.shape != (channels,):
        raise PruningError(f"scores of group {group!r} have shape {values.shape}, expected ({channels},)")
    if not np.isfinite(values).all():
        raise PruningError(f"scores of group {group!r} are not all finite numbers: {values}")
    ascending = np.lexsort((-np.arange(channels), values))
    return ascending, values[ascending]


def _lowest(
    group: str,
    order: Mapping[str, object],
    channels: int,
    floor: int | Mapping[str, int],
    most: float,
) -> int:
    """The narrowest that a group may get in one plan."""
    if group not in order:
        return channels
    wanted = floor.get(group, 1) if isinstance(floor, Mapping) else floor
    if wanted < 1:
        raise PruningError(f"floor {wanted} of group {group!r}: a group keeps at least 1 channel")
    return min(channels, max(wanted, math.ceil(channels * (1 - most) - 1e-9)))
