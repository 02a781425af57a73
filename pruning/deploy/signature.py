"""The inputs of an exported file: their names, their batch, and which dimensions are dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pruning.errors import ExportError
from pruning.utils.batch import Batch, find_batch
from pruning.utils.paths import Path, map_with_paths, tensors_with_paths
from pruning.utils.tree import Inputs, map_tensors

#: By name of an input, the dimension or dimensions that are dynamic besides the batch.
Dynamic: TypeAlias = Mapping[str, int | Sequence[int]]

#: The positional and the keyword arguments of a call.
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(inputs: Inputs) -> Arguments:
    """Return inputs as the positional and the keyword arguments of a call, without constants."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    constants = constants_of(inputs)
    if isinstance(inputs, Mapping):
        return (), {name: value for name, value in inputs.items() if name not in constants}
    return tuple(inputs), {}


def constants_of(inputs: Inputs) -> dict[str, object]:
    """Return the keyword arguments that hold no tensors, such as `use_cache=False`."""
    if not isinstance(inputs, Mapping):
        return {}
    return {name: value for name, value in inputs.items() if not dict(tensors_with_paths(value))}


@dataclass(frozen=True)
class Signature:
    """The inputs with which a model is exported.

    Attributes:
        inputs: on the CPU; keyword arguments are in the order of the model's `forward`.
        names: of the tensors, by their path in the inputs.
        batch: of the inputs; without dimensions if there is none.
        dynamic: dimensions besides the batch that are dynamic, by the path of their tensor.
        asked: these dimensions as the caller named them: `x:2`.
    """

    inputs: Inputs
    names: Mapping[Path, str]
    batch: Batch
    dynamic: Mapping[Path, tuple[int, ...]]
    asked: tuple[str, ...]

    def example(self, count: int, sizes: Mapping[int, int] | None = None) -> Inputs:
        """Return noise from a fixed seed as inputs; tensors of integers repeat the example inputs.

        Args:
            count: number of examples; without effect if the inputs have no batch.
            sizes: new sizes of dynamic dimensions, by the size that they have in the example inputs.
        """
        generator = torch.Generator().manual_seed(0)

        def make(path: Path, value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            for dim in self.dynamic.get(path, ()):
                size = (sizes or {}).get(value.shape[dim], value.shape[dim])
                value = value.index_select(dim, torch.arange(size) % value.shape[dim])
            if value.is_floating_point():
                return torch.randn(value.shape, generator=generator).to(value.dtype)
            return value.clone()

        return map_with_paths(make, self.batch.resized(self.inputs, count))

    def dynamic_shapes(self, model: nn.Module) -> dict[str, Any]:
        """Return the dynamic dimensions as `torch.export.export` takes them."""
        batch = torch.export.Dim("batch")

        def dims(path: Path, value: object) -> object:
            if not isinstance(value, Tensor):
                return value if isinstance(value, list | tuple | Mapping) else None
            path = () if isinstance(self.inputs, Tensor) else path[1:]  # without the place in arguments
            found = dict.fromkeys(self.dynamic.get(path, ()), torch.export.Dim.DYNAMIC)
            return found | ({self.batch.dims[path]: batch} if path in self.batch.dims else {})

        args, kwargs = map_with_paths(dims, arguments_of(self.inputs))
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)

    def shapes(self) -> list[list[int]]:
        """Return the shapes of the tensors, without the batch."""
        return [
            [size for dim, size in enumerate(x.shape) if self.batch.dims.get(path) != dim]
            for path, x in tensors_with_paths(self.inputs)
        ]

    def other_sizes(self) -> Iterator[dict[int, int]]:
        """Yield other sizes of the dynamic dimensions to try, by their present size."""
        held = dict(tensors_with_paths(self.inputs))
        present = {held[path].shape[dim] for path, dims in self.dynamic.items() for dim in dims}
        for change in (lambda n: 2 * n, lambda n: n // 2, lambda n: n + 1, lambda n: n - 1):
            if min(map(change, present)) > 0:
                yield {size: change(size) for size in present}


def signature_of(model: nn.Module, example_inputs: Inputs, dynamic: Dynamic) -> Signature:
    """Return the signature of a model for example inputs.

    Raises:
        ExportError: if the inputs hold no tensors, an empty one, or arguments that `forward` does not
            take, or if `dynamic` names an unknown input or dimension.
    """
    inputs = example_inputs
    if not isinstance(inputs, Tensor):
        if not isinstance(inputs, Mapping):
            inputs = _named(model, tuple(inputs))
        inputs = _in_order(model, inputs) if isinstance(inputs, Mapping) else inputs
    inputs = map_tensors(lambda x: x.detach().cpu(), inputs)
    held = dict(tensors_with_paths(inputs))
    if not held or not all(x.numel() for x in held.values()):
        kinds = ", ".join(str(tuple(x.shape)) for x in held.values()) or "none"
        raise ExportError(
            f"export needs example inputs that are tensors with a batch dimension, got {kinds}; "
            "give at least one example"
        )
    batch = find_batch(model, inputs)
    names = _names(model, inputs, list(held))
    chosen = _chosen(model, inputs, held, names, dynamic)
    # A list of images has another length for another batch: no dimension of a tensor, so it is fixed.
    batch = Batch(batch.size, batch.dims)
    chosen = {
        path: tuple(dim for dim in dims if batch.dims.get(path) != dim) for path, dims in chosen.items()
    }
    for path, dims in chosen.items():
        for dim in dims:
            if held[path].shape[dim] < 2:
                raise ExportError(
                    f"dynamic {names[path]}:{dim}: give example inputs that have at least size 2 there, "
                    f"got shape {tuple(held[path].shape)}"
                )
    asked = tuple(
        f"{name}:{dim}"
        for name, dims in dynamic.items()
        for dim in ([dims] if isinstance(dims, int) else dims)
    )
    return Signature(inputs, names, batch, {path: dims for path, dims in chosen.items() if dims}, asked)


def argument_names(model: nn.Module) -> list[str]:
    """Return the names of the arguments that the model's `forward` lists."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def with_arguments(forward: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    """Return a `forward` whose arguments are those of the inputs, with the constants set.

    torch.jit.trace takes no arguments that can only be given by keyword.
    """
    args, kwargs = arguments_of(inputs)
    parameters = inspect.signature(forward).parameters
    plain = all(
        name in parameters and parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        for name in kwargs
    )
    constants = constants_of(inputs)
    if args or (plain and not constants):
        return forward
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in kwargs]
    )

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(**signature.bind(*args, **kwargs).arguments, **constants)

    vars(named)["__signature__"] = signature
    return named


def _named(model: nn.Module, inputs: tuple[object, ...]) -> Inputs:
    """Return positional arguments as keyword arguments if some of them hold no tensors."""
    names = argument_names(model)
    if all(dict(tensors_with_paths(value)) for value in inputs) or len(inputs) > len(names):
        return inputs
    return dict(zip(names, inputs, strict=False))


def _in_order(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments in the order of `forward`: exporters keep its order, not that of a dict."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = argument_names(model)
    unknown = [name for name in inputs if name not in names]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ExportError(
            f"{type(model).__name__}.forward has no argument {unknown[0]!r}; it takes: {', '.join(names)}"
        )
    return {name: inputs[name] for name in (*(n for n in names if n in inputs), *unknown)}


def _names(model: nn.Module, inputs: Inputs, paths: Sequence[Path]) -> dict[Path, str]:
    """Return the names of the tensors in the file: those of the arguments of `forward`.

    A single positional tensor is called `input`, one inside a nested argument by its path: `images_0`.
    """
    if len(paths) == 1 and not isinstance(inputs, Mapping):
        return {paths[0]: "input"}
    arguments: list[str] = []
    for p in inspect.signature(model.forward).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            arguments += [f"{p.name}_{i + 1}" for i in range(len(inputs) - len(arguments))]
        else:
            arguments.append(p.name)
    found: dict[Path, str] = {}
    for path in paths:
        first = path[0] if isinstance(path[0], str) else arguments[path[0]]
        name = "_".join(map(str, (first, *path[1:])))
        while name in found.values():
            name += "_"
        found[path] = name
    return found


def _chosen(
    model: nn.Module,
    inputs: Inputs,
    held: Mapping[Path, Tensor],
    names: Mapping[Path, str],
    dynamic: Dynamic,
) -> dict[Path, tuple[int, ...]]:
    """Return the dimensions that `dynamic` names, by the path of their tensor."""
    paths: dict[str, Path] = {}
    if not isinstance(inputs, Mapping) and len(held) == 1:  # also by the name of its argument
        paths = dict.fromkeys(argument_names(model)[:1], next(iter(held)))
    paths |= {name: path for path, name in names.items()}
    chosen: dict[Path, tuple[int, ...]] = {}
    for name, given in dynamic.items():
        if name not in paths:
            raise ExportError(f"dynamic {name!r}: there is no such input; there are: {', '.join(paths)}")
        path, found = paths[name], []
        ndim = held[path].ndim
        for dim in [given] if isinstance(given, int) else given:
            if isinstance(dim, bool) or not isinstance(dim, int) or not -ndim <= dim < ndim:
                raise ExportError(
                    f"dynamic {name}:{dim}: {name} has shape {tuple(held[path].shape)}; expected a "
                    f"dimension from 0 to {ndim - 1}"
                )
            found.append(dim % ndim)
        chosen[path] = tuple(dict.fromkeys((*chosen.get(path, ()), *found)))
    return chosen
