"""One operation of a forward pass, and the kinds of rules that carry labels through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch._ops import OpOverload

from pruning.tracing.labels import Labels, varying
from pruning.utils.tree import tensors_among


@dataclass
class Operation:
    """One operation as it ran.

    Attributes:
        func: torch's operator.
        args, kwargs: what it was called with.
        output: what it returned: a tensor, or several in a tuple or list.
    """

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @functools.cached_property
    def name(self) -> str:
        """The operator's name, without the namespace `aten` and the underscore of in-place forms."""
        return operator_name(self.func)

    @functools.cached_property
    def operands(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return tensors_among((self.args, self.kwargs))

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """The arguments by the names of the operator's schema, defaults included."""
        given = {}
        for i, argument in enumerate(self.func._schema.arguments):
            if i < len(self.args):
                given[argument.name] = self.args[i]
            elif argument.name in self.kwargs:
                given[argument.name] = self.kwargs[argument.name]
            elif argument.has_default_value():
                given[argument.name] = argument.default_value
        return given


def operator_name(func: OpOverload) -> str:
    """Return an operator's name as rules know it: `relu` for `aten::relu_`, `mine::blur` as it is."""
    return func._schema.name.removeprefix("aten::").rstrip("_")


#: Gives the outputs of an operation their labels, or fixes those of its operands.
OperatorRule: TypeAlias = Callable[[Labels, Operation], None]


def first_operand(rule: Callable[[Labels, Operation, Tensor], None]) -> OperatorRule:
    """Return an operator's rule for a function that also takes the labels of the first operand.

    Channels of the other operands are tied to those of the first where they lie in the same places (the
    indices of an unpooling), and fixed elsewhere (a grid to sample at).
    """

    @functools.wraps(rule)
    def full(labels: Labels, op: Operation) -> None:
        first = labels.of(op.operands[0])
        if first is None:
            return labels.fix_operands(op.name, op.operands)
        for other in op.operands[1:]:
            also = labels.of(other)
            if also is None or other is op.operands[0]:
                continue
            if varying(also) == varying(first) and also.shape == first.shape:
                reason = f"{labels.where()} uses it in {op.name} beside a tensor of fixed size"
                labels.tie(first, also, reason)
            else:
                labels.fix(also, f"{labels.where()} reads positions from it ({op.name})")
        return rule(labels, op, first)

    return full
