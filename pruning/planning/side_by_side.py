"""Time pruned networks beside the dense one, each as it is deployed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from pruning.deploy.export import export
from pruning.deploy.formats import RUNTIMES, SUFFIXES
from pruning.deploy.runtimes import Exported
from pruning.deploy.timing import time_forward
from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import LatencyBudget
from pruning.surgery.apply import apply
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace as find_groups
from pruning.utils.tree import Inputs, tensors


class SideBySideTimer:
    """Time pruned networks together with the dense one as deployed: BatchNorm folded, in their runtime.

    Args:
        model: the traced model; it is not changed. inputs: of one timed pass. trace: of the model.
        timing: the runtime, its threads, the examples of a pass, and the seconds of a comparison.
        dense: the network to compare with; by default the model.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        trace: Trace,
        timing: LatencyBudget,
        dense: nn.Module | None = None,
    ):
        self.model, self.inputs, self.trace, self.timing = model, inputs, trace, timing
        self.reference = model if dense is None else dense
        self.folder = tempfile.TemporaryDirectory()
        #: By plan, the times (dense, pruned) in milliseconds per example.
        self.known: dict[Plan, tuple[float, float]] = {}

    def __enter__(self) -> SideBySideTimer:
        traced = self.trace if self.reference is self.model else find_groups(self.reference, self.inputs)
        self.dense = self._deployed(self.reference, traced, "dense")
        return self

    def __exit__(self, *_: object) -> None:
        del self.dense
        self.folder.cleanup()

    def run(self, plan: Plan) -> tuple[float, float]:
        """Return milliseconds per example of the dense network and of the one that a plan leaves."""
        if plan not in self.known:
            pruned = self._deployed(apply(self.model, self.trace, plan), self.trace, "pruned")
            networks = {"dense": self.dense, "pruned": pruned}
            times = time_forward(
                networks,
                self.inputs,
                seconds=self.timing.seconds,
                threads=self.timing.threads,
                batch_size=self.timing.batch_size,
            )
            self.known[plan] = (times["dense"].median, times["pruned"].median)
        return self.known[plan]

    def _deployed(self, model: nn.Module, trace: Trace, name: str) -> nn.Module:
        """Return the network as deployed: BatchNorm folded, exported for its runtime."""
        folded = fold_batchnorm(model, trace)
        if self.timing.runtime == "eager":
            return folded
        format = next(f for f, runtime in RUNTIMES.items() if runtime == self.timing.runtime)
        path = Path(self.folder.name) / f"{name}{SUFFIXES[format]}"
        if isinstance(self.inputs, Mapping):
            raise PruningError(
                f"the example inputs are passed by name; {self.timing.runtime} takes tensors by position: "
                "give a tensor or a tuple"
            )
        export(folded, path, tensors(self.inputs), format)
        return Exported(path, self.timing.runtime, self.timing.threads)
