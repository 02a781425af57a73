"""Statistics over channels that a model's code computes itself, such as the mean square in an RMSNorm.

In a pruned model such a statistic is over the kept channels, as in torch's own norms. The masked model, to
which `pruning.surgery.verify` compares it, computes it over the kept channels, too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from pruning.graph.groups import PRODUCTS, Trace
from pruning.graph.plan import Plan
from pruning.surgery.multihead import MultiheadByProducts
from pruning.utils.fast_path import without_fast_path

#: Operators that compute a statistic over dimensions, which depends on no order of the elements.
REDUCTIONS = frozenset(
    ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "logsumexp",
     "norm", "linalg_vector_norm", "any", "all")
)  # fmt: skip

#: Operators whose output has the channels of their first operand, normalized by statistics over them.
NORMS = frozenset(("_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm", "_fused_rms_norm"))

#: Operators that compute over channels, and are told apart by the order of their calls.
_COUNTED = REDUCTIONS | NORMS | PRODUCTS

#: The module whose code calls an operator, the operator's name, and the number of this call.
Place = tuple[str, str, int]


def operator_name(func: OpOverload) -> str:
    """Return the name under which rules are listed: `relu` for `aten::relu_`, `mine::blur` unchanged."""
    return func._schema.name.removeprefix("aten::").rstrip("_")


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Let torch compute attention by products and softmax, not by kernels that do both."""
    with without_fast_path(), sdpa_kernel(SDPBackend.MATH), MultiheadByProducts():
        yield


class CallCounter:
    """Number the calls of `REDUCTIONS`, `NORMS` and `PRODUCTS` by the module whose code calls them."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()

    def place(self, module: str, func: OpOverload) -> Place | None:
        """Return the place of a call that runs now; None for other operators."""
        name = operator_name(func)
        if name not in _COUNTED:
            return None
        self._calls[module, name] += 1
        return module, name, self._calls[module, name] - 1


class StatisticsOverKept(TorchDispatchMode):
    """Let a model compute its statistics and products over channels without those that a plan drops.

    Products of attention are those of torch's plain functions (`plain_attention`), so that they can be told
    apart. Outputs that have these channels are 0 at the dropped ones.

    Args:
        model: the dense model; its modules are hooked for the block.
        trace, plan: of this model.
    """

    def __init__(self, model: nn.Module, trace: Trace, plan: Plan):
        super().__init__()
        self.model, self.dropped = model, dropped_from_statistics(trace, plan)
        self.calls, self.path, self.handles = CallCounter(), [""], list[RemovableHandle]()
        self.plain = contextlib.ExitStack()

    def __enter__(self) -> StatisticsOverKept:
        for name, module in self.model.named_modules() if self.dropped else ():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            self.handles += [
                module.register_forward_pre_hook(self._enter(name), prepend=True),
                module.register_forward_hook(self._leave),
            ]
        if not self.dropped:
            return self
        self.plain.enter_context(plain_attention())
        return super().__enter__()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.path.append(name)

    def _leave(self, *_: object) -> None:
        self.path.pop()

    def __exit__(self, *error: object) -> None:
        if not self.dropped:
            return
        super().__exit__(*error)
        self.plain.close()
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        place = self.calls.place(self.path[-1], func)
        if place not in self.dropped:
            return func(*args, **(kwargs or {}))
        dim, drop = self.dropped[place]
        operand = args[-2] if place is not None and place[1] in PRODUCTS else args[0]
        keep = torch.ones(operand.shape[dim], dtype=torch.bool)
        keep[drop] = False
        return _run_over(keep.nonzero().flatten().to(args[0].device), dim, func, args, kwargs or {})


def _run_over(
    keep: Tensor, dim: int, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run an operator on the kept positions of its first operand."""
    x, *others = args
    name = operator_name(func)
    if name in PRODUCTS:
        *added, left, right = args
        summed = right.index_select(right.ndim - 2, keep)
        return func(*added, left.index_select(left.ndim - 1, keep), summed, **kwargs)
    if name in ("native_layer_norm", "_fused_rms_norm"):  # (x, normalized shape, weight, bias, …)
        others = [
            [*others[0][:-1], len(keep)],
            *(t.index_select(-1, keep) if isinstance(t, Tensor) else t for t in others[1:]),
        ]
    output = func(x.index_select(dim, keep), *others, **kwargs)
    if name in REDUCTIONS:
        return output
    first = output[0] if isinstance(output, tuple) else output
    whole = x.new_zeros(x.shape, dtype=first.dtype).index_copy(dim, keep, first)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def dropped_from_statistics(trace: Trace, plan: Plan) -> dict[Place | None, tuple[int, Tensor]]:
    """Return by place the dimension and the positions that a plan removes from a statistic."""
    found: dict[Place | None, tuple[int, list[Tensor]]] = {}
    for name, kept in plan.keep.items():
        group = trace.groups[name]
        drop = group.dropped(kept)
        for reduction in group.reductions if drop.any() else ():
            entry = found.setdefault(reduction.place, (reduction.dim, []))
            entry[1].append(reduction.index[drop[reduction.channel]])
    return {place: (dim, torch.cat(positions)) for place, (dim, positions) in found.items()}
