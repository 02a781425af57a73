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
from pruning.utils.modules import call, eval_mode, thread_count
from pruning.utils.tree import Inputs, tensors


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass per example, in milliseconds.

    Attributes:
        median, p90: the 50th and the 90th percentile of the measurements.
        low, high: their quartiles.
        samples: the number of measurements.
        batch_size: examples per forward pass. threads: of torch's CPU operations.
        turns: the measurements in the order they were taken. Models that were timed together took
            turns, so the same index in each one's `turns` is the same moment.
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
            f"batch {self.batch_size}, {self.threads} thread{'s' if self.threads > 1 else ''})"
        )


class TimeRatio(NamedTuple):
    """A median time divided by another one, and the bounds of the confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def time_ratio(
    latency: Latency, to: Latency, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> TimeRatio:
    """Compare the times of two models that the same `time_forward` call has measured.

    The interval is a bootstrap interval: the percentiles of the ratio over resamples (Efron, Annals
    of Statistics 7, 1979). Both models are resampled at the same turns, so a disturbance of both
    cancels out; and in blocks of ⌈√n⌉ consecutive turns, the last followed by the first, because a
    disturbance outlasts a turn (Politis and Romano, A circular block-resampling procedure for
    stationary data, 1992).

    Args:
        latency, to: the model's times, and those of the model to compare it with.
        confidence: share of such intervals that cover the true ratio.
        resamples: number of resamples. seed: of their choice.

    Returns:
        The median of `latency` divided by that of `to`, with its confidence interval.

    Raises:
        PruningError: for times that were not measured together.

    >>> times = time_forward({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, torch.rand(2, 4), seconds=0.05)
    >>> ratio = time_ratio(times["a"], times["b"])
    >>> ratio.low <= ratio.high
    True
    """
    above, below = np.array(latency.turns), np.array(to.turns)
    turns = len(above)
    if not turns or turns != len(below):
        raise PruningError(f"{turns} and {len(below)} turns: only models that were timed together compare")
    block = math.ceil(math.sqrt(turns))
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        starts = generator.integers(0, turns, (math.ceil(turns / block), 1))
        chosen = ((starts + np.arange(block)) % turns).ravel()[:turns]
        ratios[i] = np.median(above[chosen]) / np.median(below[chosen])
    low, high = np.percentile(ratios, (50 - 50 * confidence, 50 + 50 * confidence)).tolist()
    return TimeRatio(float(np.median(above) / np.median(below)), low, high)


def time_forward(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    seconds: float = 3.0,
    warmup: float = 0.3,
    threads: int = 1,
) -> dict[str, Latency]:
    """Time the forward passes of several models in turns.

    The models take turns, a few passes at a time and in random order, so that other load on the
    machine affects them alike. Only the forward pass is timed; for an exported file that is the
    work of its runtime, without conversions from and to tensors.

    Args:
        models: by name; `Exported` files are models, too.
        inputs: one batch for all of them, on their device.
        seconds: how long to measure in all. warmup: seconds to run before.
        threads: of torch's CPU operations; restored afterwards.

    Returns:
        The time of each model, by name.

    Raises:
        PruningError: where there is no model.

    >>> times = time_forward({"net": nn.Linear(4, 3)}, torch.rand(2, 4), seconds=0.05)
    >>> times["net"].batch_size, times["net"].median > 0
    (2, True)
    """
    if not models:
        raise PruningError("no model to time")
    first = tensors(inputs)[0]
    batch = first.shape[0]
    synchronise = torch.cuda.synchronize if first.is_cuda else (lambda: None)
    turns = {name: _timed(model, inputs, synchronise) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with thread_count(threads), eval_mode(*models.values()), torch.inference_mode():
        passes = {}
        for name in names:
            started, each = time.perf_counter(), list[float]()
            while time.perf_counter() - started < warmup / len(names) or len(each) < 3:
                each.append(turns[name](1))
            # A turn of about 2 ms is long compared with the clock's resolution and short compared with
            # disturbances. By the median: one disturbance here would otherwise leave a model with turns of
            # a single pass, which are slow.
            passes[name] = max(1, round(0.002 / statistics.median(each)))
        # A model finds the caches as the one before has left them: a random order favours none.
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
    """Summarize the times of a model, in milliseconds per example."""
    low, median, high, p90 = np.percentile(times, (25, 50, 75, 90)).tolist()
    return Latency(median, p90, low, high, len(times), batch, threads, tuple(times.tolist()))


def _timed(model: nn.Module, inputs: Inputs, synchronise: Callable[[], None]) -> Callable[[int], float]:
    """Return a function that runs a number of passes and returns the seconds that one of them took."""
    if isinstance(model, Exported):
        once = model.prepared(*tensors(inputs))
    else:
        once = functools.partial(call, model, inputs)

    def run(passes: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(passes):
            once()
        synchronise()
        return (time.perf_counter() - start) / passes

    return run
