"""The training loop: every stage that trains calls `fit`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pruning.errors import PruningError, TrainingDiverged
from pruning.training.batches import Batch, BatchSource, length, to_device
from pruning.training.config import TrainConfig
from pruning.training.losses import Loss, Validate, cross_entropy, loss_of, validation_score
from pruning.training.optimizers import Soap
from pruning.training.statistics import fresh_statistics, take_statistics
from pruning.utils import distributed
from pruning.utils.modules import channels_last, device_of


class Stateful(Protocol):
    """An object that saves and restores its state as plain data and tensors."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class RandomState(TypedDict, total=False):
    """The states of torch's random generators; `cuda` is present only with CUDA, one entry per device."""

    cpu: Tensor
    cuda: list[Tensor]


class TrainingState(TypedDict):
    """The state of a training between two epochs, from which `fit` resumes."""

    epoch: int
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, object]
    schedule: dict[str, object]
    best: dict[str, Tensor] | None
    best_score: float
    extra: Mapping[str, object] | None
    random: RandomState


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
        PruningError: if there is no batch, or if every parameter is frozen.

    >>> model, batches = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> _ = fit(model, batches, TrainConfig(epochs=2), on_epoch=lambda epoch: print(epoch.number))
    1
    2
    """
    if config.epochs and not length(batches):
        raise PruningError(
            "there is nothing to train on: the given batches are empty or have no length; give a list or a "
            "DataLoader with at least one batch"
        )
    if config.epochs:
        callbacks = _Callbacks(validate, before_epoch, after_step, on_epoch, statistics, label)
        _train(model, batches, config, loss_of(loss), callbacks, keep_best, keep_start, extra, resume)
    return model.eval()


@dataclass(frozen=True)
class _Callbacks:
    """The functions that the caller of `fit` passes, batches for BatchNorm, and the progress bar's text."""

    validate: Validate | None
    before_epoch: Callable[[int], None] | None
    after_step: Callable[[float], None] | None
    on_epoch: Callable[[Epoch], None] | None
    statistics: Sequence[Batch]
    label: str

    def end_epoch(self, training: _Training, number: int, keep_best: bool) -> float | None:
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
    resume: TrainingState | None,
) -> None:
    """Run the remaining epochs, then load the best or the last weights into the model."""
    batches = distributed.sharded(batches)
    with (
        torch.enable_grad(),
        channels_last(model, config.channels_last),
        distributed.data_parallel(model) as parallel,
    ):
        training = _Training(model, config, len(batches), extra)
        if resume is not None:
            training.restore(resume)
        elif keep_best and keep_start:
            with torch.random.fork_rng():  # validating here must not change the epochs' random draws
                callbacks.end_epoch(training, 0, keep_best)
        with training.progress_bar(callbacks.label) as bar:
            for number in range(training.epoch + 1, config.epochs + 1):
                if callbacks.before_epoch is not None:
                    callbacks.before_epoch(number)
                total, lr = _train_epoch(training, parallel, batches, loss, callbacks, bar)
                score = callbacks.end_epoch(training, number, keep_best)
                if score is not None:
                    bar.set_postfix_str(f"epoch {number}/{config.epochs}, validation {score:.4f}")
                if callbacks.on_epoch is not None:
                    train_loss = distributed.mean(total).item() / training.steps
                    callbacks.on_epoch(Epoch(number, train_loss, score, lr, training.state))
        model.load_state_dict(training.best or training.result.state_dict())
    if training.best is None and callbacks.statistics:
        take_statistics(model, callbacks.statistics)


def _train_epoch(
    training: _Training,
    parallel: nn.Module,
    batches: BatchSource,
    loss: Loss,
    callbacks: _Callbacks,
    bar: tqdm,
) -> tuple[Tensor, float]:
    """Take one step per batch; return the sum of this process's losses and the last learning rate."""
    training.model.train()
    total, lr = torch.zeros((), device=training.device), training.lr
    for step, batch in enumerate(batches, start=1):
        inputs, targets = to_device(batch, training.device)
        value = loss(parallel, inputs, targets)
        lr = training.step(value, callbacks.after_step)
        total += value.detach()
        if (step % 50 == 0 or step == training.steps) and not torch.isfinite(total):
            raise TrainingDiverged(
                f"the loss is no longer finite ({callbacks.label or 'training'}, epoch {training.epoch + 1}, "
                f"by step {step}); lower the learning rate or check the data"
            )
        bar.update()
    return total, lr


class _Training:
    """A training and everything that its stored state consists of."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps: int, extra: Stateful | None):
        self.model, self.config, self.steps, self.extra = model, config, steps, extra
        self.device = device_of(model)
        self.optimizer = make_optimizer(model, config, self.device)
        total = config.epochs * steps
        # torch's OneCycleLR fails with very few steps.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: config.rate(step / total)
        )
        self.average: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.epoch = 0
        self.best: dict[str, Tensor] | None = None
        self.best_score = float("-inf")

    @property
    def result(self) -> nn.Module:
        """Return the model to validate and to keep: the trained model, or its moving average."""
        return self.model if self.average is None else self.average.module

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def progress_bar(self, label: str) -> tqdm:
        """Return a progress bar over all steps, shown on a terminal by the first process only."""
        return tqdm(
            total=self.config.epochs * self.steps,
            initial=self.epoch * self.steps,
            desc=label,
            unit="step",
            disable=distributed.rank() > 0 or None,
            leave=False,
        )

    def step(self, loss: Tensor, after_step: Callable[[float], None] | None) -> float:
        """Take one optimizer step on the loss of a batch, and return the learning rate of the step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        lr = self.lr
        self.optimizer.step()
        if after_step is not None:
            after_step(lr)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return lr

    def end_epoch(self, number: int, score: float | None) -> None:
        """Store the weights if their score is the best so far; with None, store nothing."""
        self.epoch = number
        if score is not None and score >= self.best_score:
            self.best, self.best_score = copy.deepcopy(self.result.state_dict()), score

    def state(self) -> TrainingState:
        """Return everything that a resumed training needs."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "extra": self.extra.state_dict() if self.extra is not None else None,
            "random": _random_state(),
        }

    def restore(self, state: TrainingState) -> None:
        """Restore a state returned by `state`."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            assert state["average"] is not None
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best, self.best_score = state["epoch"], state["best"], state["best_score"]
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])
        _set_random_state(state["random"])


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that are not frozen; only weights have weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PruningError("every parameter is frozen; set requires_grad=True on the parameters to train")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "soap":
        return Soap(groups, lr=config.peak, momentum=config.momentum)
    # The fused update takes one call instead of several per parameter; torch has it on CPU and CUDA.
    return torch.optim.SGD(
        groups,
        lr=config.peak,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=device.type in ("cpu", "cuda"),
    )


def _random_state() -> RandomState:
    state: RandomState = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
