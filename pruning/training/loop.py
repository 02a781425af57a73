"""The training loop: every stage that trains calls `fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruning.errors import PruningError, TrainingDiverged
from pruning.training.batches import Batch, BatchSource, length, to_device
from pruning.training.compiled import compile_errors, compiled
from pruning.training.config import TrainConfig
from pruning.training.losses import (
    Loss,
    Validate,
    cross_entropy,
    learned_by,
    loss_of,
    validation_score,
    with_label_smoothing,
)
from pruning.training.mixing import mixed, require_mixing
from pruning.training.precision import require_precision
from pruning.training.state import Stateful, Training, TrainingState, make_optimizer, set_mode
from pruning.training.statistics import fresh_statistics, take_statistics
from pruning.utils import distributed
from pruning.utils.memory_format import channels_last
from pruning.utils.modules import device_of


class Epoch(NamedTuple):
    """The result of an epoch.

    Attributes:
        number: number of the epoch, from 1.
        train_loss: mean loss of the training batches, each computed before its optimizer step.
        score: validation score after the epoch; None without `validate`.
        lr: learning rate of the last step.
        state: function that returns the state from which `fit(resume=...)` continues.
    """

    number: int
    train_loss: float
    score: float | None
    lr: float
    state: Callable[[], TrainingState]


def fit(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    loss: Loss = cross_entropy,
    validate: Validate | None = None,
    keep_best: bool = False,
    keep_start: bool = False,
    before_epoch: Callable[[int], None] | None = None,
    after_step: Callable[[float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    extra: Stateful | None = None,
    statistics: Sequence[Batch] = (),
    label: str = "",
    resume: TrainingState | None = None,
) -> nn.Module:
    """Train a model in place.

    Args:
        model: the model to train.
        batches: pairs (inputs, targets), with a length; iterated once per epoch.
        config: the settings of the training.
        loss: a function of (model, inputs, targets), or a criterion of (outputs, targets).
        validate: function from the model to its validation score, higher is better; called after every
            epoch.
        keep_best: keep the weights of the epoch with the best validation score (of equal ones, the
            last) instead of the weights of the last epoch.
        keep_start: with `keep_best`, the weights before training are a candidate, too.
        before_epoch: function called with the number of the epoch, from 1.
        after_step: function called with the learning rate of each optimizer step.
        on_epoch: function called after every epoch. It may store `epoch.state()`; a training resumed
            from this state gives the same result as the uninterrupted one.
        extra: another object that changes in training; its state is stored with the model's.
        statistics: batches on which the statistics of BatchNorm are taken anew for every validation, and
            for the weights that are kept (see `fresh_statistics`); without them, the running ones are used.
        label: text before the progress bar, which is shown on a terminal only.
        resume: the stored state of an interrupted training.

    Returns:
        The model, in eval mode.

    Raises:
        TrainingDiverged: if the loss becomes infinite or NaN.
        PruningError: see `require_trainable`.

    >>> model, batches = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> _ = fit(model, batches, TrainConfig(epochs=2), on_epoch=lambda epoch: print(epoch.number))
    1
    2
    """
    require_trainable(model, [config], batches)
    if config.epochs:
        callbacks = _Callbacks(validate, before_epoch, after_step, on_epoch, statistics, label)
        loss = with_label_smoothing(loss, config.label_smoothing)
        learned = learned_by(loss, model, batches)
        scalar = loss_of(loss)
        _train(model, batches, config, scalar, callbacks, keep_best, keep_start, extra, learned, resume)
    return model.eval()


def require_trainable(
    model: nn.Module, configs: Iterable[TrainConfig], batches: BatchSource | None = None
) -> None:
    """Check before any training that a model can be trained with some settings.

    Args:
        model: the model to train.
        configs: the settings; those without epochs are not checked.
        batches: training batches, if they are known.

    Raises:
        PruningError: if there is no batch, if an epoch has fewer batches than a step accumulates, if every
            parameter is frozen, if the optimizer does not take the parameters or its arguments, if the
            device does not train in the precision, or if images cannot be mixed.
    """
    count = None if batches is None else length(batches)
    device = device_of(model)
    for config in configs:
        if not config.epochs:
            continue
        if batches is not None and not count:
            raise PruningError(
                "there is nothing to train on: the given batches are empty or have no length; give a list "
                "or a DataLoader with at least one batch"
            )
        if count is not None and config.accumulate > count:
            raise PruningError(
                f"accumulate {config.accumulate} is larger than the epoch, which has {count} "
                f"batch{'es' if count > 1 else ''}: accumulate at most {count}, or make the batches smaller"
            )
        require_precision(config.precision, device)
        require_mixing(config, batches)
        if config.optimizer != "soap":  # its limit on parameters holds for the pruned network
            make_optimizer(model, config, device)


@dataclass(frozen=True)
class _Callbacks:
    """The functions that the caller of `fit` passes, batches for BatchNorm, and the progress bar's text."""

    validate: Validate | None
    before_epoch: Callable[[int], None] | None
    after_step: Callable[[float], None] | None
    on_epoch: Callable[[Epoch], None] | None
    statistics: Sequence[Batch]
    label: str

    def end_epoch(self, training: Training, number: int, keep_best: bool) -> float | None:
        """Validate the result of an epoch, which is stored if it is the best so far and that is asked."""
        if self.validate is None:
            training.end_epoch(number, None)
            return None
        known = (
            contextlib.nullcontext()
            if not self.statistics
            else fresh_statistics(training.result, self.statistics)
        )
        with known:
            score = validation_score(self.validate, training.result)
            training.end_epoch(number, score if keep_best else None)
        return score


def _train(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    loss: Loss,
    callbacks: _Callbacks,
    keep_best: bool,
    keep_start: bool,
    extra: Stateful | None,
    learned: nn.Module | None,
    resume: TrainingState | None,
) -> None:
    """Run the remaining epochs, then load the best or the last weights into the model."""
    # Images are mixed before each process takes its shard, so that all processes draw the same numbers.
    batches = distributed.sharded(mixed(batches, config, model))
    with (
        torch.enable_grad(),
        channels_last(model, config.channels_last),
        distributed.data_parallel(model) as parallel,
    ):
        training = Training(model, config, len(batches), extra, learned)
        called = compiled(parallel, config.compile)
        if resume is not None:
            training.restore(resume)
        elif keep_best and keep_start:
            with torch.random.fork_rng():  # validating here must not change the epochs' random draws
                callbacks.end_epoch(training, 0, keep_best)
        with training.progress_bar(callbacks.label) as bar:
            for number in range(training.epoch + 1, config.epochs + 1):
                if callbacks.before_epoch is not None:
                    callbacks.before_epoch(number)
                losses, lr = _train_epoch(training, called, batches, loss, callbacks, bar)
                score = callbacks.end_epoch(training, number, keep_best)
                if score is not None:
                    bar.set_postfix_str(f"epoch {number}/{config.epochs}, validation {score:.4f}")
                if callbacks.on_epoch is not None:
                    train_loss = losses.mean(training.batches)
                    callbacks.on_epoch(Epoch(number, train_loss, score, lr, training.state))
        model.load_state_dict(training.best or training.result.state_dict())
    if training.best is None and callbacks.statistics:
        take_statistics(model, callbacks.statistics)


def _train_epoch(
    training: Training,
    called: nn.Module,
    batches: BatchSource,
    loss: Loss,
    callbacks: _Callbacks,
    bar: tqdm,
) -> tuple[_Losses, float]:
    """Train on every batch; return the losses of this process and the last learning rate."""
    set_mode(training.model, training.config)
    precision, lr = training.precision, training.lr
    losses = _Losses(training.device, precision.scales)
    for number, batch in enumerate(batches, start=1):
        inputs, targets = to_device(batch, training.device)
        is_due = training.is_due(number)
        with distributed.without_averaging(called, not is_due):
            with precision.autocast(), compile_errors(training.config.compile):
                value = loss(called, inputs, targets)
            training.backward(value, number)
        if is_due:
            lr = training.step(callbacks.after_step)
        losses.add(value)
        if (number % 50 == 0 or number == training.batches) and losses.are_lost():
            raise TrainingDiverged(
                f"the loss is no longer finite ({callbacks.label or 'training'}, epoch {training.epoch + 1}, "
                f"by step {number}); lower the learning rate or check the data"
            )
        bar.update()
    return losses, lr


class _Losses:
    """The losses of an epoch, added up on their device.

    Where the loss is scaled, a step whose loss or gradients are not finite is skipped, and such losses do
    not count; without any finite loss since the last check, the training has diverged.
    """

    def __init__(self, device: torch.device, scaled: bool):
        self.total, self.scaled = torch.zeros((), device=device), scaled
        self.finite, self.checked = torch.zeros((), device=device), 0

    def add(self, value: Tensor) -> None:
        value = value.detach()
        if self.scaled:
            is_finite = torch.isfinite(value)
            self.finite += is_finite
            value = torch.where(is_finite, value, 0)
        self.total += value

    def are_lost(self) -> bool:
        """Return whether the training has diverged."""
        if not self.scaled:
            return not bool(torch.isfinite(self.total))
        before, self.checked = self.checked, int(self.finite)
        return self.checked == before

    def mean(self, batches: int) -> float:
        """Return the mean of the losses of so many batches, over all processes."""
        count = int(self.finite) if self.scaled else batches
        return distributed.mean(self.total).item() / max(1, count)
