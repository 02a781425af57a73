"""Whole layers in the pipeline: which go is tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruning.errors import PruningError
from pruning.planning.budget import Budget
from pruning.stages.prune import prune
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.layer_removal import removable, without_layer
from pruning.tracing.trace import trace
from pruning.training.batches import to_device
from pruning.training.losses import Validate
from pruning.utils.modules import device_of, eval_mode
from pruning.utils.tree import Inputs

#: Of many layers that could go, the trials see these first few: without them the loss on
#: the calibration data is lowest.
TRIALS = 3


@dataclass(frozen=True)
class Trial:
    """What a model is worth within the budget: pruned in one step and trained a little.

    `begin` gives what stage 3 would begin with, of a pruned model; `train` is its fine-tuning in a
    tenth of its epochs; `options` are those of `prune`.
    """

    model: nn.Module
    example_inputs: Inputs
    target: Budget
    begin: Callable[[nn.Module], nn.Module]
    train: Callable[..., nn.Module]
    validate: Validate
    options: dict[str, Any]

    def __call__(self, remove: tuple[str, ...], label: str) -> float:
        """The validation figure without these layers; −∞ where the budget is out of reach."""
        try:
            step = prune(self.model, self.example_inputs, self.target, remove=remove, **self.options)
        except PruningError:
            return float("-inf")
        return self.validate(self.train(self.begin(step.model), label=label))

    def cheapest_first(self, model: nn.Module) -> list[str]:
        """The layers that the model can do without, from the least calibration loss without them on."""
        batches = self._calibration()
        losses = {}
        for name, smaller in self._smaller(model, batches):  # one at a time: each is a copy of the network
            with torch.no_grad(), eval_mode(smaller):
                losses[name] = sum(self.options["loss"](smaller, *batch).item() for batch in batches)
        return sorted(losses, key=losses.__getitem__)

    def without(self, model: nn.Module, name: str) -> nn.Module:
        """The model without one of these layers."""
        return next(smaller for _, smaller in self._smaller(model, self._calibration(), name))

    def _smaller(
        self, model: nn.Module, batches: list[tuple[Any, Any]], only: str = ""
    ) -> Iterator[tuple[str, nn.Module]]:
        """Names of layers that can go, or one of them, each with the model without it."""
        traced = trace(model, self.example_inputs, self.options["ignored"])
        inputs = [inputs for inputs, _ in batches]
        for name, layer in removable(model, traced, self.example_inputs).items():
            if only in ("", name):
                smaller = without_layer(model, traced, layer, inputs)
                recalibrate(smaller, inputs)
                yield name, smaller

    def _calibration(self) -> list[tuple[Any, Any]]:
        device = device_of(self.model)
        return [to_device(batch, device) for batch in self.options["calibration"]]


def superfluous_layers(
    trial: Trial, note: Callable[..., None], log: Callable[[str], None]
) -> tuple[tuple[str, ...], nn.Module, int]:
    """The whole layers without which the network is better within the budget, and the rest.

    Also how many trials that took.

    One layer after the other goes, the best each time, as long as the validation figure rises.
    """
    label = "stage 2, whole layers"
    removed: tuple[str, ...] = ()
    rest, best, trials = trial.model, trial(removed, label), 1
    note(stage=label, removed=removed, validation=best)
    while True:
        candidates = trial.cheapest_first(rest)
        scores = {}
        for name in candidates[:TRIALS]:
            scores[name] = trial((*removed, name), f"{label}: {name}")
            note(stage=label, removed=(*removed, name), validation=scores[name])
            trials += 1
        name = max(scores, key=scores.__getitem__, default="")
        if not name or scores[name] <= best:
            break
        log(f"{label}: {name} goes, validation {scores[name]:.4f} without it, {best:.4f} with it")
        best, removed, rest = scores[name], (*removed, name), trial.without(rest, name)
    if not removed:
        log(f"{label}: all stay, validation {best:.4f} with them")
    return removed, rest, trials
