"""Run the operator rules that users registered, and report a mistake in one as that of the rule."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.tracing.labels import Labels
from pruning.tracing.operation import Operation, OperatorRule
from pruning.utils.tree import tensors_among


class CheckedLabels(Labels):
    """The labels of a pass as one registered rule sees them.

    Labels that do not fit a tensor are refused: the channels that reach the operator are not pruned, and
    the reason names the operator and the rule.

    Args:
        labels: the labels of the pass, which this object reads and writes.
        op: the operation to which the rule is applied. rule: the registered rule.
    """

    __slots__ = ("op", "said")

    def __init__(self, labels: Labels, op: Operation, rule: OperatorRule):
        self.__dict__ = labels.__dict__
        self.op = op
        #: The rule, for messages.
        self.said = f"the rule registered for {op.name} ({getattr(rule, '__name__', type(rule).__name__)})"

    def put(self, tensor: object, labels: Tensor | None) -> None:
        """Set the labels of an output; refuse those that do not fit it."""
        problem = "" if labels is None else _misfit(tensor, labels)
        if not problem:
            return super().put(tensor, labels)
        self.refuse(f"{problem}; check what it gives to labels.put")
        if isinstance(tensor, Tensor):
            super().put(tensor, None)
        return None

    def tie(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Tie labels element by element; refuse shapes that pair every label of one with all of the other."""
        shape = torch.broadcast_shapes(left.shape, right.shape)
        if shape.numel() > max(left.numel(), right.numel()):
            return self.refuse(
                f"ties labels of shape {_shape(left)} to labels of shape {_shape(right)}, which pairs each "
                "with all others; view one so that its channels lie along the dimension of the other's"
            )
        return super().tie(left, right, self._told(reason))

    def fix(self, labels: Tensor | None, reason: str) -> None:
        """Exclude the channels of these labels from pruning."""
        super().fix(labels, self._told(reason))

    def fix_operands(self, name: str, operands: list[Tensor]) -> None:  # type: ignore[override]
        """Fix the channels that reach an operation to which the rule does not apply."""
        self.refuse("does not apply to its arguments; register a rule that does (replace=True)")

    def refuse(self, problem: str) -> None:
        """Fix the channels that reach the operator, because its rule has a problem."""
        for operand in self.op.operands:
            super().fix(self.of(operand), f"{self.where()}: {self.said} {problem}, to let it be pruned")

    def _told(self, reason: str) -> str:
        return f"{reason} (as {self.said} says; change this rule to let it be pruned)"


def run_registered(labels: Labels, op: Operation, rule: OperatorRule) -> None:
    """Apply a registered rule to an operation.

    Raises `PruningError`, with the rule and what it was given, where the rule raises an error.
    """
    checked, before = CheckedLabels(labels, op, rule), len(labels.found.fixed)
    try:
        rule(checked, op)
    except PruningError:
        raise
    except Exception as error:
        given = ", ".join(f"{_shape(labels.of(x))} of {_shape(x)}" for x in op.operands)
        raise PruningError(
            f"the channels that {labels.where()} uses in {op.name} could not be followed: "
            f"{type(error).__name__}: {error}. This is an error in a registered rule, {checked.said}, which "
            f"was given labels (of tensors): {given}; correct this rule"
        ) from error
    outputs = tensors_among((op.output,))
    is_silent = len(labels.found.fixed) == before and all(labels.carried(x) is None for x in outputs)
    if outputs and is_silent and not getattr(rule, "__module__", "").startswith("pruning."):
        checked.refuse(
            f"gives its output, of shape {_shape(outputs[0])}, no labels; call labels.put(operation.output, "
            f"found) with integers of shape {_expected(outputs[0])}, labels.fix where it mixes channels, or "
            "register pruning.tracing.operators.unlabeled where its output has none"
        )


def _misfit(tensor: object, labels: object) -> str:
    """Return why labels do not fit an output, as the end of a sentence; empty where they do."""
    if not isinstance(tensor, Tensor):
        return f"puts labels on a {type(tensor).__name__}, and not on each tensor of it"
    expected = f"for its output of shape {_shape(tensor)}; expected integers of shape {_expected(tensor)}"
    if not isinstance(labels, Tensor):
        return f"gives a {type(labels).__name__} in place of labels {expected}"
    sizes = zip(labels.shape, tensor.shape, strict=False)
    if labels.ndim != tensor.ndim or any(size not in (1, whole) for size, whole in sizes):
        return f"gives labels of shape {_shape(labels)} {expected}"
    if labels.dtype != torch.int64:
        return f"gives labels of type {str(labels.dtype).removeprefix('torch.')} {expected}"
    return ""


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _expected(tensor: Tensor) -> str:
    """Describe the shapes that labels of a tensor may have.

    >>> _expected(torch.zeros(2, 8, 1))
    '(1 or 2, 1 or 8, 1)'
    """
    sizes = ", ".join("1" if size == 1 else f"1 or {size}" for size in tensor.shape)
    return f"({sizes})"
