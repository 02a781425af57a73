"""Latency as a budget: widths chosen by what layers take on this machine, measured.

Fewer MACs are not less time: a runtime may pad channels, or spend its time elsewhere. So the
convolutions and linear layers of a model are timed alone at several widths, in the runtime
that will run them; a plan gives up the channels that matter least for the time they free;
and whole networks are timed side by side until one meets the limit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pruning.planning.layer_times import POINTS, LatencyTable
from pruning.planning.scores import Groups, Scores
from pruning.planning.search import Order, ascending, lowest_widths, most_important, require_multiple
from pruning.surgery.apply import apply
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace as find_groups
from pruning.utils.tree import Inputs, tensors


@dataclass(frozen=True)
class LatencyFound:
    """What was measured: the dense and the pruned network side by side, ms per example (medians).

    `networks` counts those that were built and timed.
    """

    dense: float
    pruned: float
    networks: int

    def __str__(self) -> str:
        ratio = self.pruned / self.dense
        faster = "" if ratio < 1 else "; pruning does not make it faster here"
        return f"{self.pruned:.4f} ms, dense {self.dense:.4f} ms ({ratio:.2f}x){faster}"


def even_scores(model: nn.Module, groups: Groups) -> Scores:
    """Scores that rise from 1/n to 1 over the n channels of a group, so that all give up alike."""
    return {name: torch.arange(1, group.channels + 1) / group.channels for name, group in groups.items()}


def plan_latency(
    model: nn.Module,
    inputs: Inputs,
    trace: Trace,
    scores: Mapping[str, Tensor],
    budget: LatencyBudget,
    *,
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int = 1,
    ranking: str = "global",
    dense: nn.Module | None = None,
    **others: Any,
) -> tuple[Plan, LatencyFound]:
    """The channels to keep so that a forward pass takes no longer than the budget.

    Args:
        inputs: example inputs.
        trace, scores: of the model, a score per channel.
        floor, most: as `plan_within` takes them. multiple: widths are multiples of so many
            channels; which ones pay is otherwise found by measuring.
        dense: what the result is compared with; by default the model itself.

    Raises `PruningError` when no plan is fast enough, and says what the narrowest takes; and for
    limits that only a plan under a budget of counts can keep.
    """
    if others:
        raise PruningError(
            f"{', '.join(others)}: not kept under a budget of latency; give a budget of counts"
        )
    if ranking != "global":
        raise PruningError(f"ranking {ranking!r}: a budget of latency is met by the global ranking alone")
    require_multiple(multiple)
    inputs = budget.batch_of(inputs)
    order = ascending(trace, scores)
    lowest = lowest_widths(trace, order, floor, most)
    table = LatencyTable(model, inputs, trace, budget, lowest, multiple)
    path = table.path(order)
    if not np.array_equal(path[-1], lowest):
        path.append(lowest)
    with _Race(model, inputs, trace, order, budget, dense) as race:
        whole, least = race.run(lowest)
        if least > budget.target(whole):
            raise PruningError(
                f"the latency budget {budget} ({budget.target(whole):.4f} ms) cannot be reached: with every "
                f"group at its floor the network takes {least:.4f} ms per example, dense {whole:.4f} ms"
            )
        end = _search(race, table, path)
        if end:  # the last move may have gone further than needed
            path = _between(path[end - 1], path[end], multiple)
            end = _search(race, table, path)
        whole, pruned = race.run(path[end])
    return most_important(trace, order, path[end]), LatencyFound(whole, pruned, networks=len(race.known))


def _search(race: _Race, table: LatencyTable, path: list[np.ndarray]) -> int:
    """The first place on a path whose network is fast enough; the last one is known to be.

    The table says how the time of the layers falls along the path; a race, where the whole
    network stands.
    """
    layers = [float(table.milliseconds(widths)) for widths in path]
    # Place, and excess over the limit as a share of the dense time.
    slow, fast = (0, race.excess(path[0])), (len(path) - 1, race.excess(path[-1]))
    if slow[1] <= 0:
        return 0
    halve = False
    while fast[0] - slow[0] > 1:
        # Interpolate between what was measured, every other time halve what is left.
        middle = (slow[0] + fast[0]) // 2
        if not halve:
            span = (layers[slow[0]] - layers[fast[0]]) / max(slow[1] - fast[1], 1e-9)
            wanted = layers[fast[0]] - fast[1] * span
            middle = next((k for k in range(slow[0], fast[0]) if layers[k] <= wanted), fast[0])
            middle = min(max(middle, slow[0] + 1), fast[0] - 1)
        here = (middle, race.excess(path[middle]))
        slow, fast = (slow, here) if here[1] <= 0 else (here, fast)
        halve = not halve
    return fast[0]


def _between(wide: np.ndarray, slim: np.ndarray, multiple: int) -> list[np.ndarray]:
    """From one to the other in at most `POINTS` steps: along the group in which they differ."""
    count = int(max(1, min(POINTS, (wide - slim).max() // multiple)))
    steps = [wide + (slim - wide) * k / count for k in range(count + 1)]
    rounded = [np.maximum(slim, np.round(widths / multiple) * multiple) for widths in steps[1:-1]]
    return [wide, *rounded, slim]


class _Race:
    """Times pruned networks beside the dense one, as they will ship: BatchNorm folded, in their runtime."""

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

    def __enter__(self) -> _Race:
        traced = self.trace if self.against is self.model else find_groups(self.against, self.inputs)
        self.dense = self._shipped(self.against, traced, "dense")
        return self

    def __exit__(self, *_: object) -> None:
        del self.dense
        self.folder.cleanup()

    def run(self, widths: np.ndarray) -> tuple[float, float]:
        """Milliseconds per example of the dense network and of the one with these widths."""
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
        """By how much a network is over the limit, as a share of the dense one's time in the same race."""
        dense, pruned = self.run(widths)
        return (pruned - self.budget.target(dense)) / dense

    def _shipped(self, model: nn.Module, trace: Trace, name: str) -> nn.Module:
        folded = fold_batchnorm(model, trace)
        if self.budget.runtime == "eager":
            return folded
        format = next(f for f, runtime in RUNTIMES.items() if runtime == self.budget.runtime)
        path = Path(self.folder.name) / f"{name}{SUFFIXES[format]}"
        if isinstance(self.inputs, Mapping):
            raise PruningError(f"{self.budget.runtime} takes tensors by position, not by name")
        export(folded, path, tensors(self.inputs), format)
        return Exported(path, self.budget.runtime, self.budget.threads)
