"""Drive the scales of channels to 0 step by step, at the pace of a budget: stage 1 of a trained network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, CostModel
from pruning.stages.scale_pull import freed_shares, resource_weights
from pruning.stages.scales import ChannelScales, joined

#: Share of the steps after which the zeros have reached the budget; the rest train with them.
REACHED = 0.75
#: Share of the steps for which a scale is pulled before it becomes 0.
HORIZON = 0.1
#: Every group keeps this share of the channels that it has where all groups are narrowed alike: the
#: importance of single channels does not show that all of them together carry everything.
EVEN = 0.5
#: Share of the past in the moving average of a channel's importance.
MEMORY = 0.9
#: The scales to pull are chosen this many times at most, because that reads all scales.
CHOICES = 400


class Pulled(NamedTuple):
    """How far a pull has come.

    Attributes:
        zero: number of scales at 0.
        scales: number of all scales that can become 0.
        left: cost of the network without the channels whose scales are 0.
        alive: by group, the channels whose scales are not 0.
        budget: the budget of the pull, as counts.
        reached: whether the next zero would go beyond the budget, or none is possible.
        sign: what is 0 for a channel that is not alive: γ, or weights.
    """

    zero: int
    scales: int
    left: Cost
    alive: dict[str, int]
    budget: Budget
    reached: bool
    sign: str = "γ"

    @property
    def what(self) -> str:
        return "scales" if self.sign == "γ" else "channels"

    def __str__(self) -> str:
        end = "reached" if self.reached else "not yet reached"
        return (
            f"{self.zero} of {self.scales} {self.what} are 0 ({self.sign} ≠ 0 in {joined(self.alive)}): "
            f"{self.left}; {self.budget} {end}"
        )


class _References(TypedDict, total=False):
    """The part of `PullState` that is empty where no weights are pulled."""

    references: dict[str, float]


class PullState(_References):
    """The state of a pull between two steps; by group, (channels,) flags of the scales.

    `references` is that of `ChannelScales`.
    """

    step: int
    zero: dict[str, Tensor]
    pulled: dict[str, Tensor]
    importance: dict[str, Tensor]


class PacedPull(ChannelScales):
    """Shrink scales γ of channels to 0 at the pace of a budget; call `after_step` after each optimizer step.

    The cost without the channels whose scales are 0 falls linearly with the steps, from that of the network
    to the budget, which it reaches at `REACHED` of the steps and never goes below. The strength of the
    penalty needs no setting: the scales of the channels that go next are shrunk over `HORIZON` of the steps,
    and become exactly 0 when they are due, whatever optimizer, learning rate, precision or accumulation of
    gradients the training has. Scales at 0 stay there. Every group keeps `floor` channels, and `EVEN`
    times its width in a network that meets the budget with all groups narrowed alike.

    In a group without norms, all weights and biases θ that make a channel are shrunk in its place, and its
    importance is |Σ θ ∂L/∂θ|.

    Next are the channels whose scale changes the loss least for what they free: |γ ∂L/∂γ|, the first-order
    change of the loss (Molchanov et al., arXiv 1906.10771), averaged over the steps, divided by the freed
    share of the cost. The scales of a trained network have not learned to be small where a channel matters
    little, so |γ| alone would be a poor guide; it decides where the gradients of the last step are gone
    (`zero_grad` before `after_step`).

    Args:
        model: the model in training.
        traced: trace of the model.
        budget: limits on the cost; percentages refer to the model.
        steps: number of optimizer steps of the training.
        floor: fewest channels that every group keeps, or by group.
        cost_model: cost model of the model; built here if not given.

    Raises:
        PruningError: if no prunable group has scales or weights to shrink, or if `steps` is below 1.

    >>> from pruning.tracing.trace import trace
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> pull = PacedPull(net, trace(net, torch.zeros(2, 3)), Budget(channels=4), steps=8)
    >>> for _ in range(8):
    ...     # loss.backward(), optimizer.step()
    ...     pull.after_step()
    >>> print(pull.after_epoch())
    4 of 8 scales are 0 (γ ≠ 0 in 4): 26 params, 20 MACs; ≤ 4 channels reached
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        budget: Budget,
        steps: int,
        *,
        floor: int | Mapping[str, int] = 1,
        cost_model: CostModel | None = None,
    ):
        super().__init__(model, traced, cost_model)
        if not self.pulled_groups:
            raise PruningError(
                "no prunable group of this model has scales or weights that can be trained, which this pull "
                "shrinks: train without it, and prune by the score taylor, l1 or l2"
            )
        if steps < 1:
            raise PruningError(f"steps {steps}: expected the number of optimizer steps to come, from 1")
        self.budget = budget.resolve(self.dense)
        self.steps = steps
        self.weights = resource_weights(self.dense, self.budget)
        floors = floor if isinstance(floor, Mapping) else dict.fromkeys(self.pulled_groups, floor)
        even = self._even_widths()
        self.floor = {
            group: max(1, floors.get(group, 1), math.ceil(EVEN * even[group])) for group in self.pulled_groups
        }
        self.step = 0
        self.importance: dict[str, Tensor] = {}
        magnitudes = self.magnitudes()
        self.zero = {group: values == 0 for group, values in magnitudes.items()}
        self.pulled = {
            group: torch.zeros_like(values, dtype=torch.bool) for group, values in magnitudes.items()
        }
        self.reached = False

    @torch.no_grad()
    def after_step(self) -> None:
        """Shrink the scales that go next, and keep those at 0 there."""
        self.step += 1
        if self.step % max(1, self.steps // CHOICES) == 0 or self.step == self.steps:
            self._choose()
        factor = HORIZON * self.steps / (HORIZON * self.steps + 2)
        for group, weights in self.rows.items():
            zero, pulled = self.zero[group], self.pulled[group]
            if zero.any() or pulled.any():
                weights.scale(torch.where(zero, 0.0, torch.where(pulled, factor, 1.0)))
        for group, norms in self.norms.items():
            for weight, positions, channels in norms:
                zero, pulled = (
                    flags[group].to(weight.device)[channels] for flags in (self.zero, self.pulled)
                )
                values = weight[positions]
                weight[positions] = torch.where(zero, 0.0, torch.where(pulled, values * factor, values))

    def after_epoch(self) -> Pulled:
        """Return how far the pull has come; printed, it is one line."""
        alive = self.alive()
        zero = sum(int((values == 0).sum()) for values in self.magnitudes().values())
        scales = sum(len(flags) for flags in self.zero.values())
        return Pulled(zero, scales, self.left(), alive, self.budget, self.reached, self.sign)

    @torch.no_grad()
    def copy_zeros(self, model: nn.Module) -> None:
        """Set the same scales to 0 in another copy of the model, such as a moving average of its weights."""
        scales = ChannelScales(model, self.trace, self.cost_model)
        for group, weights in scales.rows.items():
            weights.scale(torch.where(self.zero[group], 0.0, 1.0))
        for group, norms in scales.norms.items():
            for weight, positions, channels in norms:
                zero = self.zero[group].to(weight.device)[channels]
                weight[positions] = torch.where(zero, 0.0, weight[positions])

    def state_dict(self) -> PullState:
        """Return the state of the pull, without the scales, which are part of the model."""
        found: PullState = {
            "step": self.step,
            "zero": {group: flags.clone() for group, flags in self.zero.items()},
            "pulled": {group: flags.clone() for group, flags in self.pulled.items()},
            "importance": {group: values.clone() for group, values in self.importance.items()},
        }
        if self.rows:
            found["references"] = self.references()
        return found

    def load_state_dict(self, state: PullState) -> None:
        """Restore a state returned by `state_dict`."""
        self.step = state["step"]
        self.zero, self.pulled = dict(state["zero"]), dict(state["pulled"])
        self.importance = dict(state["importance"])
        self.set_references(state.get("references", {}))
        self.reached = False

    def _even_widths(self) -> dict[str, float]:
        """Return the largest widths at which all groups are narrowed alike and the budget is met."""
        full = {group: self.trace.groups[group].channels for group in self.pulled_groups}
        low, high = 0.0, 1.0
        for _ in range(30):
            share = (low + high) / 2
            widths = {group: max(1, math.floor(share * channels)) for group, channels in full.items()}
            low, high = (low, share) if self.budget.excess(self.cost_model(widths)) else (share, high)
        return {group: low * channels for group, channels in full.items()}

    def _planned(self, step: float) -> dict[str, float]:
        """Return the cost that each limit allows after a number of steps."""
        progress = min(1.0, step / max(1.0, REACHED * self.steps))
        return {
            what: getattr(self.dense, what) + progress * min(0, limit - getattr(self.dense, what))
            for what, limit in self.budget.limits().items()
        }

    def _choose(self) -> None:
        """Choose the scales that are due, which become 0, and those that follow, which are pulled."""
        alive = {group: int((~flags).sum()) for group, flags in self.zero.items()}
        full = dict(zip(self.cost_model.groups, map(int, self.cost_model.full), strict=True))
        widths = {**full, **{group: max(1, number) for group, number in alive.items()}}
        for flags in self.pulled.values():
            flags.zero_()
        due, soon = self._planned(self.step), self._planned(self.step + HORIZON * self.steps)
        is_met = False
        for group, channel in self._order(widths):
            cost = self.cost_model(widths)
            is_due = _above(cost, due)
            if not is_due and not _above(cost, soon):
                is_met = True
                break
            narrower = {**widths, group: widths[group] - 1}
            if widths[group] <= self.floor[group]:
                continue
            if _beyond(self.cost_model(narrower), self.budget):
                is_met = True
                continue
            widths = narrower
            (self.zero if is_due else self.pulled)[group][channel] = True
        self.reached = is_met and self.step >= REACHED * self.steps

    def _order(self, widths: Mapping[str, int]) -> list[tuple[str, int]]:
        """Return the channels whose scales are not 0, from the one to go first."""
        shares = freed_shares(self.cost_model, widths, self.weights, self.dense)
        self._measure()
        found: list[tuple[float, str, int]] = []
        for group, values in (self.importance or self.magnitudes()).items():
            keys = values.numpy() / max(shares[group], 1e-12)
            alive = np.flatnonzero(~self.zero[group].numpy()).tolist()
            found += [(float(keys[channel]), group, channel) for channel in alive]
        return [(group, channel) for _, group, channel in sorted(found)]

    def _measure(self) -> None:
        """Update the importance of every channel by the gradients of the last step, if there are any.

        A step that a scaled loss skips has gradients that are not finite; it does not count.
        """
        found: dict[str, Tensor] = {}
        for group in self.pulled_groups:
            change = self._first_order_change(group)
            if change is None or not bool(torch.isfinite(change).all()):
                return
            found[group] = change.abs()
        for group, change in found.items():
            before = self.importance.get(group, change)
            self.importance[group] = before.lerp(change, 1 - MEMORY)

    def _first_order_change(self, group: str) -> Tensor | None:
        """Return Σ γ ∂L/∂γ of every channel, (channels,), on the CPU; None without gradients."""
        if group in self.rows:
            return self.rows[group].first_order_change()
        change = torch.zeros(self.trace.groups[group].channels)
        for weight, positions, channels in self.norms[group]:
            if weight.grad is None:
                return None
            product = (weight.detach() * weight.grad)[positions].float().cpu()
            change.scatter_add_(0, channels.cpu(), product)
        return change


def _above(cost: Cost, planned: Mapping[str, float]) -> bool:
    """Return whether a cost exceeds any planned one."""
    return any(getattr(cost, what) > limit for what, limit in planned.items())


def _beyond(cost: Cost, budget: Budget) -> bool:
    """Return whether a cost is below every limit of a budget."""
    return all(getattr(cost, what) < limit for what, limit in budget.limits().items())
