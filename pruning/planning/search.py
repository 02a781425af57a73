"""Choose the channels to keep within a budget, by a greedy search over the widths of all groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.alike import AlikeGroups
from pruning.planning.budget import LABELS, Budget
from pruning.planning.cost import Cost, CostModel
from pruning.planning.options import PlanOptions
from pruning.planning.width_limits import ways_to_narrow, width_multiples, width_range

#: By group, its channels in ascending order of importance, and their scores in that order.
Order = Mapping[str, tuple[np.ndarray, np.ndarray]]

#: Largest number of exchange rounds, and the least share of a limit that a step must free to be exchanged:
#: with finer steps, exchanges hardly improve the greedy result.
EXCHANGE_ROUNDS, LEAST_EXCHANGE = 8, 2e-3

DEFAULT_OPTIONS = PlanOptions()

#: Most groups that an error shows.
SHOWN = 8


def plan_within(
    budget: Budget,
    trace: Trace,
    cost_model: CostModel,
    scores: Mapping[str, Tensor],
    options: PlanOptions = DEFAULT_OPTIONS,
) -> Plan:
    """Choose the channels to keep so that the budget is met, dropping the least important.

    Each step of a greedy search narrows the group whose least important channels have the lowest
    score per cost freed. Once the budget is met, dropped channels are restored, the last dropped first,
    if they still fit, and groups exchange channels as long as this raises the total score kept.

    Args:
        budget: limits as counts (`Budget.resolve`).
        trace: of the model. cost_model: of the same trace.
        scores: by group, the score of each channel, (channels,); a group without scores keeps all
            channels. Of equal scores the later channel is dropped first.
        options: see `PlanOptions`.

    Returns:
        The channels that each group keeps.

    Raises:
        PruningError: if the floors make the budget unreachable (the message names the least cost), if
            scores have the wrong shape or are not finite, and if `options` names a width or group that
            the model does not have.

    >>> from pruning.tracing.trace import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> traced = trace(net, torch.zeros(1, 3))
    >>> scores = {"0": torch.tensor([0.5, 0.1, 0.9, 0.2])}
    >>> plan_within(Budget(channels=2), traced, CostModel(net, traced), scores)
    Plan(keep={'0': (0, 2)})
    """
    order = ascending(trace, scores)
    lowest, highest = width_range(trace, order, options)
    multiples, ways = width_multiples(trace, options), ways_to_narrow(trace, order, options)
    if not options.alike:
        _require_reachable(budget, cost_model, lowest, ways)
        widths = _search(budget, cost_model, order, (lowest, highest, multiples), options)
        return most_important(trace, order, widths)
    sets = AlikeGroups(cost_model, options.alike)
    limits = sets.bounds(lowest, highest, multiples)
    _require_reachable(budget, sets, limits[0], ways)
    widths = _search(budget, sets, sets.order(order), limits, options)
    return most_important(trace, order, sets.expanded(widths))


def least_cost(
    trace: Trace,
    cost_model: CostModel,
    scores: Mapping[str, Tensor],
    options: PlanOptions = DEFAULT_OPTIONS,
) -> Cost:
    """Return the cost with every group at its least width; no plan with these options costs less.

    Args:
        trace, cost_model, scores, options: as in `plan_within`.
    """
    lowest, highest = width_range(trace, ascending(trace, scores), options)
    if not options.alike:
        return cost_model(lowest)
    sets = AlikeGroups(cost_model, options.alike)
    return sets(sets.bounds(lowest, highest, width_multiples(trace, options))[0])


def _search(
    budget: Budget,
    cost_model: CostModel | AlikeGroups,
    order: Order,
    limits: tuple[np.ndarray, np.ndarray, np.ndarray],
    options: PlanOptions,
) -> np.ndarray:
    """Return the widths; `limits` are the least and greatest of each group, and of what it is a multiple."""
    if options.ranking == "group":
        return _equal_shares(budget, cost_model, *limits)
    return _GreedySearch(budget, cost_model, order, *limits, options.per_cost).widths()


def most_important(trace: Trace, order: Order, widths: np.ndarray) -> Plan:
    """Return the plan that keeps the most important channels at the given width of each group."""
    keep = {}
    for (name, group), width in zip(trace.groups.items(), widths, strict=True):
        kept = order[name][0][group.channels - int(width) :] if name in order else range(int(width))
        keep[name] = tuple(int(c) for c in kept)
    return Plan(keep)


def ascending(trace: Trace, scores: Mapping[str, Tensor]) -> Order:
    """Sort the channels of each scored group by importance; of equal scores the later comes first."""
    return {g: _sorted(g, scores[g], group.channels) for g, group in trace.groups.items() if g in scores}


def _require_reachable(
    budget: Budget, cost_model: CostModel | AlikeGroups, lowest: np.ndarray, ways: str
) -> None:
    """Raise `PruningError`, which names the ways to a smaller network, if the least widths cost too much."""
    least = cost_model(lowest)
    if over := budget.excess(least):
        reached = " and ".join(f"{getattr(least, what):,} {LABELS[what]}" for what in over)
        widths = [f"{g} {int(w)}" for g, w in zip(cost_model.groups, lowest, strict=True)]
        shown = ", ".join([*widths[:SHOWN], *(["…"] if widths[SHOWN:] else [])])
        raise PruningError(
            f"the budget {budget} cannot be reached: at the floor of every group ({shown}) the network still "
            f"has {reached}. Raise the budget{_percent_meant(budget, least)}{ways} "
            '(see "Read a refusal" in the documentation)'
        )


def _percent_meant(budget: Budget, least: Cost) -> str:
    """Return a question where a limit may be a percentage without its sign: 50 of thousands of MACs."""
    pairs = ((budget.params, least.params), (budget.macs, least.macs))
    limits = [int(limit) for limit, value in pairs if limit is not None and int(limit) <= 100 < value / 10]
    return f" (did you mean {limits[0]}%?)" if limits else ""


def _equal_shares(
    budget: Budget,
    cost_model: CostModel | AlikeGroups,
    lowest: np.ndarray,
    highest: np.ndarray,
    multiples: np.ndarray,
) -> np.ndarray:
    """Return the widths that keep the same share of each group, the largest that meets the budget."""

    def at(share: float) -> np.ndarray:
        rounded = np.floor(highest * share / multiples + 1e-9) * multiples
        return np.where(share >= 1, highest, np.clip(rounded, lowest, highest))

    # Widths change only at shares at which some group reaches another multiple.
    free = highest > lowest
    steps = {
        k * multiple / n
        for n, multiple in zip(highest[free], multiples[free], strict=True)
        for k in range(int(n // multiple) + 1)
    }
    shares = np.array(sorted({0.0, 1.0, *steps}))
    low, high = 0, len(shares) - 1  # share 0 meets the budget: every group is at its floor
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if budget.excess(cost_model(at(shares[middle]))) else (middle, high)
    return at(shares[low])


class _GreedySearch:
    """Search widths within a budget; each step changes the width of one group.

    A step goes to the group's next multiple, or to its least or greatest width.
    """

    def __init__(
        self,
        budget: Budget,
        cost_model: CostModel | AlikeGroups,
        order: Order,
        lowest: np.ndarray,
        highest: np.ndarray,
        multiples: np.ndarray,
        per_cost: bool,
    ):
        self.budget, self.cost_model = budget, cost_model
        self.lowest, self.highest = lowest, highest
        self.multiples, self.per_cost = multiples, per_cost
        #: For each group, entry k is the total score of its k least important channels.
        self.dropped_score = [
            np.concatenate(([0.0], np.cumsum(order[group][1]))) if group in order else np.zeros(int(n) + 1)
            for group, n in zip(cost_model.groups, cost_model.full, strict=True)
        ]

    def widths(self) -> np.ndarray:
        """Return the widths found, (groups,)."""
        widths, steps = self._narrow(self.highest)
        widths = self._undo_steps(widths, steps)
        return self._exchange(widths) if self.per_cost else widths

    def _narrow(
        self, widths: np.ndarray, fixed: int | None = None
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Narrow groups until the budget is met, each time by the step with the least score lost.

        The group `fixed` is not narrowed; the result exceeds the budget if the others are not enough.

        Returns the widths, and the steps taken as (group, channels).
        """
        widths, history = widths.copy(), list[tuple[int, int]]()
        while over := self.budget.excess(self.cost_model(widths)):
            steps = self._steps_down(widths)
            freed = self.cost_model.freed(widths, steps)
            gain = np.sum([freed[what] / excess for what, excess in over.items()], axis=0)
            best, best_value = -1, np.inf
            for i in range(len(widths)):
                if steps[i] <= 0 or gain[i] <= 0 or i == fixed:
                    continue
                loss = -self._score_gained(i, widths, -steps[i])
                value = loss / gain[i] if self.per_cost else loss / steps[i]
                if value < best_value or best < 0:
                    best, best_value = i, value
            if best < 0:
                break
            widths[best] -= steps[best]
            history.append((best, int(steps[best])))
        return widths, history

    def _undo_steps(self, widths: np.ndarray, steps: list[tuple[int, int]]) -> np.ndarray:
        """Restore dropped channels, the last dropped first, as far as the budget allows."""
        full_groups: set[int] = set()  # groups in which a step did not fit; earlier steps are not tried
        for group, step in reversed(steps):
            trial = widths.copy()
            trial[group] += step
            if group in full_groups or self.budget.excess(self.cost_model(trial)):
                full_groups.add(group)
            else:
                widths = trial
        return widths

    def _exchange(self, widths: np.ndarray) -> np.ndarray:
        """Exchange channels between groups as long as this raises the total score kept.

        One group takes a step down or up; then the other groups are narrowed until the budget is met,
        and widened as far as it allows. This corrects the greedy search, which does not look ahead: it
        drops many channels with low scores where one with a higher score would free as much.
        """
        limits = self.budget.limits()
        for _ in range(EXCHANGE_ROUNDS):
            before = widths
            freed = self.cost_model.freed(
                widths, np.maximum(self._steps_down(widths), self._steps_up(widths))
            )
            share = np.max([freed[what] / limit for what, limit in limits.items()], axis=0)
            for group in np.flatnonzero(share > LEAST_EXCHANGE).tolist():
                for steps in (-self._steps_down(widths), self._steps_up(widths)):
                    if not steps[group]:
                        continue
                    trial = widths.copy()
                    trial[group] += steps[group]
                    trial, _ = self._narrow(trial, fixed=group)
                    trial = self._fill(trial, fixed=group)
                    tolerance = 1e-9 * abs(self._score_kept(self.lowest))
                    better = self._score_kept(trial) > self._score_kept(widths) + tolerance
                    if better and not self.budget.excess(self.cost_model(trial)):
                        widths = trial
            if np.array_equal(before, widths):
                break
        return widths

    def _fill(self, widths: np.ndarray, fixed: int) -> np.ndarray:
        """Widen groups other than `fixed` while steps fit, the most score per share of the budget first."""
        widths = widths.copy()
        limits = self.budget.limits()
        while True:
            steps, cost = self._steps_up(widths), self.cost_model(widths)
            freed = self.cost_model.freed(widths, -steps)
            fits = np.all(
                [np.round(getattr(cost, w) - freed[w]) <= limit for w, limit in limits.items()], axis=0
            )
            best, best_value = -1, 0.0
            for i in np.flatnonzero((steps > 0) & fits).tolist():
                share = sum(-freed[what][i] / limits[what] for what in limits)
                value = self._score_gained(i, widths, steps[i]) / max(share, 1e-12)
                if value > best_value and i != fixed:
                    best, best_value = i, value
            if best < 0:
                return widths
            widths[best] += steps[best]

    def _steps_down(self, widths: np.ndarray) -> np.ndarray:
        """Return the channels that a step removes from each group, (groups,); 0 at its least width."""
        to_multiple = np.where(widths % self.multiples, widths % self.multiples, self.multiples)
        return np.minimum(to_multiple, widths - self.lowest)

    def _steps_up(self, widths: np.ndarray) -> np.ndarray:
        """Return the channels that a step restores to each group, (groups,); 0 at its greatest width."""
        return np.minimum(self.multiples - widths % self.multiples, self.highest - widths)

    def _score_gained(self, group: int, widths: np.ndarray, change: float) -> float:
        """Return the change of the total score kept if a group's width changes by `change` channels."""
        dropped, total = int(self.cost_model.full[group] - widths[group]), self.dropped_score[group]
        return float(total[dropped] - total[dropped - int(change)])

    def _score_kept(self, widths: np.ndarray) -> float:
        """Return the total score of the kept channels, minus that of all channels."""
        dropped = (self.cost_model.full - widths).astype(int)
        return -float(sum(total[k] for total, k in zip(self.dropped_score, dropped, strict=True)))


def _sorted(group: str, scores: Tensor, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a group's channels in ascending order of their scores, and the scores in that order."""
    values = torch.as_tensor(scores).detach().double().cpu().numpy()
    if values.shape != (channels,):
        raise PruningError(f"scores of group {group!r} have shape {values.shape}: expected ({channels},)")
    if not np.isfinite(values).all():
        raise PruningError(f"scores of group {group!r}: expected finite numbers, got {values}")
    order = np.lexsort((-np.arange(channels), values))
    return order, values[order]
