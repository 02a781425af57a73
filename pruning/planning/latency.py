"""Plan within a latency budget, by timing networks on this machine.

Fewer MACs do not always take less time: a runtime may pad channels, or spend its time elsewhere.
Therefore the convolutions and linear layers of a model are timed alone at several widths, in the target
runtime (`LatencyTable`). From these times follows a path of widths: each step drops the channels with
the lowest score per time freed. Whole networks on that path are timed together with the dense one, to
find the first that meets the limit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pruning.deploy.export import export
from pruning.deploy.formats import RUNTIMES, SUFFIXES
from pruning.deploy.runtimes import Exported
from pruning.deploy.timing import time_forward
from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.layer_times import MAX_WIDTHS, LatencyTable
from pruning.planning.options import PlanOptions
from pruning.planning.search import (
    DEFAULT_OPTIONS,
    Order,
    ascending,
    lowest_widths,
    most_important,
    width_multiples,
)
from pruning.surgery.apply import apply
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace as find_groups
from pruning.utils.tree import Inputs, tensors


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
    _require_supported(options)
    budget = replace(budget, batch_size=budget.batch_size or trace.batch.size)
    inputs = budget.batch_of(inputs, trace.batch)
    order = ascending(trace, scores)
    lowest = lowest_widths(trace, order, options)
    multiples = width_multiples(trace, options)
    table = LatencyTable(model, inputs, cost_model, budget, lowest, multiples)
    path = table.path(order)
    if not np.array_equal(path[-1], lowest):
        path.append(lowest)
    with _SideBySideTimer(model, inputs, trace, order, budget, dense) as timer:
        dense_time, least = timer.run(lowest)
        if least > budget.target(dense_time):
            raise PruningError(
                f"the latency budget {budget} ({budget.target(dense_time):.4f} ms) cannot be reached: with "
                f"every group at its floor the network takes {least:.4f} ms per example, dense "
                f"{dense_time:.4f} ms. Raise the budget, or the share of a group that is dropped at most "
                "(`most`), lower the floors, or ignore fewer layers"
            )
        end = _first_fast_enough(timer, table, path)
        if end:  # the last step may narrow more than necessary: refine it
            path = _between(path[end - 1], path[end], multiples)
            end = _first_fast_enough(timer, table, path)
        dense_time, pruned = timer.run(path[end])
    found = LatencyFound(dense_time, pruned, networks=len(timer.known))
    return most_important(trace, order, path[end]), found


def _require_supported(options: PlanOptions) -> None:
    unsupported = {
        "per_cost": not options.per_cost,
        "widths": options.widths is not None,
        "alike": bool(options.alike),
    }
    if names := ", ".join(name for name, given in unsupported.items() if given):
        raise PruningError(f"{names}: not supported with a latency budget; give a Budget, or omit the option")
    if options.ranking != "global":
        raise PruningError(f"ranking {options.ranking!r}: a latency budget supports only ranking 'global'")


def _first_fast_enough(timer: _SideBySideTimer, table: LatencyTable, path: list[np.ndarray]) -> int:
    """Return the index of the first network on a path that meets the limit; the last one must meet it.

    The table predicts how the time of the layers decreases along the path; timings of whole networks
    locate the limit on it.
    """
    layers = [float(table.milliseconds(widths)) for widths in path]
    # (index on the path, excess over the limit as a share of the dense time)
    slow, fast = (0, timer.excess(path[0])), (len(path) - 1, timer.excess(path[-1]))
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
        here = (middle, timer.excess(path[middle]))
        slow, fast = (slow, here) if here[1] <= 0 else (here, fast)
        halve = not halve
    return fast[0]


def _between(wide: np.ndarray, slim: np.ndarray, multiples: np.ndarray | int) -> list[np.ndarray]:
    """Return at most `MAX_WIDTHS` steps between widths that differ in one group, both ends included."""
    count = int(max(1, min(MAX_WIDTHS, ((wide - slim) // multiples).max())))
    steps = [wide + (slim - wide) * k / count for k in range(count + 1)]
    rounded = [np.maximum(slim, np.round(widths / multiples) * multiples) for widths in steps[1:-1]]
    return [wide, *rounded, slim]


class _SideBySideTimer:
    """Time pruned networks together with the dense one as deployed: BatchNorm folded, in their runtime."""

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
        self.reference = model if dense is None else dense
        self.folder = tempfile.TemporaryDirectory()
        #: By widths, the times (dense, pruned) in milliseconds per example.
        self.known: dict[tuple[float, ...], tuple[float, float]] = {}

    def __enter__(self) -> _SideBySideTimer:
        traced = self.trace if self.reference is self.model else find_groups(self.reference, self.inputs)
        self.dense = self._deployed(self.reference, traced, "dense")
        return self

    def __exit__(self, *_: object) -> None:
        del self.dense
        self.folder.cleanup()

    def run(self, widths: np.ndarray) -> tuple[float, float]:
        """Return milliseconds per example of the dense network and of the one with these widths."""
        key = tuple(widths)
        if key not in self.known:
            plan = most_important(self.trace, self.order, widths)
            pruned = self._deployed(apply(self.model, self.trace, plan), self.trace, "pruned")
            networks = {"dense": self.dense, "pruned": pruned}
            seconds, threads = self.budget.seconds, self.budget.threads
            size = self.budget.batch_size
            times = time_forward(networks, self.inputs, seconds=seconds, threads=threads, batch_size=size)
            self.known[key] = (times["dense"].median, times["pruned"].median)
        return self.known[key]

    def excess(self, widths: np.ndarray) -> float:
        """Return the excess over the limit, as a share of the dense time of the same measurement."""
        dense, pruned = self.run(widths)
        return (pruned - self.budget.target(dense)) / dense

    def _deployed(self, model: nn.Module, trace: Trace, name: str) -> nn.Module:
        """Return the network as deployed: BatchNorm folded, exported for its runtime."""
        folded = fold_batchnorm(model, trace)
        if self.budget.runtime == "eager":
            return folded
        format = next(f for f, runtime in RUNTIMES.items() if runtime == self.budget.runtime)
        path = Path(self.folder.name) / f"{name}{SUFFIXES[format]}"
        if isinstance(self.inputs, Mapping):
            raise PruningError(
                f"the example inputs are passed by name; {self.budget.runtime} takes tensors by position: "
                "give a tensor or a tuple"
            )
        export(folded, path, tensors(self.inputs), format)
        return Exported(path, self.budget.runtime, self.budget.threads)
