"""Score channels by what a layer that reads them loses, once its other inputs are refitted.

A layer multiplies its inputs x with its weights W. If channel c goes and the other inputs are refitted by
least squares, the squared error of the outputs grows by `W_cᵀ ([H⁻¹]_cc)⁻¹ W_c`, where H is the Gram matrix
of the inputs (Hassibi & Stork, Optimal Brain Surgeon, NeurIPS 1992). Channels are eliminated one after the
other, the cheapest first, with H and W of the others updated (Frantar et al., Optimal Brain Compression,
NeurIPS 2022, arXiv 2208.11580). So a score is the loss at the time when the channel goes, and a sum of
scores forecasts the loss of a plan.

Errors of outputs count by the Fisher information of the outputs, as in K-FAC. The part of an error that is
common to an example counts apart from its changes within the example, because gradients at different
positions point in similar directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Member, Trace
from pruning.graph.layers import is_weighted, weight_of
from pruning.planning.sampled_loss import SampledLoss
from pruning.planning.width_sweep import Batch
from pruning.surgery.linear_form import WeightUse, weight_uses
from pruning.training.batches import to_device
from pruning.utils.modules import device_of, eval_mode
from pruning.utils.tree import Inputs, fresh

#: Shrinkage of a Gram matrix towards its diagonal that is tried.
SHRINKAGES = tuple(10.0**power for power in range(-4, 2))

#: Most rows of inputs that a batch adds to the Gram matrix of a layer with a kernel.
ROWS = 1 << 15

#: The largest number of inputs whose Gram matrix is kept.
MOST_INPUTS = 8192


def reconstruction_losses(
    model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: SampledLoss
) -> dict[str, Tensor]:
    """Return by group the loss that each channel adds when it is eliminated, (channels,).

    Groups are left out that are read by no linear layer or convolution of torch with a weight of its own.

    Raises:
        PruningError: if there is no batch, or values are not finite.

    >>> from pruning.tracing.trace import trace
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> batches = [(torch.randn(64, 3), None)]
    >>> losses = reconstruction_losses(net, trace(net, torch.zeros(1, 3)), batches, SampledLoss())["0"]
    >>> int((losses < 1e-2 * losses.max()).sum())  # 4 channels of rank 3
    1
    """
    if not batches:
        raise PruningError("the score reconstruction needs calibration batches; the given data has none")
    members = [m for group in trace.groups.values() for m in group.side("in")]
    layers = {m.layer: model.get_submodule(m.layer) for m in members}
    weights = {
        weight: name
        for name, layer in layers.items()
        if is_weighted(layer) and isinstance(weight := weight_of(layer), nn.Parameter)
        if weight[0].numel() <= MOST_INPUTS
    }
    if not weights:
        return {}
    readers: dict[str, _Reader] = {}
    device = device_of(model)
    with eval_mode(model), torch.enable_grad():
        for batch in batches:
            _observe(model, to_device(batch, device)[0], weights, readers, loss)
    for name, reader in readers.items():
        if not reader.is_finite():
            raise PruningError(
                f"layer {name!r} has inputs or gradients that are not finite on the calibration inputs; "
                "check these inputs and the model's weights"
            )
    found = {}
    for name, group in trace.groups.items():
        problems = [
            problem
            for member in group.side("in")
            if member.layer in readers
            for problem in readers[member.layer].problems(member)
        ]
        if problems:
            found[name] = _eliminate(group, problems)
    return found


def _observe(
    model: nn.Module,
    inputs: Inputs,
    weights: dict[nn.Parameter, str],
    readers: dict[str, _Reader],
    loss: SampledLoss,
) -> None:
    """Add one batch to the statistics of all readers."""
    value: list[Tensor] = []

    class Run(nn.Module):
        def forward(self, given: Inputs) -> None:
            value.append(loss(model, given, None))

    uses = weight_uses(Run(), (fresh(inputs),), weights)
    gradients = torch.autograd.grad(value[0], [use.output for use in uses], allow_unused=True)
    for use, gradient in zip(uses, gradients, strict=True):
        name = weights[use.weight]  # type: ignore[index]
        if gradient is not None:
            readers.setdefault(name, _Reader(use)).add(use, gradient)


class _Reader:
    """Statistics of a layer's inputs and of the gradients of its outputs, over examples and within them.

    Each sum has one matrix for each part of the layer. Sums of inputs are kept for two folds of the examples.
    """

    def __init__(self, use: WeightUse):
        self.form, self.weight = use.form, use.weight
        self.matrix = use.form.matrix(use.weight)
        self.common, self.within = [torch.zeros(())] * 2, [torch.zeros(())] * 2
        self.mean, self.count = [torch.zeros(())] * 2, [0, 0]
        self.common_gradient, self.within_gradient, self.examples = torch.zeros(()), torch.zeros(()), 0

    @torch.no_grad()
    def add(self, use: WeightUse, gradient: Tensor) -> None:
        """Add one use: its inputs, and the gradients of the loss for its outputs."""
        x = use.input.detach()
        examples = 1 if x.ndim == len(self.form.kernel) + 1 else len(x)
        most = ROWS if self.form.kernel else None
        rows = torch.cat([block for (block, _) in self.form.rows(x, use.output.detach(), most=most)])
        rows = rows.unflatten(0, (examples, -1)).permute(2, 0, 1, 3)  # (parts, examples, positions, inputs)
        start = examples - examples // 4
        for fold, part in enumerate((rows[:, :start], rows[:, start:])):
            if part.shape[1]:
                self._add_inputs(fold, part)
        # Gradients: (parts, examples, positions, outputs)
        channels = gradient.detach().reshape(examples, -1, gradient.shape[-1]).mT
        if self.form.kernel:
            channels = gradient.detach().reshape(examples, self.matrix.shape[2] * len(self.matrix), -1)
        g = channels.double().unflatten(1, (len(self.matrix), -1)).permute(1, 0, 3, 2)
        total = g.sum(2)
        inner = (g - g.mean(2, keepdim=True)).flatten(1, 2)
        self.common_gradient = self.common_gradient.to(g) + total.mT @ total
        self.within_gradient = self.within_gradient.to(g) + inner.mT @ inner
        self.examples += examples

    def _add_inputs(self, fold: int, rows: Tensor) -> None:
        mean = rows.mean(2)
        inner = (rows - mean.unsqueeze(2)).flatten(1, 2)
        self.common[fold] = self.common[fold].to(mean) + mean.mT @ mean
        self.within[fold] = self.within[fold].to(mean) + inner.mT @ inner / rows.shape[2]
        self.mean[fold] = self.mean[fold].to(mean) + mean.sum(1)
        self.count[fold] += mean.shape[1]

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        sums = (*self.common, *self.within, self.common_gradient, self.within_gradient)
        return all(bool(torch.isfinite(value).all()) for value in sums)

    def problems(self, member: Member) -> list[_Problem]:
        """Return the elimination problem of each part in which the group's channels lie."""
        parts, taps = len(self.matrix), max(1, self.weight[0, 0].numel())
        size = self.matrix.shape[1]
        # In every example, common errors add up over the positions; errors within it are independent.
        common, within = self.common_gradient / self.examples, self.within_gradient / self.examples
        found = []
        for part in range(parts):
            owner = torch.full((size,), -1)
            here = member.index // (size // taps) == part
            first = (member.index[here] % (size // taps)) * taps
            for tap in range(taps):
                owner[first + tap] = member.channel[here]
            ratio = float(common[part].trace() / within[part].trace().clamp(min=1e-300))
            ratio = 1.0 if not 0 < ratio < 1e12 else ratio
            fisher = (common[part] / ratio + within[part]) / (1 if ratio == 1.0 else 2)
            if (owner >= 0).any():
                found.append(self._problem(part, owner, ratio, fisher))
        return found

    def _problem(self, part: int, owner: Tensor, ratio: float, fisher: Tensor) -> _Problem:
        values, vectors = torch.linalg.eigh(fisher)
        weight = self.matrix[part] @ (vectors * values.clamp(min=0).sqrt())
        folds = [self._gram(part, ratio, [fold]) for fold in (0, 1) if self.count[fold] > 1]
        gram = self._gram(part, ratio, [fold for fold in (0, 1) if self.count[fold]])
        shrinkage = _best_shrinkage(folds[0], folds[1], weight) if len(folds) == 2 else 1.0
        scale = gram.diagonal()
        gram = (gram + shrinkage * scale.diag()) / (1 + shrinkage)
        gram.diagonal().add_(1e-9 * scale.mean().clamp(min=1e-300))
        return _Problem(owner.to(gram.device), gram, weight)

    def _gram(self, part: int, ratio: float, folds: Sequence[int]) -> Tensor:
        """Return the centered Gram matrix of the inputs, errors weighted as they affect the loss."""
        count = sum(self.count[fold] for fold in folds)
        common, within, mean = (
            torch.stack([sums[fold][part] for fold in folds]).sum(0) / count
            for sums in (self.common, self.within, self.mean)
        )
        return ratio * (common - torch.outer(mean, mean)) + within


def _best_shrinkage(one: Tensor, other: Tensor, weight: Tensor) -> float:
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
class _Problem:
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


def _eliminate(group: Group, problems: list[_Problem]) -> Tensor:
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
    losses[order] = _ascending(torch.tensor(added, dtype=torch.double))
    return losses


def _ascending(values: Tensor) -> Tensor:
    """Return the ascending sequence closest to the values, with their sum, slightly sloped where it is level.

    >>> _ascending(torch.tensor([1.0, 3.0, 2.0])).round(decimals=3)
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
