"""Modules: how they are called, copied, and put into another mode for a while."""

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


Model = TypeVar("Model", bound=nn.Module)

#: What every module has: its parameters and children, which can be copied.
_OWN = frozenset(vars(nn.Module()))

_PLAIN = {int, float, bool, str, type(None)}

_CONTAINERS = (dict, OrderedDict, set, list)


def copied(
    model: Model, memo: dict[int, Any] | None = None, convert: Callable[[Tensor], Any] = Tensor.detach
) -> Model:
    """A deep copy of a model.

    A model may keep tensors of its last pass (an activation, a weight that hooks compute), which
    Python's deepcopy refuses for their history; the copy has them without it.

    Args:
        memo: what stands for which object in the copy, by id, as deepcopy takes it.
        convert: makes the copy's tensors out of those that have a history.

    Raises `PruningError` for a model that cannot be copied.
    """
    known = {} if memo is None else memo
    for module in model.modules():
        # A module has a dozen containers, nearly all empty, on which deepcopy spends most of its time;
        # some keep long lists of numbers, too.
        for name, own in vars(module).items():
            if type(own) in _CONTAINERS and (not own or (type(own) is list and {*map(type, own)} <= _PLAIN)):
                known[id(own)] = own.copy()
            elif name not in _OWN:
                for leaf in tensors_among((own,)):
                    if not leaf.is_leaf:
                        known.setdefault(id(leaf), convert(leaf.detach()))
    try:
        return copy.deepcopy(model, known)
    except RuntimeError as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied, and pruning leaves the given model as it is: {error}"
        ) from error


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model on example inputs: a tensor, a sequence of arguments, or keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are; one without any, such as an exported file, takes the CPU.

    Raises `PruningError` for what is no module.
    """
    require_module(model)
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


def call_until(model: nn.Module, inputs: Inputs, layer: str, side: Literal["in", "out"]) -> Any:
    """The first input of a layer (side `in`) or its output (`out`) in a forward pass, which ends there."""
    found: list[Any] = []

    def receives(x: Tensor) -> None:
        found.append(x)
        raise _Reached

    def returns(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    module = model.get_submodule(layer)
    handle = on_input(module, receives) if side == "in" else module.register_forward_hook(returns)
    with hooked([handle]), eval_mode(model), contextlib.suppress(_Reached):
        call(model, fresh(inputs))
    return found[0]


def fresh_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose layers have made their weights anew, as an untrained one has them.

    Every layer draws them by its own `reset_parameters`, from torch's global generator, in the
    order of `model.modules()`. Frozen parameters stay as they are. Small networks can be better
    trained from fresh weights than from those that pruning leaves (Liu et al., Rethinking the
    Value of Network Pruning, ICLR 2019, arXiv 1810.05270).

    Raises `PruningError` for a parameter of a module that has no `reset_parameters`.
    """
    model = copied(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    covered: set[int] = set()
    for module in model.modules():
        reset, own = _reset(module), {id(p) for p in module.parameters(recurse=False)}
        if reset is None or (own and own <= covered):
            continue
        covered |= own
        if own and not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue  # the statistics of a frozen norm stay, too
        reset()
        if isinstance(module, nn.MultiheadAttention):  # it does what its projection holds in its own way
            covered |= {id(p) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if name in frozen:
            with torch.no_grad():
                parameter.copy_(frozen[name])
        elif id(parameter) not in covered:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise PruningError(
                f"parameter {name!r} cannot be made anew: {kind} has no reset_parameters. Give it one, "
                "freeze it, or fine-tune the weights that pruning leaves"
            )
    return model


def _reset(module: nn.Module) -> Callable[[], Any] | None:
    """What makes the weights of a module anew; attention's has another name."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return reset if callable(reset) else None
