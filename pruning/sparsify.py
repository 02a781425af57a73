"""Stage 1: train with an L1 pull on BatchNorm scales, until the superfluous ones are 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.budget import Budget
from pruning.config import TrainConfig
from pruning.cost import Cost, CostModel
from pruning.errors import PruningError
from pruning.graph import Ignored, Inputs, Trace, trace
from pruning.training import BatchSource, fit


class ScalePull:
    """The L1 pull on the scales γ of BatchNorm: one call after each optimizer step.

    Network Slimming (Liu et al., ICCV 2017) adds λ Σ|γ| to the loss. Here its proximal
    form is used, γ ← sign(γ) max(|γ| − lr λ w, 0), which gives exact zeros under any
    optimizer. The weight w of a group is the share of the network's params plus that of its
    MACs that one of its channels frees (MorphNet, Gordon et al., CVPR 2018), so the pull is
    strongest where a zero pays most; `refresh` follows it as channels die. Under a budget
    the two shares are weighed by how many times over each limit the dense network is.

    >>> pull = ScalePull(model, traced, strength=1.0)             # doctest: +SKIP
    >>> loss.backward(); optimizer.step(); pull.step(lr)          # doctest: +SKIP

    Args:
        model: the model in training. traced: what `trace` gave for it.
        strength: λ; 0 pulls nothing.
        budget: limits in counts; without them params and MACs weigh alike.

    Raises `PruningError` when no prunable group has a BatchNorm with a scale.
    """

    def __init__(self, model: nn.Module, traced: Trace, strength: float, budget: Budget | None = None):
        self.strength = strength
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
        if not self.scales and strength:
            raise PruningError(
                "no prunable group of this model has a BatchNorm with a scale, on which stage 1 pulls; "
                "train without it (strength 0) and score by taylor, l1 or l2"
            )
        self.thresholds: list[tuple[Tensor, Tensor]] = []
        self.refresh()

    def alive(self) -> dict[str, int]:
        """Channels of each group that have a scale other than 0; groups without one are whole."""
        alive = {}
        for name, group in self.trace.groups.items():
            if name not in self.scales:
                alive[name] = group.channels
                continue
            living = torch.zeros(group.channels, dtype=torch.bool, device=self.scales[name][0][0].device)
            for weight, index, channel in self.scales[name]:
                living[channel[weight.detach()[index] != 0]] = True
            alive[name] = int(living.sum())
        return alive

    def refresh(self) -> None:
        """Weigh each group anew by what one of its channels frees; call it once an epoch."""
        alive = self.alive()
        widths = np.array([max(1, alive[g]) for g in self.cost_model.groups], dtype=float)
        freed = dict(zip(("params", "macs"), self.cost_model.freed(widths), strict=True))
        shares = np.zeros(len(widths))
        for what, factor in self.weights.items():
            shares += factor * freed[what] / max(1, getattr(self.dense, what))
        self.thresholds = []
        for group, share in zip(self.cost_model.groups, shares, strict=True):
            for weight, index, _ in self.scales.get(group, ()):
                pull = torch.zeros_like(weight, requires_grad=False)
                pull[index] = self.strength * float(share)
                self.thresholds.append((weight, pull))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Pull every scale towards 0 by lr λ w, and to exactly 0 where it is nearer than that."""
        for weight, pull in self.thresholds:
            weight.copy_(weight.sign() * (weight.abs() - lr * pull).clamp_(min=0))


def _resource_weights(dense: Cost, budget: Budget | None) -> dict[str, float]:
    """How much params and MACs weigh in the pull; 2 together."""
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
    strength: float,
    budget: Budget | None = None,
    ignored: Iterable[Ignored] = (),
    **options: Any,
) -> nn.Module:
    """Train a model in place so that the BatchNorm scales of superfluous channels become 0.

    Args:
        batches, config: as `fit` takes them. example_inputs: as `trace` takes them.
        strength: λ of `ScalePull`; useful values lie around 1.
        budget: what the result is to cost, as `ScalePull` takes it.
        ignored: layers on which nothing pulls, as `trace` takes them.
        options: further arguments of `fit`.

    Returns the model in eval mode. Raises what `ScalePull` and `fit` raise.
    """
    pull = ScalePull(model, trace(model, example_inputs, ignored), strength, budget)
    return fit(model, batches, config, before_epoch=pull.refresh, after_step=pull.step, **options)
