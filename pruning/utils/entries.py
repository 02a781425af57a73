"""Ways to call a model besides its example inputs: other inputs, and functions of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.utils.modules import call, copied, device_of
from pruning.utils.tree import Inputs, fresh, map_tensors

#: Another way to call a model: inputs, or a function of the model, which may also change the model.
Also = Inputs | Callable[[nn.Module], object]


@dataclass(frozen=True)
class Entry:
    """A way to call a model.

    Attributes:
        name: describes it in messages.
        function: of the model; it returns the outputs that count. None for a call with inputs.
        inputs: of a call.
        prepare: changes the model before a call.
    """

    name: str
    function: Callable[[nn.Module], object] | None = None
    inputs: Inputs = ()
    prepare: Callable[[nn.Module], object] | None = None

    def run(self, model: nn.Module, convert: Callable[[Tensor], object] | None = None) -> object:
        """Call the model, and return the outputs; the function may change the model.

        Args:
            convert: changes the tensors of inputs, for example to another device.
        """
        # On the meta device, the tensors that a function makes are there, too.
        device = device_of(model)
        with device if device.type == "meta" else contextlib.nullcontext():
            if self.function is not None:
                return self.function(model)
            if self.prepare is not None:
                self.prepare(model)
        inputs = fresh(self.inputs)
        return call(model, inputs if convert is None else map_tensors(convert, inputs))

    def on_copy(self, model: nn.Module, convert: Callable[[Tensor], object] | None = None) -> object:
        """Call a copy of the model, and return the outputs."""
        return self.run(copied(model), convert)


def entries_of(also: Iterable[Also]) -> tuple[Entry, ...]:
    """Return the given inputs and functions as entries.

    Raises:
        PruningError: if one of them is neither.

    >>> [entry.name for entry in entries_of([lambda model: model.sample(2), torch.zeros(1, 3)])]
    ['also[0]', 'also[1]']
    """
    if isinstance(also, Tensor | Mapping | str) or not isinstance(also, Iterable):
        raise PruningError(
            f"also is a {type(also).__name__}: expected a list of functions of the model and of inputs, such "
            "as [lambda model: model.sample(2), other_inputs]"
        )
    found = []
    for i, each in enumerate(also):
        name = f"also[{i}]"
        if isinstance(each, Tensor | Mapping | Sequence) and not isinstance(each, str):
            found.append(Entry(name, inputs=each))
        elif callable(each) and not isinstance(each, nn.Module):
            found.append(Entry(name, each))
        else:
            raise PruningError(
                f"{name} is a {type(each).__name__}: expected a function of the model, or inputs (a tensor, "
                "a sequence of arguments, or a mapping of keyword arguments)"
            )
    return tuple(found)


def exchanges_modules(
    entry: Entry, model: nn.Module, convert: Callable[[Tensor], object] | None
) -> tuple[bool, object]:
    """Return whether an entry exchanges modules or parameters, as a reparameterization does, and its output.

    The model is not changed.
    """
    probe = copied(model)
    before = _held(probe)
    output = entry.run(probe, convert)
    return _held(probe) != before, output


def _held(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(held)) for name, held in (*model.named_modules(), *model.named_parameters())]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the type of new tensors for the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
