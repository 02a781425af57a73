"""The state of a training: model, optimizer, schedule, moving average, scale of the loss, random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.training.config import TrainConfig
from pruning.training.precision import Precision
from pruning.training.torch_optimizers import ParameterGroups, arguments_of_sgd, made_optimizer
from pruning.utils import distributed
from pruning.utils.modules import device_of


class Stateful(Protocol):
    """An object that saves and restores its state as plain data and tensors."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class RandomState(TypedDict, total=False):
    """The states of torch's random generators; `cuda` is present only with CUDA, one entry per device."""

    cpu: Tensor
    cuda: list[Tensor]


class _Later(TypedDict, total=False):
    """Entries that a state holds only where the training has them; those of earlier versions have none."""

    scaler: dict[str, object]
    learned: dict[str, Tensor]


class TrainingState(_Later):
    """The state of a training between two epochs, from which `fit` resumes.

    `scaler` is that of a loss that is scaled, `learned` holds parameters of the loss.
    """

    epoch: int
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, object]
    schedule: dict[str, object]
    best: dict[str, Tensor] | None
    best_score: float
    extra: Mapping[str, object] | None
    random: RandomState


class Training:
    """A training and everything that its stored state consists of.

    `batches` and `steps` are those of an epoch; `learned` are parameters of the loss, if it has any.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        batches: int,
        extra: Stateful | None,
        learned: nn.Module | None = None,
    ):
        self.model, self.config, self.batches, self.extra = model, config, batches, extra
        self.steps, self.learned = config.steps(batches), learned
        self.device = device_of(model)
        self.precision = Precision(config.precision, self.device)
        self.optimizer = make_optimizer(model, config, self.device, learned)
        total = config.epochs * self.steps
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
            total=self.config.epochs * self.batches,
            initial=self.epoch * self.batches,
            desc=label,
            unit="batch" if self.config.accumulate > 1 else "step",
            disable=distributed.rank() > 0 or None,
            leave=False,
        )

    def is_due(self, number: int) -> bool:
        """Return whether a step follows batch `number` of the epoch, from 1."""
        return number % self.config.accumulate == 0 or number == self.batches

    def backward(self, loss: Tensor, number: int) -> None:
        """Add the gradients of the mean loss of batch `number`, as its share of the next step."""
        group = self.config.accumulate
        first = (number - 1) // group * group
        if number == first + 1:
            self.optimizer.zero_grad(set_to_none=True)
        size = min(group, self.batches - first)
        self.precision.backward(loss / size if size > 1 else loss)

    def step(self, after_step: Callable[[float], None] | None) -> float:
        """Take one optimizer step, and return its learning rate."""
        lr = self.lr
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        self.precision.step(self.optimizer, self.config.clip_norm, params)
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
        state: TrainingState = {
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
        if (scaler := self.precision.state_dict()) is not None:
            state["scaler"] = scaler
        if self.learned is not None:
            state["learned"] = self.learned.state_dict()
        return state

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
        self.precision.load_state_dict(state.get("scaler"))
        if self.learned is not None:
            self.learned.load_state_dict(state["learned"])
        _set_random_state(state["random"])


def set_mode(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Put a model into the mode in which it is trained, and return it.

    Recurrent layers on a GPU stay in training mode, in which alone cuDNN computes gradients.
    """
    model.train(not config.eval_mode)
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and device_of(module).type == "cuda":
            module.train()
    return model


def make_optimizer(
    model: nn.Module, config: TrainConfig, device: torch.device, learned: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that are not frozen; only weights have weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PruningError("every parameter is frozen; set requires_grad=True on the parameters to train")
    if learned is not None:
        trained += learned.parameters()
    groups: ParameterGroups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    arguments = config.arguments
    if config.optimizer == "soap":
        arguments = {"momentum": config.momentum, **arguments}
    elif config.optimizer == "sgd":
        # The fused update takes one call instead of several per parameter; torch has it on CPU and CUDA.
        arguments = arguments_of_sgd(config.momentum, device.type in ("cpu", "cuda"), arguments)
    return made_optimizer(config.optimizer, groups, config.peak, arguments)


def _random_state() -> RandomState:
    state: RandomState = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
