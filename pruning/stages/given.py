"""Validate the network that `slim` is given, and tell a trained one from an untrained one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.batches import Batch, to_device
from pruning.training.losses import (
    Loss,
    Validate,
    accuracy,
    class_logits,
    classes_of,
    cross_entropy,
    logits_for,
    loss_of,
    validation_score,
    why_not_classifier,
)
from pruning.training.range_test import constant_loss, mean_loss
from pruning.utils.modules import call, device_of, eval_mode, fresh_weights
from pruning.utils.tree import fresh

#: A trained network is more accurate than chance by this many standard errors of chance, and has at most
#: this share of the loss of a constant prediction: the outputs of untrained networks may happen to
#: depend on the classes, but do not lower the loss.
ERRORS, LOWER = 2.0, 0.9
#: With fewer validation examples, chance is told by the training examples, too.
FEW = 50
#: Untrained networks whose loss is compared where there are no classes.
DRAWS = 3
#: A stage that ends this far below the given network is pointed out; as an accuracy.
POINTS = 0.03


@dataclass(frozen=True)
class Given:
    """The network that `slim` was given.

    Attributes:
        score: validation score, with the statistics of BatchNorm as given.
        trained: whether it is trained; a network at chance is not.
        examples: number of validation examples; 0 if unknown.
        gentle: peak learning rate found for stage 1, which must not harm the network; None if not searched.
        rate: peak learning rate found for stages 2 and 3, in which a pruned network recovers.
        needed: what a trained classifier reaches and this one does not; empty if it is trained.
        lacking: classes that the validation examples lack, of those that the network knows.
    """

    score: float
    trained: bool = False
    examples: int = 0
    gentle: float | None = None
    rate: float | None = None
    lacking: tuple[int, ...] = ()
    needed: str = ""

    @property
    def error(self) -> float:
        """Return the binomial standard error of the score; 0 if it is no accuracy of known examples."""
        if not self.examples or not 0 <= self.score <= 1:
            return 0.0
        # Of a score of 1, too, the error is not 0: one example more could be wrong.
        share = min(max(self.score, 1 / (self.examples + 2)), 1 - 1 / (self.examples + 2))
        return math.sqrt(share * (1 - share) / self.examples)

    def __str__(self) -> str:
        line = f"validation {self.score:.4f}"
        if self.error:
            line += f" on {self.examples:,} examples (standard error {self.error:.3f})"
        if self.lacking:
            line += f", none of them of class {', '.join(map(str, self.lacking))}"
        if not self.trained:
            needed = f" (a trained one has {self.needed})" if self.needed else ""
            return f"{line}; not above chance, so it is trained like a fresh network{needed}"
        return line

    def shortfall(self, score: float) -> float:
        """Return by how much a score is below that of a trained network, 0 unless that is more than noise."""
        below = self.score - score
        known = 0 <= self.score <= 1 and 0 <= score <= 1
        return below if self.trained and known and below > max(POINTS, 2 * self.error) else 0.0


def assess(
    model: nn.Module,
    validate: Validate,
    batches: Iterable[Batch] | None,
    calibration: Sequence[Batch],
    loss: Loss = cross_entropy,
) -> Given:
    """Validate a network, and find whether it is trained; the random generators do not change.

    A classifier is trained if its accuracy exceeds the share of the most frequent class by more than its
    binomial spread, and if its loss on training examples is lower than that of a constant prediction.
    Any other network is trained if its loss is lower than those of networks with newly initialized weights.

    Args:
        validate: function from a model to its validation score.
        batches: the validation batches of a classifier, if `validate` is their accuracy.
        calibration: training batches.
        loss: see `fit`.
    """
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        score = validation_score(validate, model)
        if why_not_classifier(model, calibration) is not None:
            return Given(score, _is_below_fresh(model, calibration, loss))
        counts = class_counts(model, calibration if batches is None else batches)
        measured = accuracy(model, calibration) if batches is None else score
        trained = measured > _chance(counts)
        needed = "" if trained else f"more than {_chance(counts):.4f}"
        if not trained and batches is not None and counts.sum() < FEW:
            trained = accuracy(model, calibration) > _chance(class_counts(model, calibration))
        constant = constant_loss(model, calibration)
        if trained and constant is not None:
            found = mean_loss(model, calibration, cross_entropy)
            trained = found < LOWER * constant
            needed = f"less than {LOWER * constant:.4g} of training loss, and this one has {found:.4g}"
    needed = "" if trained else needed
    if batches is None:
        return Given(score, trained, needed=needed)
    lacking = tuple((counts == 0).nonzero().flatten().tolist())
    return Given(score, trained, int(counts.sum()), lacking=lacking, needed=needed)


def class_counts(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return the number of examples of each class that a classifier knows, (classes,)."""
    counts = torch.zeros(0, dtype=torch.long)
    device, classes = device_of(model), 0
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            inputs, targets = to_device(batch, device)
            outputs = None
            if not classes or targets.is_floating_point():
                outputs = class_logits(call(model, fresh(inputs)), targets)
                classes = logits_for(classes_of(targets, outputs), outputs).shape[1]
            labels = classes_of(targets, outputs).flatten().cpu()
            found = torch.bincount(labels[labels >= 0].long(), minlength=classes)
            longer = torch.zeros(max(len(counts), len(found)), dtype=torch.long)
            longer[: len(counts)] += counts
            longer[: len(found)] += found
            counts = longer
    return counts


def _chance(counts: Tensor) -> float:
    """Return the largest accuracy that may be chance: the share of the most frequent class, and its "
    "spread."""
    total = max(1, int(counts.sum()))
    share = float(counts.max()) / total
    return share + ERRORS * math.sqrt(share * (1 - share) / total)


def _is_below_fresh(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> bool:
    """Return whether the loss is lower than those of networks with newly initialized weights.

    Where weights cannot be initialized, the network counts as trained: the rates that are then found
    suit both.
    """
    torch.manual_seed(0)
    scalar = loss_of(loss)
    try:
        untrained = min(mean_loss(fresh_weights(model), batches, scalar) for _ in range(DRAWS))
    except PruningError:
        return True
    return mean_loss(model, batches, scalar) < untrained - (1 - LOWER) * abs(untrained)
