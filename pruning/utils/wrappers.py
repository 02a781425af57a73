"""Modules that wrap a whole model to run it otherwise: on several devices, averaged, or compiled."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pruning.errors import PruningError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def require_module(model: object) -> None:
    """Raise `PruningError` if a model is no nn.Module, or one whose code is a recorded program."""
    if not isinstance(model, nn.Module):
        name = type(model).__name__
        article = "an" if name[0] in "AEIOU" else "a"
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"{article} {name}"
        raise PruningError(f"the model is {kind}: give an instance of nn.Module")
    for name, module in model.named_modules():
        if is_exported(module):
            where = f"{name} is" if name else "the model is"
            raise PruningError(
                f"{where} a program of torch.export, which is recorded for its present widths; give the "
                "nn.Module that it was made from, prune that, and export the result"
            )


def is_exported(module: nn.Module) -> bool:
    """Whether a module runs a program that torch.export recorded.

    >>> is_exported(torch.export.export(nn.Linear(2, 3), (torch.zeros(1, 2),)).module())
    True
    """
    if type(module).__module__.startswith("torch.export."):
        return True  # unflattened
    return isinstance(module, torch.fx.GraphModule) and "eval" in vars(module)  # which raises an error


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers: DataParallel, DistributedDataParallel, AveragedModel, torch.compile.

    Where submodules are wrapped, the result is a copy of the modules that hold them, with the same
    parameters. A model without wrappers is returned itself.

    Raises:
        PruningError: for what is no module, and for FullyShardedDataParallel, whose parameters are parts
            of the model's.

    >>> net = nn.Linear(2, 3)
    >>> unwrapped(nn.DataParallel(net)) is net
    True
    >>> [name for name, _ in unwrapped(nn.Sequential(nn.DataParallel(net))).named_parameters()]
    ['0.weight', '0.bias']
    """
    if not isinstance(model, nn.Module):
        require_module(model)
    model = _inner(model)
    if all(_inner(module) is module for module in model.modules()):
        return model
    return _without_wrappers(model, {})


def without_prefixes(name: str) -> str:
    """Return the name of a parameter or module without what wrappers put into it.

    >>> without_prefixes("module.encoder._orig_mod.conv.weight")
    'encoder.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _inner(model: nn.Module) -> nn.Module:
    while True:
        held = dict(model.named_children())
        if type(model).__name__ == "FullyShardedDataParallel":
            raise PruningError(
                "the model is in FullyShardedDataParallel, which holds parts of its weights only; prune the "
                "model before it is sharded"
            )
        if "_orig_mod" in held:
            model = held["_orig_mod"]
        elif "module" in held and (isinstance(model, _WRAPPERS) or _only_holds(model)):
            model = held["module"]
        else:
            return model


def _only_holds(model: nn.Module) -> bool:
    """Whether a module holds another and has no code of its own, as averages of other libraries do."""
    return len(model._modules) == 1 and type(model).forward is nn.Module.forward


def _without_wrappers(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of the modules that hold wrappers; `made` holds the results by `id` of the module."""
    if id(model) not in made:
        children = {
            name: None if child is None else _without_wrappers(_inner(child), made)
            for name, child in model._modules.items()
        }
        made[id(model)] = model
        if any(children[name] is not child for name, child in model._modules.items()):
            made[id(model)] = copy.copy(model)
            made[id(model)]._modules = children
    return made[id(model)]
