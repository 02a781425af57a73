"""Compute the shapes of a forward pass on the meta device, which stores and computes no values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.utils.fast_path import without_fast_path
from pruning.utils.modules import copied
from pruning.utils.tree import Inputs, fresh, map_tensors

T = TypeVar("T")

#: Elementwise operations whose result has the shape and type of their first operand.
_SAME_SHAPE = frozenset(
    f"aten::{name}{place}"
    for name in (
        "add", "sub", "mul", "div", "relu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "silu", "gelu",
        "tanh", "leaky_relu", "elu", "mish", "clamp", "clamp_min", "exp", "sqrt", "rsqrt", "neg", "abs",
        "threshold_backward",
    )
    for place in ("", "_")
)  # fmt: skip


def without_computing(run: Callable[[nn.Module, Inputs], T], model: nn.Module, inputs: Inputs) -> T:
    """Return `run(copy of the model, inputs)`, computed on the meta device if the model runs there.

    A model that reads values (a data-dependent branch, `.item()`) runs on its own device; an error
    on that device is raised.

    >>> without_computing(lambda model, x: model(x).shape, nn.Linear(4, 3), torch.rand(2, 4))
    torch.Size([2, 3])
    """
    try:
        with without_fast_path():
            return run(on_meta(model), map_tensors(to_meta, inputs))
    except Exception:  # of any kind; an error of the model itself is raised again below
        return run(copied(model), fresh(inputs))


def without_storage(
    model: nn.Module, run: Callable[[nn.Module, Inputs], object], inputs: Inputs
) -> tuple[nn.Module, Inputs]:
    """Return a model and its inputs on the meta device if `run` works there, else unchanged."""
    probe, example = on_meta(model), map_tensors(to_meta, inputs)
    try:
        with torch.no_grad(), without_fast_path():
            run(probe.eval(), example)
    except Exception:  # of any kind: the model reads values
        return model, inputs
    return probe, example


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = to_meta(tensor)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copied(model, memo, to_meta)


def to_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on the meta device."""
    return torch.empty_like(tensor, device="meta")


class Shapes(TorchDispatchMode):
    """Compute the most common operations on the meta device faster than torch does."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        return run_operation(func, args, kwargs or {})


def run_operation(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, object]) -> Any:
    """Run an operation, with shortcuts for the most common ones on the meta device.

    torch decomposes BatchNorm, for example, into ten operations on the meta device, which would take
    most of the time of a pass.
    """
    x = args[0] if args else None
    if not (isinstance(x, Tensor) and x.is_meta and x.is_floating_point()):
        return func(*args, **kwargs)
    name = func._schema.name
    if name in _SAME_SHAPE:
        other = args[1] if len(args) > 1 else None
        if not isinstance(other, Tensor) or (other.shape == x.shape and other.dtype == x.dtype):
            return x if name.endswith("_") else _like(x)
    if name == "aten::convolution" and not kwargs and (shape := _convolved(*args)) is not None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if (
        name == "aten::native_batch_norm"
        and x.ndim > 1
        and all(t is None or t.shape == x.shape[1:2] for t in args[1:5])
    ):
        return _like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    if name == "aten::native_batch_norm_backward" and x.shape == args[1].shape:
        channels = x.new_empty(x.shape[1])
        grads = (torch.empty_like(args[1]), channels, channels.clone())
        return tuple(grad if wanted else None for grad, wanted in zip(grads, args[9], strict=True))
    if name == "aten::native_layer_norm":
        across = tuple(args[1])
        if x.shape[-len(across) :] == across and all(t is None or t.shape == across for t in args[2:4]):
            statistics = x.new_empty((*x.shape[: -len(across)], *[1] * len(across)))
            return torch.empty(x.shape, dtype=x.dtype, device=x.device), statistics, statistics.clone()
    if name == "aten::addmm" and len(args) == 3 and not kwargs:
        left, right = args[1:]
        if left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0] and x.shape == right.shape[1:]:
            return left.new_empty(left.shape[0], right.shape[1])
    return _remembered(func, args, kwargs)


#: By operator and the shapes, layouts and types of its arguments, those of its outputs.
_OUTPUTS: dict[tuple[object, ...], list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}

#: Most outputs that are kept.
_MOST_OUTPUTS = 20_000


def _remembered(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Run an operation that makes new tensors, or make such tensors as it made for arguments alike.

    Many of torch's operations on the meta device are written in Python and take longer than on the CPU.
    """
    if not _makes_new(func):
        return func(*args, **kwargs)
    try:
        key = func, torch.get_default_dtype(), _described(args), _described(kwargs.values()), *kwargs
        known = _OUTPUTS.get(key)
    except TypeError:  # an argument that is neither a plain tensor on the meta device nor plain data
        return func(*args, **kwargs)
    if known is None:
        output = func(*args, **kwargs)
        made = output if isinstance(output, tuple) else (output,)
        if all(type(x) is Tensor and x.is_meta and x.layout is torch.strided for x in made):
            if len(_OUTPUTS) >= _MOST_OUTPUTS:
                _OUTPUTS.clear()
            _OUTPUTS[key] = [(x.shape, x.stride(), x.dtype) for x in made]
        return output
    like = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
    return like[0] if len(func._schema.returns) == 1 else tuple(like)


@functools.cache
def _makes_new(func: OpOverload) -> bool:
    """Whether an operation returns new tensors, and neither changes its arguments nor returns views."""
    schema = func._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns)) and all(
        str(each.type) == "Tensor" for each in schema.returns
    )


def _described(values: Iterable[object]) -> tuple[object, ...]:
    """Return hashable descriptions of arguments; raise `TypeError` for tensors of other kinds."""
    described: list[object] = []
    for value in values:
        if isinstance(value, Tensor):
            if type(value) not in _PLAIN_TENSORS or not value.is_meta or value.layout is not torch.strided:
                raise TypeError
            described.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            described.append((type(value), *_described(value)))
        else:
            described.append((type(value), value))
    return tuple(described)


_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor of the same shape, type and layout."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.is_contiguous() else torch.empty_like(x)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int] | None:
    """Return the shape of a convolution's output; None where torch has to decide, or to raise an error."""
    spatial = x.ndim - 2
    if (
        transposed
        or x.ndim != weight.ndim
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
        or weight.dtype != x.dtype
        or not (x.is_contiguous() and weight.is_contiguous())
        or not (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
        or not len(stride) == len(padding) == len(dilation) == spatial
    ):
        return None
    sizes = [
        (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1
        for d in range(spatial)
    ]
    return [x.shape[0], weight.shape[0], *sizes] if min((*sizes, *x.shape, *weight.shape)) > 0 else None
