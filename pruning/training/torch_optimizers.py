"""Optimizers of torch.optim by name, and those that a function of the user makes."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.optimizers import Soap

#: Groups of parameters as every optimizer takes them: `params`, and the settings of the group.
ParameterGroups: TypeAlias = list[dict[str, Any]]

#: The name of an optimizer, or a function of parameter groups that makes one.
Optimizer: TypeAlias = str | Callable[..., Any]

#: Makes an optimizer of parameters and arguments, which are of its own.
Maker: TypeAlias = Callable[..., Any]
Arguments: TypeAlias = Mapping[str, Any]

#: Optimizers of torch.optim that do not suit the loop, with the reason.
_UNSUITABLE = {
    "lbfgs": "evaluates the loss several times in a step",
    "sparseadam": "takes sparse gradients only",
}


def named_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers of torch.optim by their names in lower case.

    >>> named_optimizers()["adamw"]
    <class 'torch.optim.adamw.AdamW'>
    """
    return {
        name.lower(): found
        for name, found in vars(torch.optim).items()
        if inspect.isclass(found)
        and issubclass(found, torch.optim.Optimizer)
        and found is not torch.optim.Optimizer
    }


def require_optimizer(optimizer: Optimizer, arguments: Arguments) -> None:
    """Check that an optimizer exists and takes these arguments.

    Raises:
        PruningError: if there is none of this name (the message names the nearest), if it needs what a
            training loop does not give, or if it does not take an argument.

    >>> require_optimizer("adamv", {})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pruning.errors.PruningError: optimizer 'adamv': expected sgd, soap or one of torch.optim; did you mean ...
    """
    if isinstance(optimizer, str):
        known = ["soap", *named_optimizers()]
        if optimizer not in known:
            near = difflib.get_close_matches(optimizer, known, 1)
            raise PruningError(
                f"optimizer {optimizer!r}: expected sgd, soap or one of torch.optim"
                f"{f'; did you mean {near[0]!r}?' if near else ': ' + ', '.join(sorted(known))}"
            )
        if optimizer in _UNSUITABLE:
            raise PruningError(
                f"optimizer {optimizer} {_UNSUITABLE[optimizer]}: expected one that takes a step after each "
                "backward pass, such as adamw"
            )
    elif not callable(optimizer):
        raise PruningError(
            f"optimizer {optimizer!r}: expected the name of an optimizer of torch.optim, or a function of "
            "the parameter groups that returns an optimizer"
        )
    _require_arguments(_maker(optimizer), _shown(optimizer), arguments)


def default_rate(optimizer: Optimizer, arguments: Arguments) -> float:
    """Return the learning rate of an optimizer that is given none.

    >>> default_rate("adamw", {}), default_rate(lambda groups: torch.optim.SGD(groups, lr=0.3), {})
    (0.001, 0.3)
    """
    probe: ParameterGroups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0}]
    made = _made(optimizer, probe, dict(arguments))
    return float(made.param_groups[0].get("lr", 1e-3))


def made_optimizer(
    optimizer: Optimizer, groups: ParameterGroups, lr: float, arguments: Arguments
) -> torch.optim.Optimizer:
    """Return an optimizer of parameter groups, at a learning rate.

    Args:
        optimizer: a name of torch.optim, or a function of the groups.
        groups: parameters, each group with its `weight_decay`.
        lr: the peak learning rate; of a function that takes no `lr`, the groups are scaled to it.
        arguments: further keyword arguments.

    Raises:
        PruningError: if the optimizer does not accept the parameters or the arguments, has no weight decay
            where one is asked, or is none.
    """
    maker = _maker(optimizer)
    if isinstance(optimizer, str) and "weight_decay" not in inspect.signature(maker).parameters:
        if any(group["weight_decay"] for group in groups):
            raise PruningError(
                f"optimizer {optimizer} has no weight decay: set weight_decay=0 (--weight-decay 0)"
            )
        groups = [{**group} for group in groups]
        for group in groups:
            del group["weight_decay"]
    takes_rate = _takes(maker, "lr") and "lr" not in arguments
    made = _made(optimizer, groups, {**arguments, **({"lr": lr} if takes_rate else {})})
    _require_trains(made, groups, _shown(optimizer))
    if not takes_rate:
        factor = lr / float(made.param_groups[0]["lr"])
        for group in made.param_groups:
            group["lr"] = group["lr"] * factor
    return made


def arguments_of_sgd(momentum: float, fused: bool, arguments: Arguments) -> dict[str, Any]:
    """Return the arguments of SGD with Nesterov momentum, overridden by given ones."""
    momentum = arguments.get("momentum", momentum)
    defaults = {"momentum": momentum, "nesterov": momentum > 0, "fused": fused}
    if any(arguments.get(name) for name in ("foreach", "differentiable")):
        defaults["fused"] = False
    if arguments.get("dampening"):
        defaults["nesterov"] = False
    return {**defaults, **arguments}


def _made(optimizer: Optimizer, groups: ParameterGroups, arguments: Arguments) -> torch.optim.Optimizer:
    maker, shown = _maker(optimizer), _shown(optimizer)
    try:
        made = maker(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise PruningError(
            f"optimizer {shown} cannot be made with {given or 'its defaults'}: "
            f"{' '.join(str(error).split())}; correct its arguments"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise PruningError(
            f"optimizer {shown} returned a {type(made).__name__}: expected a torch.optim.Optimizer"
        )
    return made


def _require_trains(made: torch.optim.Optimizer, groups: Iterable[Arguments], shown: str) -> None:
    """Check that an optimizer has parameters of the model, and a learning rate for each group."""
    known = {id(p) for group in groups for p in group["params"]}
    trained: list[Tensor] = [p for group in made.param_groups for p in group["params"]]
    if not trained or any(id(p) not in known for p in trained):
        raise PruningError(
            f"optimizer {shown} trains other parameters than those it was given: make it of the parameter "
            "groups that the function receives"
        )
    if any("lr" not in group for group in made.param_groups):
        raise PruningError(
            f"optimizer {shown} has no learning rate 'lr', which the schedule changes; choose another"
        )


def _require_arguments(maker: Maker, shown: str, arguments: Arguments) -> None:
    known = _parameters(maker)
    for name in arguments:
        if known is None or name in known:
            continue
        near = difflib.get_close_matches(name, list(known), 1)
        raise PruningError(
            f"optimizer {shown} has no argument {name!r}"
            f"{f'; did you mean {near[0]!r}?' if near else ': it takes ' + ', '.join(list(known)[1:])}"
        )


def _maker(optimizer: Optimizer) -> Maker:
    if optimizer == "soap":
        return Soap
    return named_optimizers()[optimizer] if isinstance(optimizer, str) else optimizer


def _shown(optimizer: Optimizer) -> str:
    if isinstance(optimizer, str):
        return optimizer
    inner = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    return getattr(inner, "__name__", type(inner).__name__)


def _parameters(maker: Maker) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function; None if it takes any, or cannot tell."""
    try:
        known = inspect.signature(maker).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in known.values()) else known


def _takes(maker: Maker, name: str) -> bool:
    """Return whether a function takes a keyword argument; one that takes any keywords does."""
    known = _parameters(maker)
    if known is None:
        try:
            return bool(inspect.signature(maker).parameters)
        except (TypeError, ValueError):
            return False
    return name in known
