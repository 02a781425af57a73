"""Whole layers in the pipeline: which go is tried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruning.batches import to_device
from pruning.budget import Budget
from pruning.depth import removable, without_layer
from pruning.errors import PruningError
from pruning.graph import Inputs, device_of
from pruning.grouping import trace
from pruning.losses import Validate
from pruning.modes import eval_mode
from pruning.norms import recalibrate
from pruning.prune import prune

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

    def cheapest_first(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model without each layer it can do without, from the least calibration loss on."""
        traced = trace(model, self.example_inputs, self.options["ignored"])
        device = device_of(model)
        batches = [to_device(batch, device) for batch in self.options["calibration"]]
        losses, models = {}, {}
        for name, layer in removable(model, traced, self.example_inputs).items():
            models[name] = without_layer(model, traced, layer, [inputs for inputs, _ in batches])
            recalibrate(models[name], [inputs for inputs, _ in batches])
            with torch.no_grad(), eval_mode(models[name]):
                losses[name] = sum(self.options["loss"](models[name], *batch).item() for batch in batches)
        return {name: models[name] for name in sorted(models, key=losses.__getitem__)}


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
        for name in list(candidates)[:TRIALS]:
            scores[name] = trial((*removed, name), f"{label}: {name}")
            note(stage=label, removed=(*removed, name), validation=scores[name])
            trials += 1
        name = max(scores, key=scores.__getitem__, default="")
        if not name or scores[name] <= best:
            break
        log(f"{label}: {name} goes, validation {scores[name]:.4f} without it, {best:.4f} with it")
        best, removed, rest = scores[name], (*removed, name), candidates[name]
    if not removed:
        log(f"{label}: all stay, validation {best:.4f} with them")
    return removed, rest, trials
