"""One operation of a forward pass, and the kinds of rules that carry labels through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch._ops import OpOverload

from pruning.surgery.statistics import operator_name
from pruning.tracing.labels import Labels
from pruning.tracing.ties import varying
from pruning.utils.tree import tensors_among


@dataclass
class Operation:
    """One operation as it ran.

    Attributes:
        func: torch's operator.
        args, kwargs: its arguments.
        output: its result: a tensor, or a tuple or list of tensors.
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


#: Gives the outputs of an operation their labels, or fixes those of its operands.
OperatorRule: TypeAlias = Callable[[Labels, Operation], None]


def first_operand(rule: Callable[[Labels, Operation, Tensor], None]) -> OperatorRule:
    """Decorate a function that also takes the labels of the first operand, and return an operator's rule.

    Channels of the other operands are tied to those of the first if they lie along the same dimension
    with the same size (the indices of an unpooling), and fixed otherwise (a grid to sample at).
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


@functools.cache
def shares_memory(func: OpOverload) -> bool:
    """Whether an operation writes to an argument, or returns a view of one."""
    return any(argument.alias_info for argument in func._schema.arguments)


@functools.cache
def writes(func: OpOverload) -> bool:
    """Whether an operation writes to an argument."""
    return any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
