"""Record the calls of modules in a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.utils.modules import call, eval_mode, hooked
from pruning.utils.tree import Inputs, fresh, tensors_among


@dataclass
class Call:
    """One call of a module.

    Attributes:
        args, kwargs: the arguments before the call, which may change them; None in place of an object with
            state, such as a cache, which would hold at a second call what the first one has put into it.
        output: what the call returned.
    """

    args: tuple[object, ...]
    kwargs: dict[str, object]
    output: object = None

    def inputs(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return tensors_among((*self.args, *self.kwargs.values()))

    def repeated(self, module: nn.Module, old: Tensor, new: Tensor) -> object:
        """Return what a module makes of the arguments, with one tensor in place of another."""
        args = [new if value is old else snapshot(value) for value in self.args]
        kwargs = {key: new if value is old else snapshot(value) for key, value in self.kwargs.items()}
        return module(*args, **kwargs)


def calls_of(model: nn.Module, inputs: Inputs) -> dict[str, list[Call]]:
    """Return the calls of every module in a forward pass in eval mode, by name, in the order of their start.

    Args:
        model: it is not changed. inputs: example inputs.

    >>> seen = calls_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 2, 2))
    >>> {name: [tuple(x.shape) for x in uses[0].inputs()] for name, uses in seen.items()}
    {'': [(1, 2, 2)], '0': [(1, 2, 2)], '1': [(1, 4)]}
    """
    seen: dict[str, list[Call]] = {}
    handles = []

    def begin(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = {key: snapshot(value) for key, value in kwargs.items()}
            seen.setdefault(name, []).append(Call(tuple(map(snapshot, args)), given))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            seen[name][-1].output = output

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(begin(name), with_kwargs=True))
        handles.append(module.register_forward_hook(end(name)))
    with hooked(handles), torch.no_grad(), eval_mode(model):
        call(model, fresh(inputs))
    return seen


def snapshot(value: object) -> object:
    """Return an argument as it is before a call; None for an object with state."""
    if isinstance(value, list | dict):
        return copy.copy(value)
    plain = isinstance(value, Tensor | tuple | bool | int | float | str)
    return value if plain else None
