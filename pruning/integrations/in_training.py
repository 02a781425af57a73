"""Prune a model inside the training loop of another library, which keeps its model and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, CostModel
from pruning.stages.prune import Step, StepSettings, prune_step
from pruning.surgery.optimizer_state import transfer
from pruning.utils.compare import cuda_devices
from pruning.utils.tree import Inputs

#: What a module keeps when it takes over the parts of another: how its owner has changed its calls.
_KEPT = frozenset(
    key for key in vars(nn.Module()) if "hook" in key or key in ("training", "_compiled_call_impl")
)


class Pull(Protocol):
    """Drives channels to 0 before they are removed, such as `PacedPull`."""

    def after_step(self) -> object:
        """Act on the model after a step of the optimizer."""


#: Makes a pull of a model, its trace, the budget and the number of steps until the first pruning.
MakePull = Callable[[nn.Module, Trace, Budget, int], Pull]


@dataclass
class TrainingPruner:
    """Prunes a model in place at given steps of a training, in equal ratios towards a budget.

    Attributes:
        budget: limits on the result; percentages refer to the model at the first call of `begin`.
        at: numbers of the optimizer steps after which the model is pruned, ascending.
        settings: how each step prunes.
        pull: makes what drives channels to 0 until the first pruning, for example `PacedPull`; None pulls
            none.
        target, start: the budget as counts, and the cost before the first pruning; set by `begin`.
        steps: the pruning steps so far.

    Raises:
        PruningError: if `at` is empty, not ascending, or below 1.
    """

    budget: Budget
    at: Sequence[int]
    settings: StepSettings = field(default_factory=StepSettings)
    pull: MakePull | None = None
    target: Budget | None = None
    start: Cost | None = None
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        at = list(self.at)
        if not at or at != sorted(set(at)) or at[0] < 1:
            raise PruningError(
                f"at={self.at!r}: expected the numbers of the steps at which to prune, from 1 and ascending"
            )
        self._pulling: Pull | None = None

    def begin(self, model: nn.Module, example_inputs: Inputs, done: int = 0) -> None:
        """Trace the model, resolve the budget, and start to pull; `done` steps of training are over.

        Raises:
            PruningError: if a training is resumed whose target is not known.
        """
        self.example_inputs = example_inputs
        with torch.random.fork_rng(cuda_devices()):  # the order of the user's data stays
            traced = self.settings.traced(model, example_inputs)
        cost_model = CostModel(model, traced)
        if self.target is None:
            if done >= self.at[0]:
                raise PruningError(
                    f"the model was pruned after step {self.at[0]} already, and its budget then is not "
                    "known; restore the state of the callback with the checkpoint"
                )
            self.start = cost_model(cost_model.full)
            self.target = self.budget.resolve(self.start)
        if self.pull is not None and done < self.at[0]:
            self._pulling = self.pull(model, traced, self.target, self.at[0] - done)

    def after_step(
        self,
        model: nn.Module,
        step: int,
        optimizers: Iterable[Optimizer],
        convert: Callable[[nn.Module], nn.Module] | None = None,
        owner: nn.Module | None = None,
    ) -> Step | None:
        """Pull, and prune the model in place if it is due after this step; return the pruning step.

        Args:
            model: keeps its identity; its parts become those of the pruned model.
            step: number of optimizer steps taken.
            optimizers: of the model; they are carried over (see `transfer`).
            convert: returns the model whose parts are taken, given the pruned one.
            owner: a module around the model, whose other parameters the optimizers may train, too.
        """
        if self._pulling is not None and step <= self.at[0]:
            self._pulling.after_step()
        if step not in self.at:
            return None
        if self.target is None or self.start is None:
            raise PruningError("pruning in training was not begun; call begin() before the first step")
        training = model.training
        share = self.target.share(self.start, list(self.at).index(step) + 1, len(self.at))
        with torch.random.fork_rng(cuda_devices()):
            done = prune_step(model, self.example_inputs, share, self.settings)
            small = done.model if convert is None else convert(done.model)
        others = () if owner is None else list(owner.parameters())
        for optimizer in optimizers:
            transfer(optimizer, model, small, done.trace, done.plan, others)
        adopt(model, small)
        model.train(training)
        self.steps.append(done)
        return done

    def state(self) -> dict[str, object]:
        """Return what a checkpoint has to hold: the budget as counts, and the cost before pruning."""
        return {
            "target": self.target.limits() if self.target is not None else None,
            "start": vars(self.start) if self.start is not None else None,
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Continue from what `state` returned."""
        target, start = state["target"], state["start"]
        self.target = Budget(**target) if isinstance(target, Mapping) else None
        self.start = Cost(**start) if isinstance(start, Mapping) else None


def adopt(model: nn.Module, other: nn.Module) -> None:
    """Give a model the parts, weights and numbers of another one in place; its hooks and calls stay.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> adopt(model, nn.Sequential(nn.Linear(2, 1)))
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    for key, value in vars(other).items():
        if key not in _KEPT and not callable(value):
            model.__dict__[key] = value
