"""Lower a model to a program: apply one rule to each node of torch.export's core ATen graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from pruning.demo.builder import Builder, UnsupportedOperation, Value
from pruning.demo.program import Program
from pruning.demo.rules import RULES
from pruning.deploy.export import failure_reason
from pruning.deploy.runtimes import quiet
from pruning.errors import ExportError
from pruning.utils.wording import number_of


def program_of(model: nn.Module, example: Tensor) -> Program:
    """Return the program of a model for a batch of one.

    Args:
        model: the model, in eval mode.
        example: an input (1, ...), float32.

    Raises:
        ExportError: If the model cannot be traced, or has an operation without a rule. The message names
            the operation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pruning.demo.lowering import program_of
        >>> program = program_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.zeros(1, 4))
        >>> [op.loop.kind for op in program.ops]
        ['conv', 'map']
    """
    name = type(model).__name__
    try:
        with quiet():
            exported = torch.export.export(model, (example,)).run_decompositions()
    except Exception as error:  # torch.export can fail in any way
        raise ExportError(
            f"{name} cannot be traced by torch.export: {failure_reason(error)}; change this code of the model"
        ) from error
    try:
        return _lower(exported, example)
    except UnsupportedOperation as unsupported:
        raise ExportError(
            f"{name} cannot be lowered to a program: there is no rule for {unsupported}; replace it in the "
            "model, or add a rule to pruning.demo.rules.RULES"
        ) from None


def _lower(exported: ExportedProgram, example: Tensor) -> Program:
    """Return the program of an exported graph whose single output depends on the input."""
    builder = Builder()
    known: dict[str, object] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            known[spec.arg.name] = Value(0, tuple(example.shape))
        elif spec.target in exported.state_dict:
            known[spec.arg.name] = exported.state_dict[spec.target]
        else:
            known[spec.arg.name] = exported.constants[str(spec.target)]

    def resolve(argument: object) -> object:
        return known[argument.name] if isinstance(argument, torch.fx.Node) else argument

    for node in exported.graph.nodes:
        args, kwargs = pytree.tree_map(resolve, (node.args, node.kwargs))
        if node.op == "call_function":
            known[node.name] = _apply(builder, node, args, kwargs)
        elif node.op == "output":
            leaves = pytree.tree_leaves(args)
            if len(leaves) != 1 or not isinstance(leaves[0], Value):
                raise UnsupportedOperation(
                    f"{number_of(len(leaves), 'output')}; one tensor that depends on the input is expected"
                )
            return Program(example.numel(), builder.constants, builder.ops, leaves[0].number)
    raise AssertionError("a graph ends with its output")


def _apply(builder: Builder, node: torch.fx.Node, args: Sequence, kwargs: Mapping[str, object]) -> object:
    """Return the result of a node: a value, or a constant if no argument depends on the input."""
    target = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(target, torch._ops.OpOverload):
        raise UnsupportedOperation(str(target))
    name = target._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise UnsupportedOperation(f"{name}, which draws random numbers")
    if not any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((args, kwargs))):
        return target(*args, **kwargs)
    result = node.meta.get("val")
    first = result[0] if isinstance(result, list | tuple) else result
    if isinstance(first, Tensor) and first.dtype not in (torch.float32, torch.bool):
        raise UnsupportedOperation(f"{name} of {str(first.dtype).removeprefix('torch.')}")
    if name in RULES:
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        return RULES[name](builder, shape, *args, **kwargs)
    if target.is_view and (name != "as_strided" or _contiguous(node.args[0])):
        return builder.views(args[0], lambda x: target(x, *args[1:], **kwargs))
    raise UnsupportedOperation(name)


def _contiguous(argument: object) -> bool:
    return isinstance(argument, torch.fx.Node) and argument.meta["val"].is_contiguous()
