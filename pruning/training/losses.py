"""Losses, and how good a model is on a split."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.batches import first_batch, to_device
from pruning.utils.modules import call, device_of, eval_mode

#: The target of what the usual loss leaves out, as torch has it.
IGNORED = -100

#: From a model, its inputs and the targets to the loss of a batch, a scalar; or a criterion of
#: outputs and targets, such as `nn.CrossEntropyLoss()`.
Loss = Callable[[nn.Module, Any, Any], Tensor] | Callable[[Any, Any], Tensor]

#: From a model to a figure that is better the higher it is, on the validation split.
Validate = Callable[[nn.Module], float]


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


def _probabilities(targets: Any, logits: Any) -> bool:
    """Whether targets are a share of every class, as mixing or smoothing labels makes them."""
    both = isinstance(targets, Tensor) and isinstance(logits, Tensor) and targets.is_floating_point()
    if not both or targets.shape != logits.shape or logits.ndim < 2 or logits.shape[1] < 2:
        return False
    return bool((targets >= 0).all() and ((targets.sum(1) - 1).abs() < 0.01).all())


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
