"""Time forward passes, and compare the times."""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pruning.deploy.runtimes import Exported
from pruning.errors import PruningError
from pruning.utils.batch import usual_batch
from pruning.utils.modules import call, eval_mode, thread_count
from pruning.utils.tree import Inputs, tensors
from pruning.utils.wording import number_of


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass per example, in milliseconds.

    Attributes:
        median: median of the measurements.
        p90: 90th percentile of the measurements.
        low: first quartile of the measurements.
        high: third quartile of the measurements.
        samples: number of measurements.
        batch_size: examples per forward pass.
        threads: number of threads of torch's CPU operations.
        turns: the measurements in the order in which they were taken. Models that are timed together
            take turns, so measurements with the same index were taken one right after the other.
    """

    median: float
    p90: float
    low: float
    high: float
    samples: int
    batch_size: int
    threads: int
    turns: tuple[float, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return (
            f"{self.median:.4f} ms (p90 {self.p90:.4f}, quartiles {self.low:.4f} to {self.high:.4f}; "
            f"batch {self.batch_size}, {number_of(self.threads, 'thread')})"
        )


class TimeRatio(NamedTuple):
    """The ratio of two median times, and the bounds of its confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


#: Largest number of values that `time_ratio` resamples at once.
_RESAMPLED = 1 << 20


def time_ratio(
    latency: Latency, to: Latency, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> TimeRatio:
    """Compare the times of two models that were measured by the same `time_forward` call.

    The interval is a bootstrap percentile interval of the ratio (Efron, Annals of Statistics 7, 1979).
    Both models are resampled at the same turns, so a disturbance that slows both cancels out. The
    resamples consist of blocks of ⌈√n⌉ consecutive turns, where the first turn follows the last,
    because a disturbance lasts longer than a turn (Politis and Romano, A circular block-resampling
    procedure for stationary data, 1992).

    Args:
        latency: times of the model.
        to: times of the model to compare it with.
        confidence: confidence level of the interval, 0 to 1.
        resamples: number of resamples.
        seed: seed of the resampling.

    Returns:
        The median of `latency` divided by that of `to`, with its confidence interval.

    Raises:
        PruningError: if the times were not measured together.

    >>> times = time_forward({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, torch.rand(2, 4), seconds=0.05)
    >>> ratio = time_ratio(times["a"], times["b"])
    >>> ratio.low <= ratio.high
    True
    """
    above, below = np.array(latency.turns), np.array(to.turns)
    turns = len(above)
    if not turns or turns != len(below):
        raise PruningError(
            f"{turns} and {len(below)} turns: only models that were timed together can be compared; pass "
            "both to one time_forward call"
        )
    block = math.ceil(math.sqrt(turns))
    generator = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED // turns)
    ratios = np.empty(0)
    while len(ratios) < resamples:
        count = min(at_once, resamples - len(ratios))
        starts = generator.integers(0, turns, (count, math.ceil(turns / block), 1))
        chosen = ((starts + np.arange(block)) % turns).reshape(count, -1)[:, :turns]
        ratios = np.append(ratios, np.median(above[chosen], axis=1) / np.median(below[chosen], axis=1))
    low, high = np.percentile(ratios, (50 - 50 * confidence, 50 + 50 * confidence)).tolist()
    return TimeRatio(float(np.median(above) / np.median(below)), low, high)


def time_forward(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    seconds: float = 3.0,
    warmup: float = 0.3,
    threads: int = 1,
    batch_size: int | None = None,
) -> dict[str, Latency]:
    """Time the forward passes of several models in turns.

    The models take turns, a few passes at a time and in random order, so that other load on the
    machine affects them alike. Only the forward pass is timed; for an exported file, only the runtime,
    without conversions from and to tensors.

    Args:
        models: models or `Exported` files, by name.
        inputs: one batch for all models, on their device.
        seconds: total time to measure.
        warmup: total time to run before measuring, in seconds.
        threads: number of threads of torch's CPU operations; restored afterwards.
        batch_size: number of examples in the batch; by default that of its form (see `usual_batch`).

    Returns:
        The time of each model, by name.

    Raises:
        PruningError: if there is no model.

    >>> times = time_forward({"net": nn.Linear(4, 3)}, torch.rand(2, 4), seconds=0.05)
    >>> times["net"].batch_size, times["net"].median > 0
    (2, True)
    """
    if not models:
        raise PruningError("no model to time: give at least one, by name")
    batch = batch_size or usual_batch(inputs).size
    synchronize = torch.cuda.synchronize if any(t.is_cuda for t in tensors(inputs)) else (lambda: None)
    turns = {name: _timed(model, inputs, synchronize) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with thread_count(threads), eval_mode(*models.values()), torch.inference_mode():
        passes = {}
        for name in names:
            started, each = time.perf_counter(), list[float]()
            while time.perf_counter() - started < warmup / len(names) or len(each) < 3:
                each.append(turns[name](1))
            # A turn of about 2 ms is long compared with the clock's resolution and short compared with
            # disturbances. The median keeps one disturbance during warmup from reducing a model's turns to
            # a single pass, which measures too long a time.
            passes[name] = max(1, round(0.002 / statistics.median(each)))
        # A model's time depends on the caches that the previous one left; a random order favors none.
        order = random.Random(0)
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(times[names[0]]) < 20:
            for name in names:
                times[name].append(turns[name](passes[name]))
            order.shuffle(names)
    return {
        name: _latency(np.array(samples) / batch * 1000, batch, threads) for name, samples in times.items()
    }


def _latency(times: np.ndarray, batch: int, threads: int) -> Latency:
    """Return the statistics of a model's times, given in milliseconds per example."""
    low, median, high, p90 = np.percentile(times, (25, 50, 75, 90)).tolist()
    return Latency(median, p90, low, high, len(times), batch, threads, tuple(times.tolist()))


def _timed(model: nn.Module, inputs: Inputs, synchronize: Callable[[], None]) -> Callable[[int], float]:
    """Return a function that runs a given number of passes and returns the mean seconds per pass."""
    if isinstance(model, Exported):
        once = model.prepared(*tensors(inputs))
    else:
        once = functools.partial(call, model, inputs)

    def run(passes: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            once()
        synchronize()
        return (time.perf_counter() - start) / passes

    return run
