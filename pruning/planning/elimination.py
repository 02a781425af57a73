"""Eliminate inputs of linear layers one after the other, the others refitted each time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.graph.groups import Group

#: Shrinkage of a Gram matrix towards its diagonal that is tried.
SHRINKAGES = tuple(10.0**power for power in range(-4, 2))


def best_shrinkage(one: Tensor, other: Tensor, weight: Tensor) -> float:
    """Return the shrinkage with which half of the inputs best replace the others, on held-out examples."""
    order = torch.randperm(len(one), generator=torch.Generator().manual_seed(0)).to(one.device)
    keep, drop = order[: len(order) // 2], order[len(order) // 2 :]
    if not len(keep):
        return SHRINKAGES[0]
    gram, cross, target = one[keep][:, keep], one[keep][:, drop] @ weight[drop], weight[drop]
    scale = gram.diagonal()
    errors = []
    for shrinkage in SHRINKAGES:
        ridge = (shrinkage * scale + 1e-9 * scale.mean().clamp(min=1e-300)).diag()
        by = torch.linalg.solve(gram + ridge, cross)
        error = (by * (other[keep][:, keep] @ by - 2 * other[keep][:, drop] @ target)).sum()
        errors.append(float(error))
    return SHRINKAGES[min(range(len(errors)), key=errors.__getitem__)]


@dataclass
class Problem:
    """The inputs of a layer and the weights that read them, from which channels are eliminated.

    Attributes:
        owner: the channel that owns each input, (inputs,); -1 for inputs that stay.
        gram: Gram matrix of the inputs. weight: (inputs, outputs), errors of outputs in units of the loss.
    """

    owner: Tensor
    gram: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        owned = torch.bincount(self.owner[self.owner >= 0])
        self.block = int(owned.max())
        self.even = bool((owned[owned > 0] == self.block).all())
        self.inverse = torch.linalg.inv(self.gram)
        self._arrange()

    def _arrange(self) -> None:
        """Sort the inputs by their owners, those without one first."""
        order = self.owner.sort(stable=True).indices
        self.owner, self.weight = self.owner[order], self.weight[order].contiguous()
        self.inverse = self.inverse[order][:, order].contiguous()
        self.rest = int((self.owner < 0).sum())
        self.alive = torch.ones(len(self.owner), dtype=torch.bool, device=self.owner.device)

    def add_costs(self, costs: Tensor) -> None:
        """Add to the channels' costs what their elimination would cost here."""
        if self.block == 1 or not self.even:
            each = self.weight.square().sum(1) / self.inverse.diagonal()
            each = each.masked_fill(~self.alive, 0)[self.rest :]
            costs.index_add_(0, self.owner[self.rest :].to(costs.device), each.to(costs.device))
            return
        at = torch.arange(self.rest, len(self.owner), device=self.owner.device).view(-1, self.block)
        blocks = self.inverse[at.unsqueeze(2), at.unsqueeze(1)]
        weights = self.weight[at]
        each = (torch.linalg.solve(blocks, weights) * weights).sum((1, 2))
        each = each.masked_fill(~self.alive[at[:, 0]], 0)
        costs.index_add_(0, self.owner[at[:, 0]].to(costs.device), each.to(costs.device))

    def eliminate(self, channel: int) -> None:
        """Refit the other inputs to the outputs without the inputs of a channel."""
        for i in (self.owner == channel).nonzero().flatten().tolist():
            column, pivot = self.inverse[:, i].clone(), self.inverse[i, i].clone()
            self.weight.addr_(column, self.weight[i].clone(), alpha=-1 / float(pivot))
            self.inverse.addr_(column, column, alpha=-1 / float(pivot))
            self.inverse[i, i], self.weight[i] = 1, 0
            self.alive[i] = False
        if int((~self.alive).sum()) * 4 > len(self.alive):
            kept = self.alive.nonzero().flatten()
            self.owner, self.weight = self.owner[kept], self.weight[kept]
            self.inverse = self.inverse[kept][:, kept]
            self._arrange()


def eliminate(group: Group, problems: list[Problem]) -> Tensor:
    """Eliminate the channels of a group, the cheapest first; return the loss that each adds, (channels,)."""
    order: list[int] = []
    added: list[float] = []
    gone = torch.zeros(group.channels, dtype=torch.bool)
    for _ in range(group.channels):
        costs = torch.zeros(group.channels, dtype=torch.double)
        for problem in problems:
            problem.add_costs(costs)
        channel = int(costs.masked_fill(gone, torch.inf).argmin())
        order.append(channel)
        added.append(max(0.0, float(costs[channel])) / 2)
        gone[channel] = True
        for problem in problems:
            problem.eliminate(channel)
    losses = torch.zeros(group.channels, dtype=torch.double)
    losses[order] = ascending(torch.tensor(added, dtype=torch.double))
    return losses


def ascending(values: Tensor) -> Tensor:
    """Return the ascending sequence closest to the values, with their sum, slightly sloped where it is level.

    >>> ascending(torch.tensor([1.0, 3.0, 2.0])).round(decimals=3)
    tensor([1.0000, 2.5000, 2.5000])
    """
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (one, n), (two, m) = pools.pop(-2), pools.pop()
            pools.append(((one * n + two * m) / (n + m), n + m))
    parts = [
        value * (1 + 1e-6 * (torch.arange(n, dtype=values.dtype) - (n - 1) / 2) / n) for value, n in pools
    ]
    return torch.cat(parts) if parts else values
