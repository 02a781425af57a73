"""Losses, accuracy, and the score of a model on a validation split."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.batches import Batch, first_batch, to_device
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.outputs import held, logits_of
from pruning.utils.tree import Inputs
from pruning.utils.wording import number_of

#: Examples with this target are left out of the loss and the accuracy, as in torch.
IGNORED = -100

#: A function of (model, inputs, targets) that returns the loss of a batch, a scalar; or a criterion
#: of (outputs, targets), such as `nn.CrossEntropyLoss()`.
Loss: TypeAlias = Callable[..., Tensor]

#: A function from a model to its score on the validation split; higher is better.
Validate: TypeAlias = Callable[[nn.Module], float]


def cross_entropy(model: nn.Module, inputs: Inputs, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of a classifier on a batch.

    If the outputs hold a `loss`, as those of transformers do when their inputs hold the labels, it is
    returned instead, unless labels are smoothed or the targets are probabilities.

    Args:
        model: classifier that returns logits (N, classes, ...), or an object or mapping with `logits`;
            those of tokens may have the shape (N, tokens, classes).
        inputs: a tensor, a sequence of arguments or a mapping of keyword arguments.
        targets: integer classes (N, ...), or probabilities of the logits' shape.
        label_smoothing: share of each target that is spread over all classes (Szegedy et al.,
            arXiv 1512.00567).

    Raises:
        PruningError: if the outputs or targets are not those of a classifier (see `logits_for`).

    >>> inputs, targets = torch.rand(8, 4), torch.arange(8) % 3
    >>> cross_entropy(nn.Linear(4, 3), inputs, targets).shape
    torch.Size([])
    """
    outputs = call(model, inputs)
    logits = class_logits(outputs, targets)
    if isinstance(logits, Tensor) and _are_probabilities(targets, logits):
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    own = held(outputs, "loss")
    if isinstance(own, Tensor) and own.numel() == 1 and not label_smoothing:
        return own.reshape(())
    logits = logits_for(targets, logits)
    try:
        return F.cross_entropy(logits, targets.long(), label_smoothing=label_smoothing)
    except IndexError as error:
        raise no_such_class(logits, targets) from error


def with_label_smoothing(loss: Loss, share: float) -> Loss:
    """Return a loss with label smoothing: the default loss, or one that has a method of this name.

    Raises:
        PruningError: if it is another loss.

    >>> with_label_smoothing(nn.MSELoss(), 0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pruning.errors.PruningError: label smoothing 0.1 is for the default loss, and MSELoss is given: ...
    """
    if not share:
        return loss
    if loss is cross_entropy:
        return functools.partial(cross_entropy, label_smoothing=share)
    own = getattr(loss, "with_label_smoothing", None)
    if own is None:
        shown = getattr(loss, "__name__", type(loss).__name__)
        raise PruningError(
            f"label smoothing {share:g} is for the default loss, and {shown} is given: smooth the targets "
            f"there, as nn.CrossEntropyLoss(label_smoothing={share:g}) does"
        )
    return own(share)


def learned_by(loss: Loss, model: nn.Module, batches: Iterable[object]) -> nn.Module | None:
    """Return the module that is trained together with a model, if a loss has one (see `Distillation`)."""
    begin = getattr(loss, "begin_training", None)
    return None if begin is None else begin(model, batches)


def class_logits(outputs: object, targets: object = None) -> object:
    """Return the logits that outputs are or hold, with the classes along dimension 1.

    >>> class_logits({"logits": torch.zeros(2, 5, 3)}, torch.zeros(2, 5)).shape  # of tokens
    torch.Size([2, 3, 5])
    """
    logits = logits_of(outputs)
    if not isinstance(logits, Tensor) or isinstance(outputs, Tensor) or logits.ndim != 3:
        return logits
    is_of_tokens = isinstance(targets, Tensor) and targets.shape == logits.shape[:2]
    return logits.movedim(-1, 1) if is_of_tokens else logits


def loss_of(loss: Loss) -> Callable[..., Tensor]:
    """Return a loss or criterion as a function of (model, inputs, targets) that checks its result.

    A callable with exactly two required arguments is taken for a criterion of (outputs, targets).

    Raises:
        PruningError: if `loss` is not callable. The returned function raises it if the result is not a
            scalar or does not depend on the model.
    """
    if not callable(loss):
        raise PruningError(
            f"loss {loss!r} is not callable: give a function of (model, inputs, targets), or a criterion of "
            "(outputs, targets)"
        )
    is_criterion = _required_arguments(loss.forward if isinstance(loss, nn.Module) else loss) == 2

    def scalar(model: nn.Module, inputs: Inputs, targets: object) -> Tensor:
        try:
            value = loss(call(model, inputs), targets) if is_criterion else loss(model, inputs, targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise PruningError(
                "a training batch holds one example, from which BatchNorm cannot compute a variance: leave "
                "the last, smaller batch out, as DataLoader does with drop_last=True"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PruningError(
                f"the loss returned {given}: a tensor with one element was expected; return the mean"
            )
        if torch.is_grad_enabled() and not value.requires_grad:
            raise PruningError(
                "the loss does not depend on the network, so no gradient can be computed: compute it from "
                "the network's outputs, without detach or no_grad"
            )
        return value.reshape(())

    return scalar


def _required_arguments(function: Callable[..., object]) -> int | None:
    """Count the arguments without a default; return None for *args, or if there is no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)


def logits_for(targets: object, outputs: object) -> Tensor:
    """Check that a model's outputs are logits for these targets, and return them.

    Logits have the shape (N, classes, ...), targets are integer classes (N, ...).

    Raises:
        PruningError: for other outputs or targets. The cross entropy of a single output is always 0,
            and targets of another shape would be broadcast over the examples.
    """
    if not isinstance(outputs, Tensor):
        given = f"the network returns a {type(outputs).__name__}"
    elif outputs.ndim < 2 or outputs.shape[1] < 2:
        given = f"the network returns outputs of shape {tuple(outputs.shape)}"
    elif not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        given = f"the targets are {targets.dtype if isinstance(targets, Tensor) else type(targets).__name__}"
    elif targets.shape != outputs.shape[:1] + outputs.shape[2:]:
        given = f"the targets have shape {tuple(targets.shape)}, the outputs {tuple(outputs.shape)}"
    else:
        return outputs
    raise PruningError(
        f"{given}: cross entropy and accuracy need logits (N, classes, ...) of at least two classes, and "
        "integer targets (N, ...). Give a loss and a metric of your own in Python (loss=, metric=), or score "
        "by fisher, which needs no targets, or by l1 or l2"
    )


def classes_of(targets: Tensor, outputs: object) -> Tensor:
    """Return targets as classes; if they are probabilities, return the most probable classes."""
    return targets.argmax(1) if _are_probabilities(targets, outputs) else targets


def _are_probabilities(targets: object, logits: object) -> TypeGuard[Tensor]:
    """Return whether targets are class probabilities, as label smoothing and mixup make them."""
    if not (isinstance(targets, Tensor) and isinstance(logits, Tensor) and targets.is_floating_point()):
        return False
    if targets.shape != logits.shape or logits.ndim < 2 or logits.shape[1] < 2:
        return False
    return bool((targets >= 0).all() and ((targets.sum(1) - 1).abs() < 0.01).all())


def no_such_class(logits: Tensor, targets: Tensor) -> PruningError:
    """Return the error about targets that are no classes of logits (N, classes, ...)."""
    return PruningError(
        f"the targets go from {int(targets.min())} to {int(targets.max())}, but the network has "
        f"{number_of(logits.shape[1], 'class')}, which count from 0: give a network with as many classes "
        "as the data"
    )


def why_not_classifier(model: nn.Module, batches: Iterable[Batch]) -> str | None:
    """Return the reason why accuracy cannot be computed on the first batch; None if it can.

    A label beyond the model's classes is not reported here; `accuracy` raises an error for it.
    """
    with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=[]):
        inputs, targets = to_device(first_batch(batches), device_of(model))
        try:
            outputs = class_logits(call(model, inputs), targets)
            logits_for(classes_of(targets, outputs), outputs)
        except PruningError as error:
            return str(error)
    return None


def require_classifier(model: nn.Module, *sources: Iterable[Batch]) -> None:
    """Check that `cross_entropy` works on the first batch of each source.

    The state of the random generator is restored.

    Raises:
        PruningError: if the outputs or targets are not those of a classifier.
    """
    with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=[]):
        for batches in sources:
            for batch in batches:
                cross_entropy(model, *to_device(batch, device_of(model)))
                break


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of examples whose largest logit (along dimension 1) is the target's, 0 to 1.

    Args:
        model: classifier that returns or holds logits, see `cross_entropy`. It runs in eval mode; the
            modes of its modules are restored.
        batches: pairs (inputs, targets), see `cross_entropy`. Targets of -100 (`IGNORED`) are left out.

    Raises:
        PruningError: if the outputs or targets are not those of a classifier, or if there is no batch.

    >>> model, inputs = nn.Linear(4, 3), torch.rand(8, 4)
    >>> accuracy(model, [(inputs, model(inputs).argmax(1))])
    1.0
    """
    right, count = 0, 0
    device = device_of(model)
    with torch.inference_mode(), eval_mode(model):
        for batch in batches:
            inputs, targets = to_device(batch, device)
            outputs = class_logits(call(model, inputs), targets)
            targets = classes_of(targets, outputs)
            logits = logits_for(targets, outputs)
            counted = targets != IGNORED
            if bool((counted & ((targets < 0) | (targets >= logits.shape[1]))).any()):
                raise no_such_class(logits, targets)
            valid = ~logits.isnan().any(1)  # argmax treats NaN as the largest value
            right += int(((logits.argmax(1) == targets) & valid & counted).sum())
            count += int(counted.sum())
    if not count:
        raise PruningError(
            "there is nothing to evaluate on: the given batches are empty; give at least one batch"
        )
    return right / count


def validation_score(validate: Validate, model: nn.Module) -> float:
    """Call `validate` on a model in eval mode and return its score; the model's modes are restored.

    Raises:
        PruningError: if the score is not a number.
    """
    with torch.no_grad(), eval_mode(model):
        value = validate(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise PruningError(f"validate returned {value!r}: return one number; higher is better") from error
