"""Stage 1: train with an L1 pull on BatchNorm scales, until those of superfluous channels are 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored, Trace
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, CostModel
from pruning.stages.scales import ChannelScales
from pruning.tracing.trace import trace
from pruning.training.batches import BatchSource, length
from pruning.training.config import TrainConfig
from pruning.training.loop import Epoch, TrainingState, fit
from pruning.training.losses import Loss, Validate, cross_entropy
from pruning.utils.tree import Inputs

#: A pull that no gradient resists.
HOLD = 1e30


class ScalePull(ChannelScales):
    """The L1 pull on the scales γ of BatchNorm: call `step` after each optimizer step.

    Network Slimming (Liu et al., ICCV 2017) adds λ Σ|γ| to the loss. Here its proximal form is used,
    γ ← sign(γ) max(|γ| − lr λ w, 0), which gives exact zeros under any optimizer. The weight w of a
    group is the share of the network's params plus that of its MACs that one of its channels frees
    (MorphNet, Gordon et al., CVPR 2018); `refresh` updates it as channels die. Under a budget the two
    shares are weighted by how far the dense network exceeds each limit. The channel with the largest
    scales of each group is not pulled, so no group dies.

    Args:
        model: the model in training.
        traced: of this model.
        strength: λ; 0 does not pull. None finds λ at every `refresh(way)`, such that over the
            learning rates still to come just enough channels reach 0 to meet the budget, given how
            much training has resisted the pull so far.
        budget: limits as counts; without it params and MACs have equal weight.
        cost_model: of this model, where there is one already.

    Raises:
        PruningError: when no prunable group has a BatchNorm with a scale (unless `strength` is 0),
            or when there is neither a strength nor a budget.

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
            raise PruningError("the strength of the pull is found from a budget, and none was given")
        super().__init__(model, traced, cost_model)
        if not self.norms and strength != 0:
            raise PruningError(
                "no prunable group of this model has a BatchNorm with a scale, on which stage 1 pulls; "
                "train without it (strength 0) and score by taylor, l1 or l2"
            )
        self.strength = strength or 0.0
        self.budget = budget if strength is None else None
        self.weights = _resource_weights(self.dense, budget)
        #: (weight of a norm, λ w of each of its channels)
        self.thresholds: list[tuple[Tensor, Tensor]] = []
        #: `resistance`: Σ lr λ that moved the scales, relative to what would have without gradients.
        #: `distance` and `way`: what was left to go at the last refresh, and the learning rates then to come.
        self.resistance, self.distance, self.way = 1.0, 0.0, 0.0
        self.refresh()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every scale towards 0 by lr λ w, and to exactly 0 where it is nearer than that."""
        for weight, pull in self.thresholds:
            weight.copy_(weight.sign() * (weight.abs() - lr * pull).clamp_(min=0))

    def refresh(self, way: float = 0.0) -> None:
        """Update the weight of each group, and λ under a budget; call it once an epoch.

        Args:
            way: sum of the learning rates of the steps still to come.
        """
        magnitudes = self.magnitudes()
        share = self._freed_shares()
        if self.budget is not None:
            self._update_strength(self._distance(magnitudes, share), way)
        self.thresholds = []
        for group, norms in self.norms.items():
            spared = int(magnitudes[group].argmax())
            for weight, positions, channels in norms:
                pull = torch.zeros_like(weight, requires_grad=False)
                strength = self.strength * share[group] / len(norms)  # the norms share a channel's pull
                pull[positions] = torch.where(channels == spared, 0.0, strength).to(pull.dtype)
                if self.budget is not None and not self.distance:
                    # The budget is met: nothing is pulled, but scales that are 0 must stay 0.
                    dead = magnitudes[group].to(channels.device)[channels] == 0
                    pull[positions] = torch.where(dead, HOLD, pull[positions])
                self.thresholds.append((weight, pull))

    def state_dict(self) -> dict[str, float]:
        """Return the state of the search for λ; the scales are part of the model."""
        return {key: getattr(self, key) for key in ("strength", "resistance", "distance", "way")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        for key in self.state_dict():
            setattr(self, key, state[key])

    def _freed_shares(self) -> dict[str, float]:
        """What one channel of each group frees, as a weighted sum of shares of the dense costs."""
        alive = self.alive()
        widths = np.array([max(1, alive[g]) for g in self.cost_model.groups], dtype=float)
        freed = self.cost_model.freed(widths)
        shares = np.zeros(len(widths))
        for what, factor in self.weights.items():
            shares += factor * freed[what] / max(1, getattr(self.dense, what))
        return dict(zip(self.cost_model.groups, shares.tolist(), strict=True))

    def _update_strength(self, distance: float, way: float) -> None:
        """Find λ from the distance to go and the learning rates still to come."""
        pulled, gained = self.strength * (self.way - way), self.distance - distance
        if pulled > 0:
            # One epoch's measurement is noisy: it changes the estimate by a factor of 4 at most.
            seen = pulled / gained if gained > 0 else float("inf")
            self.resistance = max(1.0, min(max(seen, self.resistance / 4), self.resistance * 4))
        self.strength = self.resistance * distance / way if way > 0 else 0.0
        self.distance, self.way = distance, way

    def _distance(self, magnitudes: dict[str, Tensor], share: dict[str, float]) -> float:
        """The least Σ lr λ that, without resistance, leaves channels that meet the budget."""
        assert self.budget is not None
        budget, groups = self.budget, self.trace.groups
        reach = {  # Σ lr λ at which each channel reaches 0, ascending; the largest is spared
            group: np.sort(largest.numpy() / max(share[group], 1e-12))[:-1]
            for group, largest in magnitudes.items()
        }
        distances = np.unique(np.concatenate([np.zeros(1), *reach.values()]))

        def over_budget(distance: float) -> bool:
            widths = {g: groups[g].channels - int((far <= distance).sum()) for g, far in reach.items()}
            return bool(budget.excess(self.cost_model(widths)))

        low, high = 0, len(distances) - 1  # the cost falls with the distance
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if over_budget(distances[middle]) else (low, middle)
        return float(distances[low])


def _resource_weights(dense: Cost, budget: Budget | None) -> dict[str, float]:
    """The weight of each cost in the pull; they sum to 2."""
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
    loss: Loss = cross_entropy,
    validate: Validate | None = None,
    keep_best: bool = False,
    keep_start: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    label: str = "",
    resume: TrainingState | None = None,
) -> nn.Module:
    """Train a model in place so that the BatchNorm scales of superfluous channels become 0.

    Args:
        example_inputs: to trace with.
        strength: λ of `ScalePull`; None finds it from the budget anew every epoch, such that stage 1
            comes half of the way, in ratios, from the dense network to the budget. The other half is
            left to scores that see the loss.
        budget: what the result may cost; percentages are of this model.
        ignored: layers on which nothing pulls, as `trace` takes them.
        batches, config, loss, validate, keep_best, keep_start, on_epoch, label, resume: see `fit`.

    Returns the model in eval mode. Raises what `ScalePull` and `fit` raise.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2)]
    >>> net = sparsify(net, batches, TrainConfig(1), batches[0][0], strength=1000.0)
    >>> int((net[1].weight == 0).sum())
    3
    """
    pull = _pull_towards(budget, model, trace(model, example_inputs, ignored), strength)
    steps = length(batches) or 0

    def refresh(epoch: int) -> None:
        pull.refresh(_rates_to_come(config, steps, epoch))

    return fit(
        model,
        batches,
        config,
        loss=loss,
        validate=validate,
        keep_best=keep_best,
        keep_start=keep_start,
        before_epoch=refresh,
        after_step=pull.step,
        on_epoch=on_epoch,
        extra=pull,
        label=label,
        resume=resume,
    )


def _pull_towards(
    budget: Budget | None, model: nn.Module, traced: Trace, strength: float | None
) -> ScalePull:
    """The pull of stage 1; where it has to find λ, half of the way to the budget."""
    cost_model = CostModel(model, traced)
    if budget is not None:
        dense = cost_model(cost_model.full)
        budget = budget.resolve(dense)
        if strength is None:
            budget = budget.share(dense, 1, 2)
    return ScalePull(model, traced, strength, budget, cost_model)


def _rates_to_come(config: TrainConfig, steps: int, epoch: int) -> float:
    """The sum of the learning rates from this epoch on, at least a twentieth of that of all epochs.

    Without the bound λ would grow without limit in the last steps.
    """
    total = config.epochs * steps
    way = sum(config.rate(step / total) for step in range((epoch - 1) * steps, total))
    whole = sum(config.rate(step / total) for step in range(total))
    return config.lr * max(way, whole / 20)
