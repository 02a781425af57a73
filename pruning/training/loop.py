"""The training loop. Every stage that trains calls `fit`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pruning.errors import PruningError, TrainingDiverged
from pruning.training.batches import BatchSource, length, to_device
from pruning.training.config import TrainConfig
from pruning.training.losses import Loss, Validate, cross_entropy, loss_of, validation_score
from pruning.training.optimizers import Soap
from pruning.utils import distributed
from pruning.utils.modules import channels_last, device_of


class Stateful(Protocol):
    """An object that saves and restores its state as plain data and tensors."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class RandomState(TypedDict, total=False):
    """The state of torch's random generators; `cuda` holds one per device, where there are any."""

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
        number: of the epoch, from 1.
        train_loss: mean loss of the training batches, as the weights changed.
        score: what `validate` returned; None without it.
        lr: the learning rate of the last step.
        state: returns the state from which `fit(resume=...)` continues.
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
    label: str = "",
    resume: TrainingState | None = None,
) -> nn.Module:
    """Train a model in place.

    Args:
        batches: pairs (inputs, targets) with a length; iterated once per epoch.
        loss: a function of (model, inputs, targets), or a criterion of (outputs, targets).
        validate: returns a score of the model, higher is better; called after every epoch.
        keep_best: end with the weights of the epoch with the best score (the later of equals),
            not of the last epoch. keep_start: the weights before training compete, too.
        before_epoch: called with the number of the epoch, from 1.
        after_step: called with the learning rate of the optimizer step.
        on_epoch: called after every epoch. It may store `epoch.state()`; a training that resumes
            from there ends exactly where the uninterrupted one does.
        extra: an object besides the model that changes in training; its state is stored, too.
        label: text before the progress bar, which is shown on a terminal only.
        resume: the stored state of an interrupted training.

    Returns:
        The model, in eval mode.

    Raises:
        TrainingDiverged: when the loss is no longer finite.
        PruningError: when there is no batch, or every parameter is frozen.

    >>> model, batches = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> _ = fit(model, batches, TrainConfig(epochs=2), on_epoch=lambda epoch: print(epoch.number))
    1
    2
    """
    if config.epochs and not length(batches):
        raise PruningError("there is nothing to train on: the given batches are empty or have no length")
    if config.epochs:
        callbacks = _Callbacks(validate, before_epoch, after_step, on_epoch, label)
        _train(model, batches, config, loss_of(loss), callbacks, keep_best, keep_start, extra, resume)
    return model.eval()


@dataclass(frozen=True)
class _Callbacks:
    """What the caller of `fit` does between epochs and steps, and the text of the progress bar."""

    validate: Validate | None
    before_epoch: Callable[[int], None] | None
    after_step: Callable[[float], None] | None
    on_epoch: Callable[[Epoch], None] | None
    label: str


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
    """Run the epochs that are left, and leave the chosen weights in the model."""
    batches, validate = distributed.sharded(batches), callbacks.validate
    with (
        torch.enable_grad(),
        channels_last(model, config.channels_last),
        distributed.data_parallel(model) as parallel,
    ):
        training = _Training(model, config, len(batches), extra)
        if resume is not None:
            training.restore(resume)
        elif keep_best and keep_start and validate is not None:
            with torch.random.fork_rng():  # the epochs draw the random numbers that they draw without it
                training.end_epoch(0, validation_score(validate, training.result))
        with training.progress_bar(callbacks.label) as bar:
            for number in range(training.epoch + 1, config.epochs + 1):
                if callbacks.before_epoch is not None:
                    callbacks.before_epoch(number)
                total, lr = _train_epoch(training, parallel, batches, loss, callbacks, bar)
                score = validation_score(validate, training.result) if validate is not None else None
                training.end_epoch(number, score if keep_best else None)
                if score is not None:
                    bar.set_postfix_str(f"epoch {number}/{config.epochs}, validation {score:.4f}")
                if callbacks.on_epoch is not None:
                    train_loss = distributed.mean(total).item() / training.steps
                    callbacks.on_epoch(Epoch(number, train_loss, score, lr, training.state))
        model.load_state_dict(training.best or training.result.state_dict())


def _train_epoch(
    training: _Training,
    parallel: nn.Module,
    batches: BatchSource,
    loss: Loss,
    callbacks: _Callbacks,
    bar: tqdm,
) -> tuple[Tensor, float]:
    """Take a step with every batch; return this process's sum of losses and the last learning rate."""
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
    """A training between two epochs: all that goes into its state."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps: int, extra: Stateful | None):
        self.model, self.config, self.steps, self.extra = model, config, steps, extra
        self.device = device_of(model)
        self.optimizer = _optimizer(model, config, self.device)
        total = config.epochs * steps
        # Not torch's OneCycleLR, which fails on very few steps.
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
        """The model to validate and to keep: the trained one, or its moving average."""
        return self.model if self.average is None else self.average.module

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def progress_bar(self, label: str) -> tqdm:
        """Return a bar over all steps, at the steps done; shown by the first process on a terminal."""
        return tqdm(
            total=self.config.epochs * self.steps,
            initial=self.epoch * self.steps,
            desc=label,
            unit="step",
            disable=distributed.rank() > 0 or None,
            leave=False,
        )

    def step(self, loss: Tensor, after_step: Callable[[float], None] | None) -> float:
        """Take one optimizer step on the loss of a batch; return its learning rate."""
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
        """Keep the weights if they have the best score so far; None does not compare."""
        self.epoch = number
        if score is not None and score >= self.best_score:
            self.best, self.best_score = copy.deepcopy(self.result.state_dict()), score

    def state(self) -> TrainingState:
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


def _optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PruningError("every parameter is frozen; set requires_grad=True on those to train")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "soap":
        return Soap(groups, lr=config.lr, momentum=config.momentum)
    # The fused update is one call instead of several for every parameter; it exists for
    # floating-point parameters on CPU and CUDA.
    return torch.optim.SGD(
        groups,
        lr=config.lr,
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
