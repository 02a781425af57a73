"""The only epoch loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pruning.errors import PruningError, TrainingDiverged
from pruning.training.batches import BatchSource, length, to_device
from pruning.training.config import TrainConfig
from pruning.training.losses import Loss, Validate, cross_entropy, figure, loss_of
from pruning.training.optimizers import Soap
from pruning.utils import distributed
from pruning.utils.modules import channels_last, device_of


class Stateful(Protocol):
    """Whatever can give and take its state as plain data and tensors."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Epoch(NamedTuple):
    """What an epoch ended with. `state` goes on from here when `fit` is given it."""

    number: int
    train_loss: float
    score: float | None
    lr: float
    state: Callable[[], dict[str, Any]]


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
    resume: dict[str, Any] | None = None,
) -> nn.Module:
    """Train a model in place and return it, in eval mode.

    Args:
        batches: (inputs, targets) pairs; iterated once an epoch, must have a length.
        validate: asked after every epoch.
        keep_best: end with the weights of the epoch that `validate` liked best (the later
            one of equals) instead of the last.
        keep_start: with it the weights that the model has now are among those to choose from.
        before_epoch: called at the start of every epoch with its number, from 1.
        after_step: called after every optimizer step with the learning rate it used.
        on_epoch: called after every epoch; may keep `epoch.state()`, from which `resume`
            goes on to exactly the same end.
        extra: something besides the model that changes in training, kept in `epoch.state()`.
        label: text before the progress bar, which shows on a terminal only.

    Raises `TrainingDiverged` when the loss stops being finite; `PruningError` when there
    is no batch to train on.
    """
    steps = length(batches) or 0
    if config.epochs and not steps:
        raise PruningError("there is nothing to train on: the given batches are empty or have no length")
    if not config.epochs:
        return model.eval()

    loss, batches = loss_of(loss), distributed.sharded(batches)
    with (
        torch.enable_grad(),
        channels_last(model, config.channels_last),
        distributed.data_parallel(model) as trained,
    ):
        device = device_of(model)
        training = _Training(model, config, steps, device, extra)
        if resume is not None:
            training.restore(resume)
        elif keep_best and keep_start and validate is not None:
            with torch.random.fork_rng():  # the epochs are those without it
                training.end_epoch(0, figure(validate, training.shown))

        total, done = config.epochs * steps, training.epoch * steps
        with tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="step",
            disable=distributed.rank() > 0 or None,
            leave=False,
        ) as bar:
            for number in range(training.epoch + 1, config.epochs + 1):
                if before_epoch is not None:
                    before_epoch(number)
                model.train()
                summed = torch.zeros((), device=device)
                for step, batch in enumerate(batches, start=1):
                    inputs, targets = to_device(batch, device)
                    value = loss(trained, inputs, targets)
                    training.optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    lr = training.optimizer.param_groups[0]["lr"]
                    training.optimizer.step()
                    if after_step is not None:
                        after_step(lr)
                    training.schedule.step()
                    if training.average is not None:
                        training.average.update_parameters(model)
                    summed += value.detach()
                    if step % 50 == 0 or step == steps:
                        _require_finite(summed, number, step, label)
                    bar.update()
                score = figure(validate, training.shown) if validate is not None else None
                training.end_epoch(number, score if keep_best else None)
                if score is not None:
                    bar.set_postfix_str(f"epoch {number}/{config.epochs}, validation {score:.4f}")
                if on_epoch is not None:
                    average = distributed.mean(summed).item() / steps
                    on_epoch(Epoch(number, average, score, lr, training.state))
        model.load_state_dict(training.best or training.shown.state_dict())
    return model.eval()


class _Training:
    """What a training consists of between two epochs; all of it goes into its state."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        steps: int,
        device: torch.device,
        extra: Stateful | None,
    ):
        self.model, self.extra = model, extra
        self.optimizer = _optimizer(model, config, device)
        self.schedule = _schedule(self.optimizer, config, steps)
        self.average: AveragedModel | None = None
        if config.ema:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
            )
        self.epoch = 0
        self.best: dict[str, Any] | None = None
        self.best_score = float("-inf")

    @property
    def shown(self) -> nn.Module:
        """The model to validate and to keep: the trained one, or its moving average."""
        return self.model if self.average is None else self.average.module

    def end_epoch(self, number: int, score: float | None) -> None:
        self.epoch = number
        if score is not None and score >= self.best_score:
            self.best, self.best_score = copy.deepcopy(self.shown.state_dict()), score

    def state(self) -> dict[str, Any]:
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

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
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
    # The fused update is one call instead of several for every parameter; it takes
    # floating-point parameters on CPU and CUDA.
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=device.type in ("cpu", "cuda"),
    )


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    total = config.epochs * steps
    # torch's OneCycleLR fails on very few steps.
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.rate(step / total))


def _require_finite(summed: Tensor, epoch: int, step: int, label: str) -> None:
    if not torch.isfinite(summed):
        raise TrainingDiverged(
            f"the loss is no longer finite ({label or 'training'}, epoch {epoch}, by step {step}); "
            "lower the learning rate or check the data"
        )


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
