"""Plan within a latency budget, by timing networks on this machine.

Fewer MACs do not always take less time: a runtime may pad channels, or spend its time elsewhere.
Therefore the convolutions and linear layers of a model are timed alone at several widths, in the target
runtime (`LatencyTable`). From these times follows a path of widths: each step drops the channels with
the lowest score per time freed. Whole networks on that path are timed together with the dense one, to
find the first that meets the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.layer_times import MAX_WIDTHS, LatencyTable
from pruning.planning.options import PlanOptions
from pruning.planning.search import DEFAULT_OPTIONS, ascending, most_important
from pruning.planning.side_by_side import SideBySideTimer
from pruning.planning.width_limits import lowest_widths, ways_to_narrow, width_multiples
from pruning.utils.tree import Inputs


@dataclass(frozen=True)
class LatencyFound:
    """The times of the dense and the pruned network, measured together: medians, ms per example.

    Attributes:
        dense, pruned: the times. networks: number of pruned networks that were built and timed.

    >>> print(LatencyFound(dense=2.0, pruned=1.0, networks=5))
    1.0000 ms, dense 2.0000 ms (0.50x)
    """

    dense: float
    pruned: float
    networks: int

    def __str__(self) -> str:
        ratio = self.pruned / self.dense
        faster = "" if ratio < 1 else "; pruning does not make it faster here"
        return f"{self.pruned:.4f} ms, dense {self.dense:.4f} ms ({ratio:.2f}x){faster}"


def even_scores(trace: Trace) -> dict[str, Tensor]:
    """Return scores from 1/n to 1 for the n channels of a group, so that all groups are pruned evenly."""
    return {
        name: torch.arange(1, group.channels + 1) / group.channels for name, group in trace.groups.items()
    }


def plan_latency(
    model: nn.Module,
    inputs: Inputs,
    trace: Trace,
    cost_model: CostModel,
    scores: Mapping[str, Tensor],
    budget: LatencyBudget,
    options: PlanOptions = DEFAULT_OPTIONS,
    *,
    dense: nn.Module | None = None,
) -> tuple[Plan, LatencyFound]:
    """Choose the channels to keep so that a forward pass meets a latency budget.

    Args:
        model: the traced model; it is not changed.
        inputs: example inputs.
        trace, cost_model: of the model. scores: by group, the score of each channel, (channels,).
        options: `floor`, `most` and `multiple` apply. With multiple 1 the measured times decide
            which widths are worthwhile.
        dense: the network to compare with; by default the model itself.

    Returns:
        The plan, and the times measured for it.

    Raises:
        PruningError: if no plan is fast enough (the message names the time of the narrowest network),
            and for options that apply only to a `Budget`.
    """
    with LatencyPlanner(model, inputs, trace, cost_model, scores, budget, options, dense=dense) as planner:
        return planner.plan(budget)


class LatencyPlanner:
    """Plans for several limits, from one table of layer times; networks are timed once.

    Args:
        timing: the runtime, threads and examples of a pass, and the seconds of a comparison; its limit is
            not used.
        model, inputs, trace, cost_model, scores, options, dense: as in `plan_latency`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        trace: Trace,
        cost_model: CostModel,
        scores: Mapping[str, Tensor],
        timing: LatencyBudget,
        options: PlanOptions = DEFAULT_OPTIONS,
        *,
        dense: nn.Module | None = None,
    ):
        _require_supported(options)
        self.trace = trace
        timing = replace(timing, batch_size=timing.batch_size or trace.batch.size)
        inputs = timing.batch_of(inputs, trace.batch)
        self.order = ascending(trace, scores)
        self.lowest = lowest_widths(trace, self.order, options)
        self.ways = ways_to_narrow(trace, self.order, options)
        self.multiples = width_multiples(trace, options)
        self.table = LatencyTable(model, inputs, cost_model, timing, self.lowest, self.multiples)
        self.path = self.table.path(self.order)
        if not np.array_equal(self.path[-1], self.lowest):
            self.path.append(self.lowest)
        self.timer = SideBySideTimer(model, inputs, trace, timing, dense)

    def __enter__(self) -> LatencyPlanner:
        self.timer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.__exit__(*error)

    def least(self) -> LatencyFound:
        """Return the times of the dense network and of the one with every group at its floor."""
        return self._found(self.lowest)

    def plan(self, budget: LatencyBudget) -> tuple[Plan, LatencyFound]:
        """Return the plan for a limit, as `plan_latency` does."""
        least = self.least()
        if least.pruned > budget.target(least.dense):
            raise PruningError(
                f"the latency budget {budget} ({budget.target(least.dense):.4f} ms) cannot be reached: with "
                f"every group at its floor the network takes {least.pruned:.4f} ms per example, dense "
                f"{least.dense:.4f} ms. Raise the budget{self.ways} "
                '(see "Read a refusal" in the documentation)'
            )
        path = self.path
        end = self._first_fast_enough(budget, path)
        if end:  # the last step may narrow more than necessary: refine it
            path = _between(path[end - 1], path[end], self.multiples)
            end = self._first_fast_enough(budget, path)
        return self._planned(path[end]), self._found(path[end])

    def _planned(self, widths: np.ndarray) -> Plan:
        return most_important(self.trace, self.order, widths)

    def _found(self, widths: np.ndarray) -> LatencyFound:
        dense, pruned = self.timer.run(self._planned(widths))
        return LatencyFound(dense, pruned, networks=len(self.timer.known))

    def _excess(self, budget: LatencyBudget, widths: np.ndarray) -> float:
        """Return the excess over the limit, as a share of the dense time of the same measurement."""
        found = self._found(widths)
        return (found.pruned - budget.target(found.dense)) / found.dense

    def _first_fast_enough(self, budget: LatencyBudget, path: list[np.ndarray]) -> int:
        """Return the index of the first network on a path that meets the limit; the last one must meet it.

        The table predicts how the time of the layers decreases along the path; timings of whole networks
        locate the limit on it.
        """
        layers = [float(self.table.milliseconds(widths)) for widths in path]
        # (index on the path, excess over the limit as a share of the dense time)
        slow, fast = (0, self._excess(budget, path[0])), (len(path) - 1, self._excess(budget, path[-1]))
        if slow[1] <= 0:
            return 0
        halve = False
        while fast[0] - slow[0] > 1:
            # Interpolate between the measured networks, alternating with bisection.
            middle = (slow[0] + fast[0]) // 2
            if not halve:
                span = (layers[slow[0]] - layers[fast[0]]) / max(slow[1] - fast[1], 1e-9)
                wanted = layers[fast[0]] - fast[1] * span
                middle = next((k for k in range(slow[0], fast[0]) if layers[k] <= wanted), fast[0])
                middle = min(max(middle, slow[0] + 1), fast[0] - 1)
            here = (middle, self._excess(budget, path[middle]))
            slow, fast = (slow, here) if here[1] <= 0 else (here, fast)
            halve = not halve
        return fast[0]


def _require_supported(options: PlanOptions) -> None:
    unsupported = {
        "per_cost": not options.per_cost,
        "widths": options.widths is not None,
        "alike": bool(options.alike),
    }
    if names := ", ".join(name for name, given in unsupported.items() if given):
        raise PruningError(f"{names}: not supported with a latency budget; give a Budget, or omit the option")
    if options.ranking != "global":
        raise PruningError(f"ranking {options.ranking!r}: a latency budget expects 'global'")


def _between(wide: np.ndarray, slim: np.ndarray, multiples: np.ndarray | int) -> list[np.ndarray]:
    """Return at most `MAX_WIDTHS` steps between widths that differ in one group, both ends included."""
    count = int(max(1, min(MAX_WIDTHS, ((wide - slim) // multiples).max())))
    steps = [wide + (slim - wide) * k / count for k in range(count + 1)]
    rounded = [np.maximum(slim, np.round(widths / multiples) * multiples) for widths in steps[1:-1]]
    return [wide, *rounded, slim]
