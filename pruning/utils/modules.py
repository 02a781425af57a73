"""Call modules, hook into them, change their mode for a while, copy them, and draw their weights anew."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.utils.tree import Inputs, fresh, tensors_among

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., object])


# ---- Calls


def require_module(model: object) -> None:
    """Check that a model is an instance of nn.Module.

    Raises:
        PruningError: where it is not.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise PruningError(f"the model is {kind}: an instance of nn.Module was expected")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's tensors; the CPU for one without any, such as an exported file.

    Raises:
        PruningError: where the model is not a module.
    """
    require_module(model)
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with a tensor, a sequence of arguments, or keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


class _Reached(Exception):
    """Ends the forward pass of `call_until`."""


def call_until(model: nn.Module, inputs: Inputs, layer: str, side: Literal["in", "out"]) -> Any:
    """Run a forward pass up to a layer; return the layer's first input (side `in`) or its output (`out`)."""
    found: list[object] = []

    def receives(x: Tensor) -> None:
        found.append(x)
        raise _Reached

    def returns(_: nn.Module, __: object, output: object) -> None:
        found.append(output)
        raise _Reached

    module = model.get_submodule(layer)
    handle = on_input(module, receives) if side == "in" else module.register_forward_hook(returns)
    with hooked([handle]), eval_mode(model), contextlib.suppress(_Reached):
        call(model, fresh(inputs))
    return found[0]


# ---- Hooks


def on_input(layer: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call a function with the first tensor that a layer receives; a tensor it returns replaces it."""

    def hook(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], dict[str, object]] | None:
        if args:
            changed = function(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name, value = next((key, value) for key, value in kwargs.items() if isinstance(value, Tensor))
        changed = function(value)
        return None if changed is None else (args, {**kwargs, name: changed})

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove registered hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- Modes, restored at the end of a block


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode; then give every module the mode it had."""
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
    """Restore the buffers that forward passes change (a counter, the vectors of spectral norm)."""
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


def buffers_unchanged(function: Function) -> Function:
    """Decorate a function of a model: it leaves the model's buffers as they were.

    Even reading a weight with spectral norm changes buffers, in training mode.
    """

    @functools.wraps(function)
    def wrapper(model: nn.Module, *args: object, **kwargs: object) -> object:
        require_module(model)
        with buffers_kept(model):
            return function(model, *args, **kwargs)

    return cast(Function, wrapper)


@contextlib.contextmanager
def channels_last(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Lay out the weights of 2-d convolutions with their channels last in memory, if wanted."""
    if wanted:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        if wanted:
            model.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Run torch's CPU operations on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- Copies

#: The attributes of every module: its parameters, children and hooks, which can be copied.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

_PLAIN = {int, float, bool, str, type(None)}

_CONTAINERS = (dict, OrderedDict, set, list)


def copied(
    model: Model, memo: dict[int, object] | None = None, convert: Callable[[Tensor], Tensor] = Tensor.detach
) -> Model:
    """Return a deep copy of a model.

    A model may store tensors of its last pass (an activation, a weight that hooks compute), which
    Python's deepcopy refuses because they have a gradient history; the copy has them without it.

    Args:
        memo: objects of the copy by the id of the original, as deepcopy takes them.
        convert: makes the copy's tensor from an original that has a gradient history.

    Raises:
        PruningError: for a model that cannot be copied.
    """
    known = {} if memo is None else memo
    for module in model.modules():
        # A module has a dozen containers, nearly all empty, on which deepcopy would spend most of its
        # time; some store long lists of numbers, too.
        for name, value in vars(module).items():
            plain_list = type(value) is list and {*map(type, value)} <= _PLAIN
            if type(value) in _CONTAINERS and (not value or plain_list):
                known[id(value)] = value.copy()
            elif name not in _MODULE_ATTRIBUTES:
                for tensor in tensors_among((value,)):
                    if not tensor.is_leaf:
                        known.setdefault(id(tensor), convert(tensor.detach()))
    try:
        return copy.deepcopy(model, known)
    except RuntimeError as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied, and pruning leaves the given model as it is: {error}"
        ) from error


# ---- Fresh weights


def fresh_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model with newly initialized weights.

    Every layer draws them by its own `reset_parameters`, from torch's global generator, in the
    order of `model.modules()`. Frozen parameters stay as they are. A small network can train better
    from fresh weights than from those that pruning leaves (Liu et al., Rethinking the Value of
    Network Pruning, ICLR 2019, arXiv 1810.05270).

    Raises:
        PruningError: for a parameter of a module that has no `reset_parameters`.

    >>> model = nn.Linear(4, 3)
    >>> fresh = fresh_weights(model)
    >>> fresh.weight.shape, torch.equal(fresh.weight, model.weight)
    (torch.Size([3, 4]), False)
    """
    model = copied(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    initialized: set[int] = set()
    for module in model.modules():
        reset, own = _initializer(module), {id(p) for p in module.parameters(recurse=False)}
        if reset is None or (own and own <= initialized):
            continue
        initialized |= own
        if own and not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue  # the statistics of a frozen norm stay, too
        reset()
        if isinstance(module, nn.MultiheadAttention):  # it initializes its output projection, too
            initialized |= {id(p) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if name in frozen:
            with torch.no_grad():
                parameter.copy_(frozen[name])
        elif id(parameter) not in initialized:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise PruningError(
                f"parameter {name!r} cannot be initialized: {kind} has no reset_parameters. Give it one, "
                "freeze it, or fine-tune the weights that pruning leaves"
            )
    return model


def _initializer(module: nn.Module) -> Callable[[], object] | None:
    """Return the method that initializes a module's weights; MultiheadAttention has a private one."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return reset if callable(reset) else None
