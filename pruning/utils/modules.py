"""Call modules, hook them, change their mode within a block, copy them, and reinitialize their weights."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.utils.fast_path import without_fast_path
from pruning.utils.held_weight import held_weight
from pruning.utils.tree import Inputs, fresh, tensors_among
from pruning.utils.wrappers import require_module, unwrapped

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., object])


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its name, as `get_submodule` does in many times the time.

    The name of a parameter gives a layer with this weight (`pruning.utils.held_weight`).

    >>> submodule(nn.Sequential(nn.Sequential(nn.ReLU())), "0.0")
    ReLU()
    >>> submodule(nn.Sequential(nn.Linear(3, 4)), "0.weight").weight.shape
    torch.Size([4, 3])
    """
    found: nn.Module | None = model
    for part in name.split(".") if name else ():
        owner, children = found, found._modules if found is not None else {}
        # No `get`: the children of a scripted module have none.
        found = children[part] if part in children else None  # noqa: SIM401
    if found is None and owner is not None and owner._parameters.get(part) is not None:
        return held_weight(owner, part)
    return model.get_submodule(name) if found is None else found


# ---- Calls


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's tensors; the CPU if it has none, such as an exported file.

    Raises:
        PruningError: if the model is not a module.
    """
    if not isinstance(model, nn.Module):
        require_module(model)
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with inputs: a tensor, a sequence of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


class _Reached(Exception):
    """Ends the forward pass of `call_until`."""


def call_until(model: nn.Module, inputs: Inputs, layer: str, side: Literal["in", "out"]) -> Any:
    """Run a forward pass up to a layer, and return its first input (side `in`) or its output (`out`)."""
    found: list[object] = []

    def stop_at_input(x: Tensor) -> None:
        found.append(x)
        raise _Reached

    def stop_at_output(_: nn.Module, __: object, output: object) -> None:
        found.append(output)
        raise _Reached

    module = model.get_submodule(layer)
    handle = on_input(module, stop_at_input) if side == "in" else module.register_forward_hook(stop_at_output)
    with hooked([handle]), eval_mode(model), contextlib.suppress(_Reached):
        call(model, fresh(inputs))
    return found[0]


# ---- Hooks


def on_input(layer: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Register a hook on a layer's first input tensor; a tensor that it returns replaces the input."""

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
    """Remove registered hooks at the end of the block, in which no kernel skips them."""
    try:
        with without_fast_path():
            yield
    finally:
        for handle in handles:
            handle.remove()


# ---- Modes, restored at the end of a block


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode for the block; then restore the mode of every module."""
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
    """Restore a model's buffers after the block: forward passes may change them (spectral norm)."""
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
    """Decorate a function whose first argument is a model, to restore the model's buffers afterwards.

    In training mode, even reading a weight with spectral norm changes buffers. The function gets the model
    inside wrappers such as DataParallel.
    """

    @functools.wraps(function)
    def wrapper(model: nn.Module, *args: object, **kwargs: object) -> object:
        require_module(model)
        model = unwrapped(model)
        with buffers_kept(model):
            return function(model, *args, **kwargs)

    return cast(Function, wrapper)


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Set the number of threads of torch's CPU operations within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- Copies

#: The attributes that every module has (parameters, children, hooks), which can be copied.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

#: Those of them that hold parameters, buffers and modules.
_HELD = frozenset(("_parameters", "_buffers", "_modules"))

_PLAIN = {int, float, bool, str, type(None)}

_CONTAINERS = (dict, OrderedDict, set, list)


def copied(
    model: Model, memo: dict[int, object] | None = None, convert: Callable[[Tensor], Tensor] = Tensor.detach
) -> Model:
    """Return a deep copy of a model.

    A model may store tensors of its last pass (an activation, a weight that hooks compute), which
    Python's deepcopy rejects because they are part of an autograd graph; in the copy they are detached.

    Args:
        memo: objects of the copy by the id of the original, as deepcopy takes them.
        convert: returns the copy of such a tensor, given the detached original.

    Raises:
        PruningError: if the model cannot be copied.
    """
    known = {} if memo is None else memo
    for module in model.modules():
        # deepcopy would spend most of its time on a module's dozen containers, nearly all empty, and on
        # long lists of numbers that some modules store.
        for name, value in vars(module).items():
            if type(value) in _PLAIN:
                continue
            plain_list = type(value) is list and {*map(type, value)} <= _PLAIN
            if type(value) in _CONTAINERS and (not value or plain_list):
                known[id(value)] = value.copy()
            elif name not in _MODULE_ATTRIBUTES:
                for tensor in tensors_among((value,)):
                    if not tensor.is_leaf:
                        known.setdefault(id(tensor), convert(tensor.detach()))
    try:
        plain = {kind for kind in {*map(type, model.modules())} if _has_plain_state(kind)}
        for module in reversed(list(model.modules())):
            if id(module) not in known and type(module) in plain:
                _copy_module(module, known)
        return copy.deepcopy(model, known)
    except RuntimeError as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied, and pruning works on a copy of the model: {error}; "
            "remove what cannot be copied from its attributes"
        ) from error


def _has_plain_state(kind: type[nn.Module]) -> bool:
    """Whether deepcopy would copy the attributes of a module of this type, and do nothing else."""
    own = ("__reduce_ex__", "__reduce__", "__new__", "__getstate__")
    return (
        not hasattr(kind, "__deepcopy__")
        and kind not in copyreg.dispatch_table
        and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)
        and kind.__setstate__.__module__.startswith("torch.nn.modules.")
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )


def _copy_module(module: nn.Module, known: dict[int, object]) -> None:
    """Copy a module as deepcopy does, but for calls that copy nothing; `known` receives the copy."""
    made = known[id(module)] = object.__new__(type(module))
    state = vars(made)
    for name, value in vars(module).items():
        if type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value))):
            state[name] = value
        elif id(value) not in known and name in _HELD and type(value) in (dict, OrderedDict):
            pairs = (
                (key, known[id(x)] if id(x) in known else copy.deepcopy(x, known)) for key, x in value.items()
            )
            state[name] = known[id(value)] = type(value)(pairs)
        elif name != "_compiled_call_impl":  # of `torch.compile`, which copies do not have
            state[name] = known[id(value)] if id(value) in known else copy.deepcopy(value, known)


def parameter_places(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Return by `id` of each parameter the modules that hold it, each with the name of the attribute.

    A module that has several names counts once.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> [places for places in parameter_places(model).values() if len(places) > 1]
    [[('0', 'weight'), ('1', 'weight')]]
    """
    places: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((name, attribute))
    return places


# ---- Fresh weights


def fresh_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model with newly initialized weights.

    Every layer draws them by its own `reset_parameters`, from torch's global generator, in the
    order of `model.modules()`. Frozen parameters keep their values. A small network can train better
    from new weights than from those that pruning leaves (Liu et al., Rethinking the Value of
    Network Pruning, ICLR 2019, arXiv 1810.05270).

    Raises:
        PruningError: if a module has parameters and no `reset_parameters`.

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
            continue  # this also keeps the statistics of a frozen norm
        reset()
        if isinstance(module, nn.MultiheadAttention):  # its reset also initializes the output projection
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
