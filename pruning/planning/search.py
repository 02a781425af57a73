"""A plan: for each group, the channels it keeps; and the layers that go as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import LABELS, Budget
from pruning.planning.cost import CostModel

#: For each group its channels from the least important on, and their scores in that order.
Order = Mapping[str, tuple[np.ndarray, np.ndarray]]

#: How channels of different groups are compared.
RANKINGS = ("global", "group")


def plan_within(
    budget: Budget,
    trace: Trace,
    cost_model: CostModel,
    scores: Mapping[str, Tensor],
    *,
    ranking: str = "global",
    per_cost: bool = True,
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int = 1,
    widths: Mapping[str, int | str] | None = None,
) -> Plan:
    """Choose the channels to keep so that the budget is met, dropping the least important.

    One step after the other, the group whose least important channels matter least gives
    them up; once the budget is met, the last dropped come back wherever they still fit, and
    groups exchange channels as long as those that are kept then matter more together.

    Args:
        budget: resolved limits (`Budget.resolve`).
        scores: per group one score per channel; groups without scores are kept whole.
        ranking: `global` compares the scores of all groups; `group` takes the same share of
            every group, the largest share of channels kept with which the budget is met.
        per_cost: weigh a score by what the channel frees under the limits that are not met
            yet, both as shares; without it the raw scores are ranked over all groups.
        floor: channels that every group keeps at least, or by name or pattern (`layer4.*`).
        most: largest share of a group's channels dropped in this plan, likewise.
        multiple: widths are multiples of this many channels, or the full width, or the floor.
        widths: exact widths of some groups by name or pattern: a count, or a percentage.

    Equal scores are told apart by position: the later channel goes first.
    Raises `PruningError` when the floors make the budget unreachable; it says what is least.
    """
    if ranking not in RANKINGS:
        raise PruningError(f"ranking {ranking!r}: one of {', '.join(RANKINGS)}")
    require_multiple(multiple)
    groups = cost_model.groups
    order = ascending(trace, scores)
    lowest, full = lowest_widths(trace, order, floor, most), cost_model.full.copy()
    exact = _by_group({} if widths is None else widths, groups)
    for i, g in enumerate(groups):
        if g in exact:
            lowest[i] = full[i] = _exact_width(g, exact[g], trace.groups[g].channels)
    least = cost_model(lowest)
    if over := budget.excess(least):
        reached = " and ".join(f"{getattr(least, what):,} {LABELS[what]}" for what in over)
        least_widths = ", ".join(f"{g} {int(w)}" for g, w in zip(groups, lowest, strict=True))
        raise PruningError(
            f"the budget {budget} cannot be reached: at the floor of every group ({least_widths}) the "
            f"network still has {reached}. Raise the budget, lower the floors, or ignore fewer layers"
        )
    if ranking == "group":
        chosen = _same_share(budget, cost_model, lowest, full, multiple)
    else:
        chosen = _Search(budget, cost_model, order, lowest, full, multiple, per_cost).widths()

    return most_important(trace, order, chosen)


def most_important(trace: Trace, order: Order, widths: np.ndarray) -> Plan:
    """The plan that keeps the most important channels at the given width of each group."""
    keep = {}
    for (name, group), width in zip(trace.groups.items(), widths, strict=True):
        kept = order[name][0][group.channels - int(width) :] if name in order else range(int(width))
        keep[name] = tuple(int(c) for c in kept)
    return Plan(keep)


def ascending(trace: Trace, scores: Mapping[str, Tensor]) -> Order:
    """The channels of each scored group from the least important on; of equals the later goes first."""
    return {g: _ascending(g, scores[g], group.channels) for g, group in trace.groups.items() if g in scores}


def require_multiple(multiple: int) -> None:
    """Raise `PruningError` for what widths cannot be multiples of."""
    if not isinstance(multiple, int) or multiple < 1:
        raise PruningError(f"multiple {multiple!r}: widths are multiples of a whole number from 1")


def lowest_widths(
    trace: Trace, order: Order, floor: int | Mapping[str, int], most: float | Mapping[str, float]
) -> np.ndarray:
    """How narrow each group may get in one plan, (groups,); those without scores stay as they are."""
    floors, shares = (_by_group(setting, list(trace.groups)) for setting in (floor, most))
    return np.array(
        [
            _lowest(name, group.channels, floors.get(name, 1), shares.get(name, 1.0))
            if name in order
            else group.channels
            for name, group in trace.groups.items()
        ],
        dtype=np.float64,
    )


def _same_share(
    budget: Budget, cost_model: CostModel, lowest: np.ndarray, full: np.ndarray, multiple: int
) -> np.ndarray:
    """The widths that keep the largest share of every group with which the budget is met."""

    def at(share: float) -> np.ndarray:
        rounded = np.floor(full * share / multiple + 1e-9) * multiple
        return np.where(share >= 1, full, np.clip(rounded, lowest, full))

    # Widths change where the share of some group reaches another multiple.
    steps = {k * multiple / n for n in full[full > lowest] for k in range(int(n) // multiple + 1)}
    shares = np.array(sorted({0.0, 1.0, *steps}))
    low, high = 0, len(shares) - 1  # the first is met: at it every group is at its floor
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if budget.excess(cost_model(at(shares[middle]))) else (middle, high)
    return at(shares[low])


class _Search:
    """Widths within a budget, changed in steps: of a group to the next multiple, its floor or full width."""

    def __init__(
        self,
        budget: Budget,
        cost_model: CostModel,
        order: Order,
        lowest: np.ndarray,
        full: np.ndarray,
        multiple: int,
        per_cost: bool,
    ):
        self.budget, self.cost_model, self.per_cost = budget, cost_model, per_cost
        self.lowest, self.full, self.multiple = lowest, full, multiple
        #: For every group what its least important channels matter together, by how many they are.
        self.lost = [
            np.concatenate(([0.0], np.cumsum(order[group][1]))) if group in order else np.zeros(int(n) + 1)
            for group, n in zip(cost_model.groups, cost_model.full, strict=True)
        ]

    def widths(self) -> np.ndarray:
        """The widths after the least important channels of all groups went, one step at a time."""
        widths, history = self.narrowed(self.full)
        settled: set[int] = set()  # groups whose last dropped channels do not fit any more
        for group, step in reversed(history):
            trial = widths.copy()
            trial[group] += step
            if group in settled or self.budget.excess(self.cost_model(trial)):
                settled.add(group)
            else:
                widths = trial
        return self.exchanged(widths) if self.per_cost else widths

    def down(self, widths: np.ndarray) -> np.ndarray:
        """How many channels a step takes from every group; 0 at its floor."""
        to_multiple = np.where(widths % self.multiple, widths % self.multiple, self.multiple)
        return np.minimum(to_multiple, widths - self.lowest)

    def up(self, widths: np.ndarray) -> np.ndarray:
        """How many a step gives back; 0 at the full width."""
        return np.minimum(self.multiple - widths % self.multiple, self.full - widths)

    def importance(self, group: int, widths: np.ndarray, change: float) -> float:
        """What the channels matter that a group gains, or loses, by a change of its width."""
        gone, lost = int(self.cost_model.full[group] - widths[group]), self.lost[group]
        return float(lost[gone] - lost[gone - int(change)])

    def narrowed(
        self, widths: np.ndarray, held: int | None = None
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The widths that meet the budget, and the steps to there, each of the group that loses least.

        A group that is held gives none; where the others cannot meet the budget alone, it is not met.
        """
        widths, history = widths.copy(), list[tuple[int, int]]()
        while over := self.budget.excess(self.cost_model(widths)):
            steps = self.down(widths)
            freed = self.cost_model.freed(widths, steps)
            gain = np.sum([freed[what] / excess for what, excess in over.items()], axis=0)
            best, best_value = -1, np.inf
            for i in range(len(widths)):
                if steps[i] <= 0 or gain[i] <= 0 or i == held:
                    continue
                loss = -self.importance(i, widths, -steps[i])
                value = loss / gain[i] if self.per_cost else loss / steps[i]
                if value < best_value or best < 0:
                    best, best_value = i, value
            if best < 0:
                break
            widths[best] -= steps[best]
            history.append((best, int(steps[best])))
        return widths, history

    def filled(self, widths: np.ndarray, held: int) -> np.ndarray:
        """The widths with what still fits, first what matters most for its share of the budget."""
        widths = widths.copy()
        limits = self.budget.limits()
        while True:
            steps, cost = self.up(widths), self.cost_model(widths)
            freed = self.cost_model.freed(widths, -steps)
            fits = np.all(
                [np.round(getattr(cost, w) - freed[w]) <= limit for w, limit in limits.items()], axis=0
            )
            best, best_value = -1, 0.0
            for i in np.flatnonzero((steps > 0) & fits).tolist():
                share = sum(-freed[what][i] / limits[what] for what in limits)
                value = self.importance(i, widths, steps[i]) / max(share, 1e-12)
                if value > best_value and i != held:
                    best, best_value = i, value
            if best < 0:
                return widths
            widths[best] += steps[best]

    def exchanged(self, widths: np.ndarray) -> np.ndarray:
        """The widths after exchanges of channels between groups that leave more importance in the network.

        A step of one group, either way; what then is too much goes from the others, and what
        fits comes back to them. One step after the other does not look ahead: it takes many
        channels that each matter little where a single one, which matters more than each of
        them, would have done.
        """
        limits = self.budget.limits()
        for _ in range(MOST_EXCHANGES):
            before = widths
            freed = self.cost_model.freed(widths, np.maximum(self.down(widths), self.up(widths)))
            share = np.max([freed[what] / limit for what, limit in limits.items()], axis=0)
            for group in np.flatnonzero(share > LEAST_EXCHANGE).tolist():
                for steps in (-self.down(widths), self.up(widths)):
                    if not steps[group]:
                        continue
                    trial = widths.copy()
                    trial[group] += steps[group]
                    trial, _ = self.narrowed(trial, held=group)
                    trial = self.filled(trial, held=group)
                    better = self.matters(trial) > self.matters(widths) + 1e-9 * abs(
                        self.matters(self.lowest)
                    )
                    if better and not self.budget.excess(self.cost_model(trial)):
                        widths = trial
            if np.array_equal(before, widths):
                break
        return widths

    def matters(self, widths: np.ndarray) -> float:
        """What the channels matter together that these widths keep, less what all do."""
        gone = (self.cost_model.full - widths).astype(int)
        return -float(sum(lost[g] for lost, g in zip(self.lost, gone, strict=True)))


#: Times that every group is tried for an exchange of channels with others, and the share of a limit
#: that a step of it is at least: where steps are finer, one after the other leaves nothing to gain.
MOST_EXCHANGES, LEAST_EXCHANGE = 8, 2e-3


def _ascending(group: str, scores: Tensor, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels from the least important on, with their scores."""
    values = torch.as_tensor(scores).detach().double().cpu().numpy()
    if values.shape != (channels,):
        raise PruningError(f"scores of group {group!r} have shape {values.shape}, expected ({channels},)")
    if not np.isfinite(values).all():
        raise PruningError(f"scores of group {group!r} are not all finite numbers: {values}")
    ascending = np.lexsort((-np.arange(channels), values))
    return ascending, values[ascending]


def _lowest(group: str, channels: int, floor: int, most: float) -> int:
    """The narrowest that a group may get in one plan."""
    if not isinstance(floor, int) or floor < 1:
        raise PruningError(f"floor {floor!r} of group {group!r}: a whole number of channels, at least 1")
    if not 0 <= most <= 1:
        raise PruningError(f"share {most} of group {group!r} that may be dropped: from 0 to 1")
    return min(channels, max(floor, math.ceil(channels * (1 - most) - 1e-9)))


def _exact_width(group: str, wanted: int | str, channels: int) -> int:
    """A width that was asked for, in channels."""
    text = str(wanted).strip()
    try:
        width = round(float(text[:-1]) / 100 * channels) if text.endswith("%") else int(text)
    except ValueError:
        width = 0
    if not 1 <= width <= channels:
        raise PruningError(
            f"width {wanted!r} of group {group!r}: expected a count from 1 to {channels}, or a percentage"
        )
    return width


def _by_group(setting: Any, groups: Sequence[str]) -> dict[str, Any]:
    """A setting for all groups, or by name or pattern, of which the last that fits counts."""
    if not isinstance(setting, Mapping):
        return dict.fromkeys(groups, setting)
    found = {}
    for pattern, value in setting.items():
        matched = [g for g in groups if fnmatchcase(g, pattern)]
        if not matched:
            raise PruningError(
                f"{pattern!r} is no group of this model; there are: {', '.join(groups) or 'none'}"
            )
        found.update(dict.fromkeys(matched, value))
    return found
