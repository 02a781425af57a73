"""What the user asks for: limits on the params, MACs and channels of the result, or on its time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.deploy.runtimes import RUNTIMES
from pruning.errors import PruningError
from pruning.planning.cost import Cost
from pruning.utils.settings import Setting
from pruning.utils.tree import Inputs, tensors

#: What a budget can limit, as a `Cost` names it, and as it is printed.
LABELS = {"params": "params", "macs": "MACs", "channels": "channels"}

#: Where a network can be timed; `eager` is PyTorch itself.
PLACES = ("eager", *RUNTIMES.values())

_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """Limits on a network; None does not limit.

    A whole number is a count; text may be a count with k, M or G behind it, or a percentage
    of the dense network's cost, BatchNorm folded. Channels are those of all prunable groups.

    >>> Budget(params="25%", macs="50k").resolve(Cost(params=8000, macs=90000, macs_with_bias=0))
    Budget(params=2000, macs=50000, channels=None)

    Raises `PruningError` for a limit that is not one, is not positive, or is over 100 %.
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
            raise PruningError("a budget needs at least one limit: on params, on MACs, or on channels")
        for what, limit in self._given().items():
            _parse(what, limit, dense=1)

    def _given(self) -> dict[str, int | str]:
        limits = {what: getattr(self, what) for what in LABELS}
        return {what: limit for what, limit in limits.items() if limit is not None}

    def resolve(self, dense: Cost) -> Budget:
        """The same limits as counts, given what the dense network costs."""
        return Budget(
            **{what: _parse(what, limit, getattr(dense, what)) for what, limit in self._given().items()}
        )

    def limits(self) -> dict[str, int]:
        """The limits in force, as counts; of a resolved budget."""
        return {what: limit for what, limit in self._given().items() if isinstance(limit, int)}

    def excess(self, cost: Cost) -> dict[str, int]:
        """By how much a cost is over each limit that it breaks; empty when the budget is met."""
        over = {what: getattr(cost, what) - limit for what, limit in self.limits().items()}
        return {what: value for what, value in over.items() if value > 0}

    def share(self, start: Cost, step: int, steps: int) -> Budget:
        """The budget of one of several steps from `start` to here: equal ratios, the last exact.

        `step` counts from 1; the budget is resolved.
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
        limit: `0.5x`, of the dense network's time, or `2ms`, per example.
        runtime: where the result will run: `eager`, `onnxruntime`, `torchscript` or `pt2`.
        threads: of the runtime, on the CPU.
        batch_size: examples in a pass; 0 takes as many as the example inputs have.
        seconds: for which two whole networks are compared, each time.

    Raises `PruningError` for a limit that is not one.
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
        if self.runtime not in PLACES:
            raise PruningError(f"runtime {self.runtime!r} is unknown; there are: {', '.join(PLACES)}")
        self.target(1.0)

    def target(self, dense: float) -> float:
        """The limit in milliseconds per example, given what the dense network takes."""
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

    def batch_of(self, inputs: Inputs) -> Any:
        """Inputs with as many examples as a pass has, the given ones repeated."""
        size = self.batch_size or len(tensors(inputs)[0])

        def resized(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf.ndim):
                return leaf
            return torch.cat([leaf] * -(-size // len(leaf)))[:size]

        return pytree.tree_map(resized, inputs)

    def __str__(self) -> str:
        return f"≤ {self.limit} in {self.runtime}, {self.threads} thread{'s' * (self.threads > 1)}"


def require_budget(budget: Any) -> None:
    """Raise `PruningError` for what is no budget."""
    if not isinstance(budget, Budget | LatencyBudget):
        raise PruningError(f"budget {budget!r}: a Budget was expected, such as Budget(macs='50%')")


def _parse(what: str, limit: int | str, dense: int) -> int:
    text = str(limit).strip().lower().replace(",", "").replace("_", "")
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share <= 1:
                raise PruningError(f"{what} budget {limit!r}: a percentage is above 0 and at most 100")
            # Never more than was asked; what is a whole number but for rounding errors stays it.
            return max(1, math.floor(share * dense + 1e-6))
        factor = _SUFFIXES.get(text[-1:], 1)
        count = float(text[:-1] if text[-1:] in _SUFFIXES else text) * factor
        if count < 1 or count != round(count):
            raise PruningError(f"{what} budget {limit!r}: a count is a whole number from 1")
        return round(count)
    except (ValueError, OverflowError) as error:
        if isinstance(error, PruningError):
            raise
        raise PruningError(
            f"{what} budget {limit!r}: expected a count (2000, 50k) or a percentage of the dense net (25%)"
        ) from error
