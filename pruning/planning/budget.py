"""Budgets: limits on the parameters, MACs and channels of a network, or on its latency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from pruning.deploy.formats import RUNTIMES
from pruning.errors import PruningError
from pruning.utils.settings import Setting
from pruning.utils.wording import number_of

if TYPE_CHECKING:  # the flags of the command line are read without torch
    from pruning.planning.cost import Cost
    from pruning.utils.batch import Batch
    from pruning.utils.tree import Inputs

#: The costs that a budget can limit: name in `Cost` to name in messages.
LABELS = {"params": "params", "macs": "MACs", "channels": "channels"}

#: Runtimes in which a network can be timed; `eager` is PyTorch itself.
PLACES = ("eager", *RUNTIMES.values())

_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}

InputTree = TypeVar("InputTree", bound="Inputs")


@dataclass(frozen=True)
class Budget:
    """Limits on the cost of a network with BatchNorm folded; None sets no limit.

    An integer is a count. Text is a count with an optional k, M or G, or a percentage of the dense
    network's cost.

    Attributes:
        params: largest number of parameters. macs: largest number of MACs (multiply-adds) per example.
        channels: largest sum of the widths of all groups.

    Raises:
        PruningError: if no limit is set, or a limit is not a count or percentage, is not positive, or
            is above 100 %.

    >>> from pruning.planning.cost import Cost
    >>> Budget(params="25%", macs="50k").resolve(Cost(params=8000, macs=90000, macs_with_bias=0))
    Budget(params=2000, macs=50000, channels=None)
    """

    params: Annotated[
        int | str | None,
        Setting("most parameters, BatchNorm folded", name="max-params", metavar="PARAMS", group="budget"),
    ] = None
    macs: Annotated[
        int | str | None,
        Setting("most multiply-adds for one example", name="max-macs", metavar="MACS", group="budget"),
    ] = None
    channels: Annotated[
        int | str | None,
        Setting(
            "most channels of all groups together", name="max-channels", metavar="CHANNELS", group="budget"
        ),
    ] = None

    def __post_init__(self) -> None:
        if not self._given():
            raise PruningError("a budget needs at least one limit: give params, macs or channels")
        for what, limit in self._given().items():
            _parse(what, limit, dense=1)

    def _given(self) -> dict[str, int | str]:
        limits = {what: getattr(self, what) for what in LABELS}
        return {what: limit for what, limit in limits.items() if limit is not None}

    def resolve(self, dense: Cost) -> Budget:
        """Return the same limits as counts, given the cost of the dense network."""
        return Budget(
            **{what: _parse(what, limit, getattr(dense, what)) for what, limit in self._given().items()}
        )

    def limits(self) -> dict[str, int]:
        """Return the limits that are set, as counts; call `resolve` before if there are percentages.

        >>> Budget(macs=50_000).limits()
        {'macs': 50000}
        """
        return {what: limit for what, limit in self._given().items() if isinstance(limit, int)}

    def excess(self, cost: Cost) -> dict[str, int]:
        """Return by how much a cost exceeds each limit; empty if the budget is met.

        >>> from pruning.planning.cost import Cost
        >>> Budget(params=100, macs=50).excess(Cost(params=130, macs=50, macs_with_bias=0))
        {'params': 30}
        """
        over = {what: getattr(cost, what) - limit for what, limit in self.limits().items()}
        return {what: value for what, value in over.items() if value > 0}

    def share(self, start: Cost, step: int, steps: int) -> Budget:
        """Return the budget of one pruning step of several: each step reduces the cost by the same ratio.

        Args:
            start: cost before the first step.
            step: number of the step, from 1 to `steps`; the last step has this budget itself.
            steps: number of steps.

        >>> from pruning.planning.cost import Cost
        >>> Budget(params=100).share(Cost(params=400, macs=0, macs_with_bias=0), step=1, steps=2)
        Budget(params=200, macs=None, channels=None)
        """
        partial = {}
        for what, limit in self.limits().items():
            begin = max(getattr(start, what), limit)
            partial[what] = limit if step == steps else round(begin * (limit / begin) ** (step / steps))
        return Budget(**partial)

    def __str__(self) -> str:
        return ", ".join(
            f"≤ {limit:,} {LABELS[what]}" if isinstance(limit, int) else f"≤ {limit} {LABELS[what]}"
            for what, limit in self._given().items()
        )


@dataclass(frozen=True)
class LatencyBudget:
    """A limit on the time of a forward pass.

    Attributes:
        limit: `0.5x`, a multiple of the dense network's time, or `2ms`, milliseconds per example.
        runtime: runtime of the pruned network: `eager`, `onnxruntime`, `torchscript`, `pt2`, or one of
            `pruning.deploy.register_runtime`.
        threads: number of CPU threads of the runtime.
        batch_size: examples in a pass; 0 means the batch size of the example inputs.
        seconds: duration of each comparison of a pruned with the dense network, in seconds.

    Raises:
        PruningError: if the runtime is unknown, or the limit has neither form.

    >>> LatencyBudget("0.5x").target(dense=3.0)
    1.5
    """

    limit: Annotated[
        str,
        Setting(
            "most time: 0.5x of the dense network's, or 2ms per example",
            name="max-latency",
            metavar="TIME",
            group="latency",
        ),
    ]
    runtime: Annotated[
        str,
        Setting("runtime in which the network is timed", choices=PLACES, group="latency"),
    ] = "eager"
    threads: Annotated[
        int,
        Setting("CPU threads of a timed pass", name="runtime-threads", metavar="N", least=1, group="latency"),
    ] = 1
    batch_size: Annotated[
        int,
        Setting("examples in a timed pass", name="runtime-batch", metavar="N", least=1, group="latency"),
    ] = 0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        known = (PLACES[0], *RUNTIMES.values())  # now: users register runtimes
        if self.runtime not in known:
            raise PruningError(f"runtime {self.runtime!r} is unknown; choose one of: {', '.join(known)}")
        self.target(1.0)

    def target(self, dense: float) -> float:
        """Return the limit in milliseconds per example, given the dense network's time in the same unit."""
        text = str(self.limit).strip().lower()
        try:
            value = float(text[:-2] if text.endswith("ms") else text[:-1])
        except ValueError:
            value = 0.0
        if not text.endswith(("ms", "x")) or not 0 < value < float("inf"):
            raise PruningError(
                f"latency budget {self.limit!r}: expected a share of the dense network's time (0.5x) or "
                "milliseconds per example (2ms)"
            )
        return value if text.endswith("ms") else value * dense

    def batch_of(self, inputs: InputTree, batch: Batch | None = None) -> InputTree:
        """Repeat or truncate example inputs to `batch_size` examples.

        Args:
            batch: the batch of the inputs; by default that of their form (see `usual_batch`).

        >>> import torch
        >>> LatencyBudget("1x", batch_size=5).batch_of(torch.zeros(2, 3)).shape
        torch.Size([5, 3])
        """
        from pruning.utils.batch import usual_batch

        batch = batch or usual_batch(inputs)
        return batch.resized(inputs, self.batch_size or batch.size)

    def __str__(self) -> str:
        return f"≤ {self.limit} in {self.runtime}, {number_of(self.threads, 'thread')}"


def require_budget(budget: object) -> None:
    """Raise `PruningError` unless this is a `Budget` or a `LatencyBudget`."""
    if not isinstance(budget, Budget | LatencyBudget):
        raise PruningError(f"budget {budget!r}: expected a Budget, such as Budget(macs='50%')")


def _parse(what: str, limit: int | str, dense: int) -> int:
    """Convert a limit to a count, given the dense network's cost of this kind."""
    text = str(limit).strip().lower().replace(",", "").replace("_", "")
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share <= 1:
                raise PruningError(f"{what} budget {limit!r}: expected a percentage above 0 and at most 100")
            # Round down, so that the limit is never exceeded; 1e-6 compensates floating-point error.
            return max(1, math.floor(share * dense + 1e-6))
        factor = _SUFFIXES.get(text[-1:], 1)
        count = float(text[:-1] if text[-1:] in _SUFFIXES else text) * factor
        if 0 < count < 1:
            raise PruningError(
                f"{what} budget {limit!r}: a count is a whole number from 1; did you mean "
                f"{100 * count:g}% of the dense network?"
            )
        if count < 1 or count != round(count):
            raise PruningError(f"{what} budget {limit!r}: expected a whole number from 1")
        return round(count)
    except (ValueError, OverflowError) as error:
        if isinstance(error, PruningError):
            raise
        raise PruningError(
            f"{what} budget {limit!r}: expected a count (2000, 50k) or a percentage of the dense net (25%)"
        ) from error
