"""Bootstrap intervals of means and ratios over examples (Efron and Tibshirani, 1993), from a fixed seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Bootstrap samples, and the share of them inside an interval.
RESAMPLES, INTERVAL = 400, 0.95


class Bootstrap:
    """Draw examples with replacement, the same draws for every quantity, so that differences are paired.

    Args:
        count: number of examples.

    >>> bootstrap = Bootstrap(1000)
    >>> low, high = bootstrap.interval(bootstrap.means((torch.arange(1000) % 2).float()[:, None]))
    >>> bool(0.46 < low < 0.5 < high < 0.54)
    True
    """

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
        self.weights = torch.from_numpy(weights).float()

    def means(self, values: Tensor) -> Tensor:
        """Return the mean of each column in each sample, (samples, columns), from values (count, columns)."""
        return self.weights @ values

    @staticmethod
    def interval(samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the interval of each column, from one value for each sample, (samples, ...)."""
        tail = (1 - INTERVAL) / 2
        return torch.quantile(samples, tail, dim=0), torch.quantile(samples, 1 - tail, dim=0)
