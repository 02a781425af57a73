"""Settings that are changed for a while and always put back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError

Step = TypeVar("Step", bound=Callable[..., Any])


def require_module(model: Any) -> None:
    """Raise `PruningError` for what is no network."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise PruningError(f"the model is {kind}: an instance of nn.Module was expected")


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode; afterwards every module is in the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever passes do to a model's buffers (a counter, spectral norm's vectors) is undone afterwards."""
    before = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, values in before:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)


def buffers_unchanged(step: Step) -> Step:
    """A function of a model that leaves the model's buffers as they were, whatever passes do to them.

    Passes need not be meant: to read a weight with spectral norm, in training mode, changes buffers.
    """

    @functools.wraps(step)
    def whole(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        require_module(model)
        with buffers_kept(model):
            return step(model, *args, **kwargs)

    return cast(Step, whole)


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were registered, until the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_input(layer: nn.Module, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call a function on what a layer receives, by position or by name; what it returns takes its place."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            changed = see(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        changed = see(kwargs[name])
        return None if changed is None else (args, {**kwargs, name: changed})

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """torch's CPU operations on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def channels_last(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The weights of a model's 2-d convolutions with their channels last in memory, if wanted."""
    if wanted:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        if wanted:
            model.to(memory_format=torch.contiguous_format)
