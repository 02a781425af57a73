"""From a model to its program: torch.export's core ATen graph, of which each node is lowered by a rule."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from pruning.demo.builder import Builder, Value
from pruning.demo.program import Program
from pruning.demo.rules import RULES, Lacking
from pruning.deploy.export import failure_reason
from pruning.deploy.runtimes import quiet
from pruning.errors import ExportError


def program_of(model: nn.Module, example: Tensor) -> Program:
    """The program of a model in eval mode, for a batch of one.

    Args:
        example: (1, ...), float32.

    Raises `ExportError` when the model cannot be traced or needs an operation for which there is no
    rule; it is named.
    """
    kind = type(model).__name__
    try:
        with quiet():
            exported = torch.export.export(model, (example,)).run_decompositions()
    except Exception as error:  # torch.export can fail in any way
        raise ExportError(f"{kind} cannot be traced by torch.export: {failure_reason(error)}") from error
    try:
        return _lowered(exported, example)
    except Lacking as lacking:
        raise ExportError(
            f"{kind} cannot become a list of operations: there is no rule for {lacking}; replace it in the "
            "model, or add a row to pruning.demo.rules.RULES"
        ) from None


def _lowered(exported: Any, example: Tensor) -> Program:
    builder = Builder()
    known: dict[str, Any] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            known[spec.arg.name] = Value(0, tuple(example.shape))
        else:
            stored = exported.state_dict
            known[spec.arg.name] = (stored if spec.target in stored else exported.constants)[spec.target]
    for node in exported.graph.nodes:
        if node.op == "output":
            found = pytree.tree_leaves(pytree.tree_map(lambda n: known[n.name], node.args))
            if len(found) != 1 or not isinstance(found[0], Value):
                raise Lacking(f"{len(found)} outputs; one tensor that depends on the input is expected")
            return Program(example.numel(), builder.constants, builder.ops, found[0].at)
        if node.op == "call_function":
            look = lambda n: known[n.name] if isinstance(n, torch.fx.Node) else n  # noqa: E731
            args, kwargs = pytree.tree_map(look, (node.args, node.kwargs))
            known[node.name] = _applied(builder, node, args, kwargs)
    raise AssertionError("a graph ends with its output")


def _applied(builder: Builder, node: Any, args: Any, kwargs: Any) -> Any:
    """What a node computes: a constant where nothing in it depends on the input."""
    target = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(target, torch._ops.OpOverload):
        raise Lacking(str(target))
    name = target._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise Lacking(f"{name}, which draws at random")
    if not any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((args, kwargs))):
        return target(*args, **kwargs)
    made = node.meta.get("val")
    first = made[0] if isinstance(made, list | tuple) else made
    if isinstance(first, Tensor) and first.dtype not in (torch.float32, torch.bool):
        raise Lacking(f"{name} of {str(first.dtype).removeprefix('torch.')}")
    if name in RULES:
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        return RULES[name](builder, shape, *args, **kwargs)
    if target.is_view and (name != "as_strided" or node.args[0].meta["val"].is_contiguous()):
        return builder.view(args[0], lambda x: target(x, *args[1:], **kwargs))
    raise Lacking(name)
