"""Running a model for its shapes alone: on the meta device nothing is stored or computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.utils.modules import copied

T = TypeVar("T")

#: Elementwise operations whose result is like their first operand.
_SAME_SHAPE = frozenset(
    f"aten::{name}{place}"
    for name in (
        "add", "sub", "mul", "div", "relu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "silu", "gelu",
        "tanh", "leaky_relu", "elu", "mish", "clamp", "clamp_min", "exp", "sqrt", "rsqrt", "neg", "abs",
        "threshold_backward",
    )
    for place in ("", "_")
)  # fmt: skip


def without_computing(run: Callable[[nn.Module, Any], T], model: nn.Module, inputs: Any) -> T:
    """What `run(copy of the model, inputs)` gives, computing nothing where that is possible.

    A model that looks at values (a data-dependent branch, `.item()`) runs on its own device
    only; it then does. Whatever it raises there is raised.
    """
    try:
        return run(on_meta(model), pytree.tree_map(to_meta, inputs))
    except Exception:  # of a foreign model: the second run tells whether it is at fault
        return run(copied(model), pytree.tree_map(_detached, inputs))


def without_storage(model: nn.Module, run: Callable[[nn.Module, Any], Any], inputs: Any) -> tuple[Any, Any]:
    """A model and its inputs on the meta device if they run there, else as they are."""
    probe, example = on_meta(model), pytree.tree_map(to_meta, inputs)
    try:
        with torch.no_grad():
            run(probe.eval(), example)
    except Exception:  # of a model that looks at values
        return model, inputs
    return probe, example


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without storage: shapes alone."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = to_meta(tensor)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copied(model, memo, to_meta)


def to_meta(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


class Shapes(TorchDispatchMode):
    """Spares a model on the meta device torch's bookkeeping for its most common operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operation(func, args, kwargs or {})


def run_operation(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives; on the meta device, for the most common ones, just its shape.

    torch takes BatchNorm, for one, apart into ten operations there, which would be most of
    the time of a pass.
    """
    x = args[0] if args else None
    if not (isinstance(x, Tensor) and x.is_meta and x.is_floating_point()):
        return func(*args, **kwargs)
    name = func._schema.name
    if name in _SAME_SHAPE:
        other = args[1] if len(args) > 1 else None
        if not isinstance(other, Tensor) or (other.shape == x.shape and other.dtype == x.dtype):
            return x if name.endswith("_") else torch.empty_like(x)
    if (
        name == "aten::native_batch_norm"
        and x.ndim > 1
        and all(t is None or t.shape == x.shape[1:2] for t in args[1:5])
    ):
        return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
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
    return func(*args, **kwargs)
