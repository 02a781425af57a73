"""Cache the outputs of the modules before a group's layers, for many evaluations of one group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruning.graph.groups import Trace
from pruning.utils.modules import call, call_until, eval_mode, hooked
from pruning.utils.tree import Inputs, tensors


class PrefixCache:
    """Skip the modules that run before the layers of a group: their outputs do not depend on its width.

    The modules that finish before the group's first layer starts return their input unchanged, and the
    last of them returns its cached output. The first batch tests whether the model then still computes
    the same. If not, an earlier module becomes the last one; after `TRIES` attempts nothing is skipped.

    Args:
        model: the whole model; it is not changed.
        trace: of this model.
        group: name of the group whose width will change.
        batches: the inputs of all evaluations; they must stay in memory as long as the cache.
    """

    TRIES = 6

    def __init__(self, model: nn.Module, trace: Trace, group: str, batches: Sequence[Inputs]):
        self.batches = {id(tensors(batch)[0]): number for number, batch in enumerate(batches)}
        self.outputs: list[object] = []
        self.skipped: list[str] = []
        self.last = ""
        #: The modules before the group, whose outputs and BatchNorm statistics do not change.
        self.unchanged = modules_before(model, {m.layer for m in trace.groups[group].members}, batches[0])
        finished = self.unchanged
        for end in range(len(finished), max(0, len(finished) - self.TRIES), -1):
            *self.skipped, self.last = finished[:end]
            self.outputs = [self._output(model, batches[0])]
            if self._is_enough(model, batches[0]):
                self.outputs += [self._output(model, batch) for batch in batches[1:]]
                return
        self.skipped, self.last, self.outputs = [], "", []

    def _output(self, model: nn.Module, batch: Inputs) -> object:
        """Return the output of the last skipped module for a batch."""
        with torch.inference_mode():
            return call_until(model, batch, self.last, "out")

    def _is_enough(self, model: nn.Module, batch: Inputs) -> bool:
        """Whether the model computes the same outputs with the cache."""
        with torch.inference_mode(), eval_mode(model):
            expected = call(model, batch)
            try:
                with self.applied(model):
                    return torch.equal(call(model, batch), expected)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                return False

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Use the cache in a model with the same modules, which is called only with the known batches."""
        if not self.last:
            yield
            return
        current = 0

        def find_batch(_: nn.Module, args: object, kwargs: object) -> None:
            nonlocal current
            current = self.batches.get(id(tensors((args, kwargs))[0]), -1)
            if current < 0:
                raise AssertionError("a prefix cache supports only the batches that it was created with")

        def cached(*_: object, **__: object) -> object:
            output = self.outputs[current]
            return output.clone() if isinstance(output, Tensor) else output

        handle = model.register_forward_pre_hook(find_batch, with_kwargs=True)
        modules = {name: model.get_submodule(name) for name in (*self.skipped, self.last)}
        try:
            for name, module in modules.items():
                module.forward = cached if name == self.last else _first_argument
            yield
        finally:
            handle.remove()
            for module in modules.values():
                del module.forward


def _first_argument(x: object, *_: object, **__: object) -> object:
    return x


def modules_before(model: nn.Module, layers: set[str], inputs: Inputs) -> list[str]:
    """Return the outermost modules that finish before the first of these layers starts, in order.

    The list is empty if such a module runs more than once.
    """
    finished: list[str] = []
    reached = False

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal reached
            reached = reached or name in layers

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
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
        call(model, inputs)
    return finished if len(set(finished)) == len(finished) else []
