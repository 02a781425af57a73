"""Stage 1: train with an L1 pull on BatchNorm scales, until the superfluous ones are 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored, Trace
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, CostModel
from pruning.tracing.trace import trace
from pruning.training.batches import BatchSource, length
from pruning.training.config import TrainConfig
from pruning.training.loop import fit
from pruning.utils.tree import Inputs

#: A pull that no gradient resists.
HOLD = 1e30


class ScalePull:
    """The L1 pull on the scales γ of BatchNorm: one call after each optimizer step.

    Network Slimming (Liu et al., ICCV 2017) adds λ Σ|γ| to the loss. Here its proximal
    form is used, γ ← sign(γ) max(|γ| − lr λ w, 0), which gives exact zeros under any
    optimizer. The weight w of a group is the share of the network's params plus that of its
    MACs that one of its channels frees (MorphNet, Gordon et al., CVPR 2018), so the pull is
    strongest where a zero pays most; `refresh` follows it as channels die. Under a budget
    the shares are weighed by how many times over each limit the dense network is. The
    channel with the largest scales of each group is spared, so no group dies.

    >>> pull = ScalePull(model, traced, strength=1.0)             # doctest: +SKIP
    >>> loss.backward(); optimizer.step(); pull.step(lr)          # doctest: +SKIP

    Args:
        model: the model in training. traced: what `trace` gave for it.
        strength: λ; 0 pulls nothing. None finds it: at every `refresh(way)`, where `way` is
            the sum of the learning rates of the steps left, λ is such that over this way
            just enough channels would come to 0 to meet the budget, given how much of the
            pull training has resisted so far.
        budget: limits in counts; without them params and MACs weigh alike.

    Raises `PruningError` when no prunable group has a BatchNorm with a scale, or when there
    is neither a strength nor a budget.
    """

    def __init__(self, model: nn.Module, traced: Trace, strength: float | None, budget: Budget | None = None):
        if strength is None and budget is None:
            raise PruningError("the strength of the pull is found from a budget, and none was given")
        self.strength = strength or 0.0
        self.budget = budget if strength is None else None
        self.trace = traced
        self.cost_model = CostModel(model, traced)
        self.dense = self.cost_model(self.cost_model.full)
        self.weights = _resource_weights(self.dense, budget)
        self.scales: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for name, group in traced.groups.items():
            for member in group.side("out"):
                layer = model.get_submodule(member.layer)
                if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.weight is not None:
                    device = layer.weight.device
                    entry = (layer.weight, member.index.to(device), member.channel.to(device))
                    self.scales.setdefault(name, []).append(entry)
        if not self.scales and strength != 0:
            raise PruningError(
                "no prunable group of this model has a BatchNorm with a scale, on which stage 1 pulls; "
                "train without it (strength 0) and score by taylor, l1 or l2"
            )
        self.thresholds: list[tuple[Tensor, Tensor]] = []
        #: How many times its length a way must be pulled, the gradients resisting; and where
        #: the search for λ stood at the last refresh.
        self.resistance, self.distance, self.way = 1.0, 0.0, 0.0
        self.refresh()

    def magnitudes(self) -> dict[str, Tensor]:
        """The largest |γ| of each channel, by group, on the CPU; groups without scales have no entry."""
        found = {}
        for name, entries in self.scales.items():
            largest = torch.zeros(self.trace.groups[name].channels, dtype=torch.float32)
            for weight, index, channel in entries:
                values = weight.detach().abs()[index].float().cpu()
                largest.scatter_reduce_(0, channel.cpu(), values, "amax")
            found[name] = largest
        return found

    def alive(self) -> dict[str, int]:
        """Channels of each group that have a scale other than 0; groups without one are whole."""
        living = {name: int((largest > 0).sum()) for name, largest in self.magnitudes().items()}
        return {name: living.get(name, group.channels) for name, group in self.trace.groups.items()}

    def left(self) -> Cost:
        """What the network costs without the channels whose scales are 0."""
        return self.cost_model({group: max(1, width) for group, width in self.alive().items()})

    def refresh(self, way: float = 0.0) -> None:
        """Weigh each group anew by what one of its channels frees; call it once an epoch."""
        magnitudes = self.magnitudes()
        alive = self.alive()
        widths = np.array([max(1, alive[g]) for g in self.cost_model.groups], dtype=float)
        freed = self.cost_model.freed(widths)
        shares = np.zeros(len(widths))
        for what, factor in self.weights.items():
            shares += factor * freed[what] / max(1, getattr(self.dense, what))
        share = dict(zip(self.cost_model.groups, shares.tolist(), strict=True))
        if self.budget is not None:
            self._search(self._distance(magnitudes, share), way)
        self.thresholds = []
        for group, entries in self.scales.items():
            spared = int(magnitudes[group].argmax())
            for weight, index, channel in entries:
                pull = torch.zeros_like(weight, requires_grad=False)
                strength = self.strength * share[group] / len(entries)  # a channel's share, over its norms
                pull[index] = torch.where(channel == spared, 0.0, strength).to(pull.dtype)
                if self.budget is not None and not self.distance:
                    # There already: nothing is pulled, but what is 0 must not come back.
                    dead = magnitudes[group].to(channel.device)[channel] == 0
                    pull[index] = torch.where(dead, HOLD, pull[index])
                self.thresholds.append((weight, pull))

    def _search(self, distance: float, way: float) -> None:
        """Find λ from the distance to go and the way left."""
        pulled, gained = self.strength * (self.way - way), self.distance - distance
        if pulled > 0:
            # One epoch's figure is noisy: it changes what was believed by a factor of 4 at most.
            seen = pulled / gained if gained > 0 else float("inf")
            self.resistance = max(1.0, min(max(seen, self.resistance / 4), self.resistance * 4))
        self.strength = self.resistance * distance / way if way > 0 else 0.0
        self.distance, self.way = distance, way

    def state_dict(self) -> dict[str, float]:
        """Where the search for λ stands; the scales are in the model."""
        return {key: getattr(self, key) for key in ("strength", "resistance", "distance", "way")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for key in self.state_dict():
            setattr(self, key, state[key])

    def _distance(self, magnitudes: dict[str, Tensor], share: dict[str, float]) -> float:
        """The least Σ lr λ that, without resistance, leaves channels that meet the budget."""
        assert self.budget is not None
        reach = {  # how far each channel is from 0, in units of Σ lr λ; the spared one never gets there
            group: np.sort(largest.numpy() / max(share[group], 1e-12))[:-1]
            for group, largest in magnitudes.items()
        }
        distances = np.unique(np.concatenate([np.zeros(1), *reach.values()]))
        groups = self.trace.groups

        def over(distance: float) -> bool:
            widths = {g: groups[g].channels - int((far <= distance).sum()) for g, far in reach.items()}
            assert self.budget is not None
            return bool(self.budget.excess(self.cost_model(widths)))

        low, high = 0, len(distances) - 1  # the more channels go, the less is left
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if over(distances[middle]) else (low, middle)
        return float(distances[low])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Pull every scale towards 0 by lr λ w, and to exactly 0 where it is nearer than that."""
        for weight, pull in self.thresholds:
            weight.copy_(weight.sign() * (weight.abs() - lr * pull).clamp_(min=0))


def _resource_weights(dense: Cost, budget: Budget | None) -> dict[str, float]:
    """How much each cost weighs in the pull; 2 together."""
    limits = budget.limits() if budget is not None else {}
    excess = {what: max(0.0, getattr(dense, what) / limit - 1) for what, limit in limits.items()}
    total = sum(excess.values())
    if not total:
        return {"params": 1.0, "macs": 1.0}
    return {what: 2 * value / total for what, value in excess.items()}


def sparsify(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    example_inputs: Inputs,
    *,
    strength: float | None = None,
    budget: Budget | None = None,
    ignored: Iterable[Ignored] = (),
    **options: Any,
) -> nn.Module:
    """Train a model in place so that the BatchNorm scales of superfluous channels become 0.

    Args:
        batches, config: as `fit` takes them. example_inputs: as `trace` takes them.
        strength: λ of `ScalePull`; None finds it from the budget anew every epoch, such that
            stage 1 comes half of the way, in ratios, from the dense network to the budget:
            the other half is left to scores that see the loss.
        budget: what the result is to cost; percentages are of this model.
        ignored: layers on which nothing pulls, as `trace` takes them.
        options: further arguments of `fit`.

    Returns the model in eval mode. Raises what `ScalePull` and `fit` raise.
    """
    traced = trace(model, example_inputs, ignored)
    if budget is not None:
        cost_model = CostModel(model, traced)
        dense = cost_model(cost_model.full)
        budget = budget.resolve(dense)
        if strength is None:
            budget = budget.share(dense, 1, 2)
    pull = ScalePull(model, traced, strength, budget)
    steps = length(batches) or 0

    def refresh(epoch: int) -> None:
        total = config.epochs * steps
        ahead = range((epoch - 1) * steps, total)
        # On the last twentieth of the way nothing is made up for: λ would grow without bound.
        way = sum(config.rate(step / total) for step in ahead)
        whole = sum(config.rate(step / total) for step in range(total))
        pull.refresh(config.lr * max(way, whole / 20))

    return fit(model, batches, config, before_epoch=refresh, after_step=pull.step, extra=pull, **options)
