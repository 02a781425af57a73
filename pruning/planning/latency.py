"""Plans within a limit on latency, by measuring on this machine.

Fewer MACs do not always take less time: a runtime may pad channels, or spend its time elsewhere. So
the convolutions and linear layers of a model are timed alone at several widths, in the runtime that
will run them (`LatencyTable`). A path of widths then drops the channels with the lowest score for the
time they free, and whole networks on that path are timed beside the dense one until one meets the limit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pruning.deploy.export import SUFFIXES, export
from pruning.deploy.runtimes import RUNTIMES, Exported
from pruning.deploy.timing import time_forward
from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.layer_times import MAX_WIDTHS, LatencyTable
from pruning.planning.options import PlanOptions
from pruning.planning.search import DEFAULT_OPTIONS, Order, ascending, lowest_widths, most_important
from pruning.surgery.apply import apply
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace as find_groups
from pruning.utils.tree import Inputs, tensors


@dataclass(frozen=True)
class LatencyFound:
    """The times of the dense and the pruned network, measured side by side: medians, ms per example.

    `networks` counts the networks that were built and timed.

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
    """Return scores that rise from 1/n to 1 over the n channels of a group: all groups narrow alike."""
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
    """Choose the channels to keep so that a forward pass meets a limit on its time.

    Args:
        model: the traced model; it is not changed.
        inputs: example inputs.
        trace, cost_model: of the model. scores: importance per group, (channels,).
        options: `floor`, `most` and `multiple` apply. Without a multiple the measured times decide
            which widths pay.
        dense: the network to compare with; by default the model itself.

    Returns:
        The plan, and the times measured for it.

    Raises:
        PruningError: when no plan is fast enough (the message has the time of the narrowest network),
            and for options that apply only to a budget of counts.
    """
    _require_supported(options)
    inputs = budget.batch_of(inputs)
    order = ascending(trace, scores)
    lowest = lowest_widths(trace, order, options)
    table = LatencyTable(model, inputs, cost_model, budget, lowest, options.multiple)
    path = table.path(order)
    if not np.array_equal(path[-1], lowest):
        path.append(lowest)
    with _SideBySideTimer(model, inputs, trace, order, budget, dense) as timer:
        dense_time, least = timer.run(lowest)
        if least > budget.target(dense_time):
            raise PruningError(
                f"the latency budget {budget} ({budget.target(dense_time):.4f} ms) cannot be reached: with "
                f"every group at its floor the network takes {least:.4f} ms per example, dense "
                f"{dense_time:.4f} ms"
            )
        end = _first_fast_enough(timer, table, path)
        if end:  # the last step may narrow further than needed
            path = _between(path[end - 1], path[end], options.multiple)
            end = _first_fast_enough(timer, table, path)
        dense_time, pruned = timer.run(path[end])
    found = LatencyFound(dense_time, pruned, networks=len(timer.known))
    return most_important(trace, order, path[end]), found


def _require_supported(options: PlanOptions) -> None:
    unsupported = {"per_cost": not options.per_cost, "widths": options.widths is not None}
    if names := ", ".join(name for name, given in unsupported.items() if given):
        raise PruningError(f"{names}: not kept under a budget of latency; give a budget of counts")
    if options.ranking != "global":
        raise PruningError(
            f"ranking {options.ranking!r}: a budget of latency is met by the global ranking alone"
        )


def _first_fast_enough(timer: _SideBySideTimer, table: LatencyTable, path: list[np.ndarray]) -> int:
    """Find the first place on a path whose network meets the limit; the last place must meet it.

    The table tells how the time of the layers falls along the path, and a timing of the whole network
    where on it the limit lies.
    """
    layers = [float(table.milliseconds(widths)) for widths in path]
    # (place, excess over the limit as a share of the dense time)
    slow, fast = (0, timer.excess(path[0])), (len(path) - 1, timer.excess(path[-1]))
    if slow[1] <= 0:
        return 0
    halve = False
    while fast[0] - slow[0] > 1:
        # Interpolate between the measured networks; every other time halve the interval.
        middle = (slow[0] + fast[0]) // 2
        if not halve:
            span = (layers[slow[0]] - layers[fast[0]]) / max(slow[1] - fast[1], 1e-9)
            wanted = layers[fast[0]] - fast[1] * span
            middle = next((k for k in range(slow[0], fast[0]) if layers[k] <= wanted), fast[0])
            middle = min(max(middle, slow[0] + 1), fast[0] - 1)
        here = (middle, timer.excess(path[middle]))
        slow, fast = (slow, here) if here[1] <= 0 else (here, fast)
        halve = not halve
    return fast[0]


def _between(wide: np.ndarray, slim: np.ndarray, multiple: int) -> list[np.ndarray]:
    """Go from one to the other in at most `MAX_WIDTHS` steps, along the group in which they differ."""
    count = int(max(1, min(MAX_WIDTHS, (wide - slim).max() // multiple)))
    steps = [wide + (slim - wide) * k / count for k in range(count + 1)]
    rounded = [np.maximum(slim, np.round(widths / multiple) * multiple) for widths in steps[1:-1]]
    return [wide, *rounded, slim]


class _SideBySideTimer:
    """Time pruned networks beside the dense one as they ship: BatchNorm folded, in their runtime."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        trace: Trace,
        order: Order,
        budget: LatencyBudget,
        dense: nn.Module | None,
    ):
        self.model, self.inputs, self.trace, self.order, self.budget = model, inputs, trace, order, budget
        self.against = model if dense is None else dense
        self.folder = tempfile.TemporaryDirectory()
        #: (dense, pruned) in milliseconds per example, by widths.
        self.known: dict[tuple[float, ...], tuple[float, float]] = {}

    def __enter__(self) -> _SideBySideTimer:
        traced = self.trace if self.against is self.model else find_groups(self.against, self.inputs)
        self.dense = self._shipped(self.against, traced, "dense")
        return self

    def __exit__(self, *_: object) -> None:
        del self.dense
        self.folder.cleanup()

    def run(self, widths: np.ndarray) -> tuple[float, float]:
        """Return milliseconds per example of the dense network and of the one with these widths."""
        key = tuple(widths)
        if key not in self.known:
            plan = most_important(self.trace, self.order, widths)
            pruned = self._shipped(apply(self.model, self.trace, plan), self.trace, "pruned")
            networks = {"dense": self.dense, "pruned": pruned}
            seconds, threads = self.budget.seconds, self.budget.threads
            times = time_forward(networks, self.inputs, seconds=seconds, threads=threads)
            self.known[key] = (times["dense"].median, times["pruned"].median)
        return self.known[key]

    def excess(self, widths: np.ndarray) -> float:
        """Return the time over the limit, as a share of the dense time of the same measurement."""
        dense, pruned = self.run(widths)
        return (pruned - self.budget.target(dense)) / dense

    def _shipped(self, model: nn.Module, trace: Trace, name: str) -> nn.Module:
        """The network as it ships: folded, and exported for its runtime."""
        folded = fold_batchnorm(model, trace)
        if self.budget.runtime == "eager":
            return folded
        format = next(f for f, runtime in RUNTIMES.items() if runtime == self.budget.runtime)
        path = Path(self.folder.name) / f"{name}{SUFFIXES[format]}"
        if isinstance(self.inputs, Mapping):
            raise PruningError(f"{self.budget.runtime} takes tensors by position, not by name")
        export(folded, path, tensors(self.inputs), format)
        return Exported(path, self.budget.runtime, self.budget.threads)
