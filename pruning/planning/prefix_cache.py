"""Skipping what a model computes before the layers that change, where it is evaluated many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruning.graph.groups import Trace
from pruning.utils.modules import call, call_until, eval_mode, hooked
from pruning.utils.tree import tensors


class Shortcut:
    """Skips what a model computes before the layers of a group: for every point it is the same.

    The modules that have finished before the group's first layer begins let their input
    pass, and the last of them returns what it returned in the whole model. Whether that is
    all that the rest needs is tried out; where it is not, an earlier module is taken, and
    in the end none.
    """

    TRIES = 6

    def __init__(self, model: nn.Module, traced: Trace, group: str, batches: Sequence[Any]):
        self.batches = {id(tensors(batch)[0]): number for number, batch in enumerate(batches)}
        self.cached: list[Any] = []
        self.passing: list[str] = []
        self.returning = ""
        #: Modules before the group: what they compute, statistics included, does not change.
        self.before = _finished_before(model, {m.layer for m in traced.groups[group].members}, batches[0])
        finished = self.before
        for last in range(len(finished), max(0, len(finished) - self.TRIES), -1):
            *self.passing, self.returning = finished[:last]
            self.cached = [self._output(model, batches[0])]
            if self._is_enough(model, batches[0]):
                self.cached += [self._output(model, batch) for batch in batches[1:]]
                return
        self.passing, self.returning, self.cached = [], "", []

    def _output(self, model: nn.Module, batch: Any) -> Any:
        """What the last module returns for a batch."""
        with torch.inference_mode():
            return call_until(model, batch, self.returning, "out")

    def _is_enough(self, model: nn.Module, batch: Any) -> bool:
        with torch.inference_mode(), eval_mode(model):
            expected = call(model, batch)
            try:
                with self.applied(model):
                    return torch.equal(call(model, batch), expected)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                return False

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The shortcut in a model of the same modules, which must be given the known batches."""
        if not self.returning:
            yield
            return
        current = 0

        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal current
            current = self.batches.get(id(tensors((args, kwargs))[0]), -1)
            if current < 0:
                raise AssertionError("a shortcut knows only the batches that it was made with")

        def give(*_: Any, **__: Any) -> Any:
            cached = self.cached[current]
            return cached.clone() if isinstance(cached, Tensor) else cached

        handle = model.register_forward_pre_hook(see, with_kwargs=True)
        modules = {name: model.get_submodule(name) for name in (*self.passing, self.returning)}
        try:
            for name, module in modules.items():
                module.forward = give if name == self.returning else _pass_on
            yield
        finally:
            handle.remove()
            for module in modules.values():
                del module.forward


def _pass_on(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _finished_before(model: nn.Module, layers: set[str], batch: Any) -> list[str]:
    """The outermost modules that finish before the first of these layers begins, in order."""
    finished: list[str] = []
    reached = False

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal reached
            reached = reached or name in layers

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not reached:
                finished[:] = [other for other in finished if not other.startswith(f"{name}.")]
                finished.append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(begin(name)))
            handles.append(module.register_forward_hook(end(name)))
    with hooked(handles), torch.inference_mode(), eval_mode(model):
        call(model, batch)
    return finished if len(set(finished)) == len(finished) else []
