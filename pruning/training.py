"""The only epoch loop, and the evaluation that goes with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from pruning import parallel
from pruning.config import TrainConfig
from pruning.errors import PruningError, TrainingDiverged
from pruning.graph import call, device_of
from pruning.modes import channels_last, eval_mode

#: The target of what the usual loss leaves out, as torch has it.
IGNORED = -100
#: From a model, its inputs and the targets to the loss of a batch, a scalar; or a criterion of
#: outputs and targets, such as `nn.CrossEntropyLoss()`.
Loss = Callable[[nn.Module, Any, Any], Tensor] | Callable[[Any, Any], Tensor]
#: From a model to a figure that is better the higher it is, on the validation split.
Validate = Callable[[nn.Module], float]


class BatchSource(Protocol):
    """Whatever can be iterated many times and gives (inputs, targets): a DataLoader, a list."""

    def __iter__(self) -> Any: ...
    def __len__(self) -> int: ...


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


def cross_entropy(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
    """The usual loss of a classifier. Targets are classes, or probabilities of the outputs' shape.

    Raises `PruningError` where outputs and targets are not a classifier's (see `logits_for`).
    """
    logits = call(model, inputs)
    if _probabilities(targets, logits):
        return F.cross_entropy(logits, targets)
    logits = logits_for(targets, logits)
    try:
        return F.cross_entropy(logits, targets.long())
    except IndexError as error:
        raise _no_such_class(logits, targets) from error


def loss_of(loss: Loss) -> Callable[[nn.Module, Any, Any], Tensor]:
    """A loss as a function of a model, its inputs and the targets, which sees to it that it is a scalar.

    What needs two arguments and no more is a criterion of outputs and targets.
    """
    if not callable(loss):
        raise PruningError(
            f"loss {loss!r}: a function of (model, inputs, targets), or a criterion of (outputs, targets), "
            "was expected"
        )
    criterion = _arguments_needed(loss.forward if isinstance(loss, nn.Module) else loss) == 2
    taken: Callable[..., Any] = loss

    def scalar(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        try:
            value = taken(call(model, inputs), targets) if criterion else taken(model, inputs, targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise PruningError(
                "a training batch holds one example, of which BatchNorm has no variance: leave a last batch "
                "of one out, as DataLoader does with drop_last=True"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PruningError(f"the loss gave {given}: one number was expected, such as its mean")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise PruningError("the loss does not depend on the network: nothing can be learned from it")
        return value.reshape(())

    return scalar


def _arguments_needed(function: Callable[..., Any]) -> int | None:
    """How many arguments a function needs; None where it takes any number, or does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)


def _probabilities(targets: Any, logits: Any) -> bool:
    """Whether targets are a share of every class, as mixing or smoothing labels makes them."""
    both = isinstance(targets, Tensor) and isinstance(logits, Tensor) and targets.is_floating_point()
    if not both or targets.shape != logits.shape or logits.ndim < 2 or logits.shape[1] < 2:
        return False
    return bool((targets >= 0).all() and ((targets.sum(1) - 1).abs() < 0.01).all())


def logits_for(targets: Any, outputs: Any) -> Tensor:
    """The outputs of a model, if they are logits (N, classes, ...) and the targets number their classes.

    Raises `PruningError` for anything else: of one output the cross entropy is always 0, and
    targets of another shape would be compared with every example.
    """
    if not isinstance(outputs, Tensor):
        given = f"the network gives a {type(outputs).__name__}"
    elif outputs.ndim < 2 or outputs.shape[1] < 2:
        given = f"the network gives outputs of shape {tuple(outputs.shape)}"
    elif not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        given = f"the targets are {targets.dtype if isinstance(targets, Tensor) else type(targets).__name__}"
    elif targets.shape != outputs.shape[:1] + outputs.shape[2:]:
        given = f"the targets have shape {tuple(targets.shape)}, the outputs {tuple(outputs.shape)}"
    else:
        return outputs
    raise PruningError(
        f"{given}: the usual loss and accuracy need logits (N, classes, ...) of at least two classes, and "
        "whole-number targets (N, ...). Give your own loss and metric in Python, or score by l1 or l2"
    )


def classes_of(targets: Any, outputs: Any) -> Any:
    """Targets as classes: of shares of every class the largest; others as they are."""
    return targets.argmax(1) if _probabilities(targets, outputs) else targets


def _no_such_class(logits: Tensor, targets: Tensor) -> PruningError:
    return PruningError(
        f"the targets go from {int(targets.min())} to {int(targets.max())}, but the network has "
        f"{logits.shape[1]} classes, which count from 0: give a network with as many classes as the data"
    )


def no_classifier(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> str | None:
    """Why accuracy cannot be taken of a model's outputs on the first of these batches; None where it can.

    Labels that the model has no class for are a mistake, and no reason.
    """
    with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=[]):
        inputs, targets = to_device(first_batch(batches), device_of(model))
        try:
            outputs = call(model, inputs)
            logits_for(classes_of(targets, outputs), outputs)
        except PruningError as error:
            return str(error)
    return None


def require_classifier(model: nn.Module, *sources: Iterable[tuple[Any, Any]]) -> None:
    """Raise `PruningError` unless the usual loss can be taken of the first batch of each source.

    Random numbers that come afterwards are as without this.
    """
    with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=[]):
        for batches in sources:
            for batch in batches:
                cross_entropy(model, *to_device(batch, device_of(model)))
                break


def pair(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, targets). Raises `PruningError` for one that is something else."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        described = f"a {type(batch).__name__} with {', '.join(map(repr, batch))}"
    else:
        held = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        described = f"a {type(batch).__name__}{held}"
    raise PruningError(
        f"a batch is {described}; a pair (inputs, targets) was expected. Let the loader give such pairs: "
        "inputs may be a tuple of what the model is called with, or a dict of it by name"
    )


def first_batch(batches: Iterable[Any]) -> tuple[Any, Any]:
    """The first (inputs, targets). Raises `PruningError` where there is none."""
    for batch in batches:
        return pair(batch)
    raise PruningError("the given batches are empty: at least one pair (inputs, targets) is needed")


def to_device(batch: tuple[Any, Any], device: torch.device) -> tuple[Any, Any]:
    """(inputs, targets) with every tensor on the device."""
    inputs, targets = pair(batch)

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            raise PruningError(
                "a batch holds numpy arrays: tensors were expected; torch.from_numpy(x).float() makes one"
            )
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, inputs), pytree.tree_map(move, targets)


def figure(validate: Validate, model: nn.Module) -> float:
    """What `validate` gives for a model in eval mode, whose modes are afterwards as they were.

    Raises `PruningError` where that is no number.
    """
    with torch.no_grad(), eval_mode(model):
        value = validate(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise PruningError(f"validate gave {value!r}: a number was expected, higher is better") from error


def length(batches: Any) -> int | None:
    """How many batches there are; None where they cannot tell, as a DataLoader of an IterableDataset."""
    try:
        return len(batches)
    except TypeError:
        return None


def accuracy(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> float:
    """Share of examples whose largest logit (along dimension 1) is the target's, 0 to 1.

    Targets are those of `cross_entropy`; where they are `IGNORED` they do not count, as in the loss.

    Raises `PruningError` where outputs and targets are not a classifier's, or there is no batch.
    """
    right, count = 0, 0
    device = device_of(model)
    with torch.inference_mode(), eval_mode(model):
        for batch in batches:
            inputs, targets = to_device(batch, device)
            outputs = call(model, inputs)
            targets = classes_of(targets, outputs)
            logits = logits_for(targets, outputs)
            counted = targets != IGNORED
            if bool((counted & ((targets < 0) | (targets >= logits.shape[1]))).any()):
                raise _no_such_class(logits, targets)
            known = ~logits.isnan().any(1)  # of NaN the largest is the first
            right += int(((logits.argmax(1) == targets) & known & counted).sum())
            count += int(counted.sum())
    if not count:
        raise PruningError("there is nothing to evaluate on: the given batches are empty")
    return right / count


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

    loss, batches = loss_of(loss), parallel.shared(batches)
    with torch.enable_grad(), channels_last(model, config.channels_last), parallel.together(model) as trained:
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
            disable=parallel.rank() > 0 or None,
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
                    average = parallel.mean(summed).item() / steps
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


def _optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PruningError("every parameter is frozen; set requires_grad=True on those to train")
    # The fused update is one call instead of several for every parameter; it takes
    # floating-point parameters on CPU and CUDA.
    return torch.optim.SGD(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
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
