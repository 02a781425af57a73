"""Shrink the BatchNorm scales of superfluous channels by an L1 penalty, whose strength every epoch finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, CostModel
from pruning.stages.channel_weights import ChannelWeights
from pruning.stages.scales import ChannelScales

#: A threshold so large that a scale of 0 stays 0, whatever its gradient.
HOLD = 1e30

#: The attributes that the search for λ consists of.
_STATE = ("strength", "resistance", "distance", "way")


class ScalePull(ChannelScales):
    """Shrink the scales γ of channels by an L1 penalty; call `step` after each optimizer step.

    Network Slimming (Liu et al., ICCV 2017) adds λ Σ|γ| to the loss. This class takes the proximal step
    instead, γ ← sign(γ) max(|γ| − lr λ w, 0), which gives exact zeros under any optimizer: like the weight
    decay of AdamW, it is decoupled from how an optimizer scales gradients. In a group without a norm, the
    weights θ of a channel take the step of group lasso (Yuan & Lin, J. R. Stat. Soc. B 68:49, 2006), θ ← θ
    max(1 − lr λ w r / ‖θ‖, 0), where r is the mean ‖θ‖ of the group at first; so both lose the same share at
    the same λ. The weight w of a group is the share of the network's params plus the share of its MACs that
    removing one of its channels frees (MorphNet, Gordon et al., CVPR 2018); `refresh` updates it as scales
    become 0. Under a budget the two shares are weighted by the relative excess of the dense network over each
    limit. In each group the channel with the largest scale is spared, so that no group loses all its
    channels.

    Args:
        model: the model in training.
        traced: trace of the model.
        strength: λ; 0 disables the penalty. With None every `refresh(way)` chooses λ such that, over
            the learning rates still to come, just enough scales reach 0 to meet the budget; it takes
            into account how much the gradients have slowed the scales down so far.
        budget: limits as counts; without it params and MACs have equal weight.
        cost_model: cost model of the model; built here if not given.

    Raises:
        PruningError: if no prunable group has scales or weights to shrink (unless `strength` is 0), or if
            neither a strength nor a budget is given.

    >>> from pruning.tracing.trace import trace
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> pull = ScalePull(net, trace(net, torch.zeros(2, 3)), strength=100.0)
    >>> pull.step(lr=1.0)
    >>> pull.alive()
    {'0': 1}
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        strength: float | None,
        budget: Budget | None = None,
        cost_model: CostModel | None = None,
    ):
        if strength is None and budget is None:
            raise PruningError(
                "strength=None finds the strength of the L1 penalty from a budget, and budget is None: give "
                "one of the two"
            )
        super().__init__(model, traced, cost_model)
        if not self.pulled_groups and strength != 0:
            raise PruningError(
                "no prunable group of this model has scales or weights that can be trained, which stage 1 "
                "shrinks; train without the penalty (strength 0) and score by taylor, l1 or l2"
            )
        self.strength = strength or 0.0
        self.budget = budget if strength is None else None
        self.weights = resource_weights(self.dense, budget)
        #: (scales γ of a norm, λ w of each of them)
        self.thresholds: list[tuple[Tensor, Tensor]] = []
        #: (weights of a group, λ w of each channel)
        self.row_thresholds: list[tuple[ChannelWeights, Tensor]] = []
        #: `resistance`: Σ lr λ spent, divided by the Σ lr λ that would have sufficed without gradients.
        #: `distance`, `way`: at the last refresh, the Σ lr λ needed to meet the budget without gradients,
        #: and the sum of the learning rates still to come.
        self.resistance, self.distance, self.way = 1.0, 0.0, 0.0
        self.refresh()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every scale towards 0 by lr λ w; a scale with a smaller magnitude becomes exactly 0."""
        for weights, limits in self.row_thresholds:
            weights.shrink(lr * limits)
        for weight, threshold in self.thresholds:
            weight.copy_(weight.sign() * (weight.abs() - lr * threshold).clamp_(min=0))

    def refresh(self, way: float = 0.0) -> None:
        """Update the weight of each group, and λ if it is found from a budget; call once per epoch.

        Args:
            way: sum of the learning rates of the steps still to come.
        """
        magnitudes = self.magnitudes()
        alive = {group: max(1, width) for group, width in self.alive().items()}
        share = freed_shares(self.cost_model, alive, self.weights, self.dense)
        if self.budget is not None:
            self._update_strength(self._distance(magnitudes, share), way)
        self.thresholds, self.row_thresholds = [], []
        for group in self.pulled_groups:
            is_zero = magnitudes[group] == 0
            each = self.strength * share[group] / max(1, len(self.norms.get(group, ())))
            by_channel = torch.full((len(is_zero),), each)
            by_channel[int(magnitudes[group].argmax())] = 0.0
            if self.budget is not None and not self.distance:
                # The budget is met: shrink no other scale, but keep scales that are 0 at 0.
                by_channel = torch.where(is_zero, HOLD, by_channel)
            self._set_thresholds(group, by_channel)

    def _set_thresholds(self, group: str, by_channel: Tensor) -> None:
        """Set λ w of every channel of a group."""
        if group in self.rows:
            weights = self.rows[group]
            if by_channel.any():
                self.row_thresholds.append((weights, by_channel.to(weights.rows[0].parameter.device)))
            return
        for weight, positions, channels in self.norms[group]:
            threshold = torch.zeros_like(weight, requires_grad=False)
            threshold[positions] = by_channel.to(channels.device)[channels].to(threshold.dtype)
            self.thresholds.append((weight, threshold))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the search for λ, without the scales, which are part of the model."""
        found: dict[str, Any] = {key: getattr(self, key) for key in _STATE}
        return {**found, "references": self.references()} if self.rows else found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state_dict`."""
        for key in _STATE:
            setattr(self, key, state[key])
        self.set_references(state.get("references", {}))

    def _update_strength(self, distance: float, way: float) -> None:
        """Update λ from the remaining distance (see `_distance`) and the learning rates still to come."""
        spent, gained = self.strength * (self.way - way), self.distance - distance
        if spent > 0:
            # The measurement of one epoch is noisy: it changes the estimate by a factor of 4 at most.
            measured = spent / gained if gained > 0 else float("inf")
            self.resistance = max(1.0, min(max(measured, self.resistance / 4), self.resistance * 4))
        self.strength = self.resistance * distance / way if way > 0 else 0.0
        self.distance, self.way = distance, way

    def _distance(self, magnitudes: dict[str, Tensor], share: dict[str, float]) -> float:
        """Return the least Σ lr λ that, without gradients, sets enough scales to 0 to meet the budget."""
        assert self.budget is not None
        budget, groups = self.budget, self.trace.groups
        zero_at = {  # the Σ lr λ at which each channel's scale reaches 0, ascending, without the spared one
            group: np.sort(largest.numpy() / max(share[group], 1e-12))[:-1]
            for group, largest in magnitudes.items()
        }
        distances = np.unique(np.concatenate([np.zeros(1), *zero_at.values()]))

        def over_budget(distance: float) -> bool:
            widths = {g: groups[g].channels - int((at <= distance).sum()) for g, at in zero_at.items()}
            return bool(budget.excess(self.cost_model(widths)))

        low, high = 0, len(distances) - 1  # the cost falls with the distance
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if over_budget(distances[middle]) else (low, middle)
        return float(distances[low])


def resource_weights(dense: Cost, budget: Budget | None) -> dict[str, float]:
    """Return the weight of each cost in the penalty; the weights sum to 2."""
    limits = budget.limits() if budget is not None else {}
    excess = {what: max(0.0, getattr(dense, what) / limit - 1) for what, limit in limits.items()}
    total = sum(excess.values())
    if not total:
        return {"params": 1.0, "macs": 1.0}
    return {what: 2 * value / total for what, value in excess.items()}


def freed_shares(
    cost_model: CostModel, widths: Mapping[str, int], weights: Mapping[str, float], dense: Cost
) -> dict[str, float]:
    """Return by group what removing one channel frees: a weighted sum of shares of the dense cost."""
    freed = cost_model.freed(np.array([widths[group] for group in cost_model.groups], dtype=float))
    shares = np.zeros(len(cost_model.groups))
    for what, factor in weights.items():
        shares += factor * freed[what] / max(1, getattr(dense, what))
    return dict(zip(cost_model.groups, shares.tolist(), strict=True))
