"""Search by trial for whole layers whose removal raises the validation score at the same budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pruning.errors import PruningError
from pruning.planning.budget import Budget
from pruning.planning.width_sweep import Batch
from pruning.stages.prune import StepSettings, prune_step
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.layer_removal import removable, without_layer
from pruning.training.batches import to_device
from pruning.training.losses import Validate, loss_of
from pruning.utils.modules import device_of, eval_mode
from pruning.utils.tree import Inputs

#: Number of layers tried in each round: those whose removal gives the lowest calibration loss.
CANDIDATES = 3

LABEL = "stage 2, whole layers"


@dataclass(frozen=True)
class LayerSearch:
    """Greedy search: remove the best whole layer of each round while the validation score rises.

    A trial removes some layers from the model, prunes it to the final budget in one step, and trains
    it briefly.

    Attributes:
        model: the model with all layers; it is not changed.
        target: the final budget, as counts.
        settings: settings of the pruning steps.
        begin: function from a pruned model to the model that is trained.
        train: function of a model and a label that trains the model briefly and returns it.
        validate: function from a model to its validation score; higher is better.
        note: appends a line to the history.
        log: receives lines of text.
    """

    model: nn.Module
    example_inputs: Inputs
    target: Budget
    settings: StepSettings
    begin: Callable[[nn.Module], nn.Module]
    train: Callable[[nn.Module, str], nn.Module]
    validate: Validate
    note: Callable[..., None]
    log: Callable[[str], None]

    def run(self) -> tuple[tuple[str, ...], nn.Module, int]:
        """Return the layers to remove, the model without them, and the number of trials."""
        removed: tuple[str, ...] = ()
        model, best, trials = self.model, self._trial(removed, LABEL), 1
        self.note(stage=LABEL, removed=removed, validation=best)
        while True:
            results = {}
            for name in self._candidates(model)[:CANDIDATES]:
                results[name] = self._trial((*removed, name), f"{LABEL}: {name}")
                self.note(stage=LABEL, removed=(*removed, name), validation=results[name])
                trials += 1
            name = max(results, key=results.__getitem__, default="")
            if not name or results[name] <= best:
                break
            self.log(f"{LABEL}: {name} goes, validation {results[name]:.4f} without it, {best:.4f} with it")
            best, removed = results[name], (*removed, name)
            model = next(smaller for _, smaller in self._without_each(model, only=name))
        if not removed:
            self.log(f"{LABEL}: all stay, validation {best:.4f} with them")
        return removed, model, trials

    def _trial(self, remove: tuple[str, ...], label: str) -> float:
        """Return the validation score without these layers; −∞ if the budget cannot be met."""
        try:
            step = prune_step(self.model, self.example_inputs, self.target, self.settings, remove=remove)
        except PruningError:
            return float("-inf")
        return self.validate(self.train(self.begin(step.model), label))

    def _candidates(self, model: nn.Module) -> list[str]:
        """Return the removable layers, in ascending order of the calibration loss without them."""
        loss, batches = loss_of(self.settings.loss), self._calibration()
        losses = {}
        for name, smaller in self._without_each(model):  # one at a time: each is a copy of the network
            with torch.no_grad(), eval_mode(smaller):
                losses[name] = sum(loss(smaller, *batch).item() for batch in batches)
        return sorted(losses, key=losses.__getitem__)

    def _without_each(self, model: nn.Module, only: str = "") -> Iterator[tuple[str, nn.Module]]:
        """Yield each removable layer, or only one, and the recalibrated model without it."""
        traced = self.settings.traced(model, self.example_inputs)
        inputs = [inputs for inputs, _ in self._calibration()]
        for name, layer in removable(model, traced, self.example_inputs).items():
            if only in ("", name):
                smaller = without_layer(model, traced, layer, inputs)
                recalibrate(smaller, inputs)
                yield name, smaller

    def _calibration(self) -> list[Batch]:
        """Return the calibration batches on the model's device."""
        device = device_of(self.model)
        return [to_device(batch, device) for batch in self.settings.calibration]
