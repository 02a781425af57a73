"""Ridge regression from sums over rows, for several independent parts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Ridge penalties that are tried, relative to the variance of each input.
RIDGES = tuple(10.0**power for power in range(-6, 3))


class Sums:
    """Sums over rows that determine a layer's ridge regression, for each of its parts.

    Attributes:
        gram: Σ [x 1]^T [x 1], (parts, inputs + 1, inputs + 1).
        cross: Σ [x 1]^T e, (parts, inputs + 1, outputs).
        error, size: Σ e² and Σ y² over all parts and outputs.
    """

    def __init__(self) -> None:
        self.gram, self.cross = torch.zeros(()), torch.zeros(())
        self.error, self.size, self.count = 0.0, 0.0, 0

    def add(self, rows: Tensor, error: Tensor, outputs: Tensor) -> None:
        """Add rows (rows, parts, inputs), their errors e and dense outputs y (rows, parts, outputs)."""
        x = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2).transpose(0, 1)
        self.gram = self.gram.to(x) + x.mT @ x
        self.cross = self.cross.to(x) + x.mT @ error.transpose(0, 1)
        self.error += float(error.square().sum())
        self.size += float(outputs.square().sum())
        self.count += len(rows)

    def __add__(self, other: Sums) -> Sums:
        total = Sums()
        total.gram = self.gram + other.gram
        total.cross = self.cross + other.cross
        total.error, total.size = self.error + other.error, self.size + other.size
        total.count = self.count + other.count
        return total

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        sums = (self.gram.sum(), self.cross.sum(), torch.tensor([self.error, self.size]).sum())
        return all(bool(torch.isfinite(value)) for value in sums)

    def solution(self, ridges: Sequence[float], offset: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each ridge the change of the weights (parts, inputs, outputs) and of the bias."""
        gram, cross = self.gram[:, :-1, :-1], self.cross[:, :-1]
        mean, error_mean = self.gram[:, :-1, -1:] / self.count, self.cross[:, -1:] / self.count
        if offset:
            gram, cross = gram - self.count * mean @ mean.mT, cross - self.count * mean @ error_mean
        # With inputs of unit variance the penalty is the same in all directions.
        size = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        size = size.masked_fill(size <= 1e-12 * size.amax(1, keepdim=True), torch.inf).unsqueeze(2)
        values, vectors = torch.linalg.eigh(gram / size / size.mT)
        values, along = values.clamp(min=0), vectors.mT @ (cross / size)
        weights, shifts = [], []
        for ridge in ridges:
            weights.append(vectors @ (along / (values + ridge).unsqueeze(2)) / size)
            shift = error_mean - mean.mT @ weights[-1]
            shifts.append((shift if offset else torch.zeros_like(shift)).squeeze(1))
        return weights, shifts

    def error_after(self, weight: Tensor, shift: Tensor) -> float:
        """Return the squared error on these rows after a change of the weights and the bias."""
        change = torch.cat([weight, shift.unsqueeze(1)], 1)
        return self.error + float((change * (self.gram @ change - 2 * self.cross)).sum())


def best_ridge(fits: Sums, held: Sums, offset: bool) -> tuple[float, float]:
    """Return the ridge with the least error on held-out rows, and this error."""
    weights, shifts = fits.solution(RIDGES, offset)
    errors = [held.error_after(weight, shift) for weight, shift in zip(weights, shifts, strict=True)]
    best = min(range(len(RIDGES)), key=lambda i: (errors[i], i))
    return RIDGES[best], max(errors[best], 0.0)
