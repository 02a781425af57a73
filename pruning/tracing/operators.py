"""Rules that pass channel labels through operators, and the table of these rules.

A rule takes the labels of the pass and one operation. It gives labels to the operation's outputs, or
fixes channels with a reason. Operators without a rule fix the channels that reach them.
"""

from __future__ import annotations

import difflib
import functools
from collections import OrderedDict

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.tracing.assignment import accumulate, assign, put_indexed
from pruning.tracing.elementwise import labels_of_all, pointwise
from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.movement import (
    as_complex,
    as_real,
    channel_shuffle,
    index,
    move,
    pad,
    pixel_shuffle,
    restride,
    shift,
    split,
    unfold_patches,
    view,
)
from pruning.tracing.operation import Operation, OperatorRule, first_operand
from pruning.tracing.registered import run_registered
from pruning.tracing.reshapes import RESHAPES
from pruning.tracing.statistics import batch_norm, layer_norm, reduction, softmax
from pruning.tracing.ties import NONE, compact, spread, varying, vector_along
from pruning.tracing.weights import GROUPED, batched, convolution, grouped, lookup, product

# --- several tensors ------------------------------------------------------------------------


def join(labels: Labels, op: Operation) -> None:
    """Concatenate or stack tensors."""
    rank = op.output.ndim
    dim = (op.given.get("dim") or 0) % rank
    pieces = [t for t in op.operands if t.numel() or t.ndim == rank]
    stacked = rank > max(t.ndim for t in op.operands)  # `cat` takes empty vectors beside tensors of any rank
    found = [labels.of(piece) for piece in pieces]
    if any(map(labels.is_composite, found)):
        return join_grids(labels, op, pieces, dim, stacked)
    if not stacked and any(dim in varying(x) for x in found):
        found = [labels.of_or_uniform(piece, dim) for piece in pieces]
    if stacked:
        found = [None if x is None else x.unsqueeze(dim) for x in found]
    sizes = [1 if stacked else piece.shape[dim] for piece in pieces]
    if any(varying(x) and dim not in varying(x) for x in found):
        joins = f"{labels.where()} joins its positions with channels"
        found = [  # tokens of a table, such as registers, among tokens that hold channels
            labels.tie_positions(x, [dim], joins)
            if x is not None and labels.tables.hold(x) and dim in varying(x) and len(varying(x)) > 1
            else x
            for x in found
        ]
    across = next((x for x in found if x is not None and set(varying(x)) - {dim}), None)
    if across is None:
        column = [
            torch.full([size], NONE) if x is None else vector_along(x, dim, size)
            for x, size in zip(found, sizes, strict=True)
        ]
        return labels.put(op.output, spread(torch.cat(column), rank, dim))
    for piece, x in zip(pieces, found, strict=True):
        if x is None:
            labels.fix(across, f"{labels.where()} joins it with a tensor of fixed size")
        elif dim in varying(x) or varying(x) != varying(across):
            for each in (across, x):
                labels.fix(each, f"{labels.where()} joins it with channels along another dimension")
        elif x is not across and piece.numel():
            labels.tie(across, x, f"{labels.where()} joins it with a tensor of fixed size")
    return labels.put(op.output, across if dim not in varying(across) else None)


def join_grids(labels: Labels, op: Operation, pieces: list[Tensor], dim: int, stacked: bool) -> None:
    """Concatenate or stack tensors whose channels lie along several dimensions."""
    joins = f"{labels.where()} joins it with a tensor of fixed size"
    found = [labels.of(piece) for piece in pieces]
    vectors = [labels.vectors(x) for x in found]
    for d in sorted({d for each in vectors for d in each}):
        if d == dim and not stacked:
            continue
        held = [each[d] for each in vectors if d in each]
        for each in held[1:]:
            labels.tie(held[0], each, joins)
        if len(held) < len(pieces):
            labels.fix(held[0], joins)
    if not stacked and not any(dim in each for each in vectors):
        made = {d: vector for each in reversed(vectors) for d, vector in each.items()}
        return labels.put(op.output, labels.compose(made, op.output.ndim))
    shape = op.output.shape
    full = [
        (torch.full([1] * piece.ndim, NONE) if x is None else x).expand(piece.shape)
        for x, piece in zip(found, pieces, strict=True)
    ]
    joined = torch.stack(full, dim) if stacked else torch.cat(full, dim)
    assert joined.shape == shape
    return labels.put(op.output, compact(joined))


# --- the first tensor's channels ------------------------------------------------------------


@first_operand
def same(labels: Labels, op: Operation, first: Tensor) -> None:
    """Give the output the labels of the first tensor."""
    labels.put(op.output[0] if isinstance(op.output, tuple) else op.output, first)


@first_operand
def unlabeled(labels: Labels, op: Operation, first: Tensor) -> None:
    """Make a tensor without channels, such as `new_empty`."""
    labels.put(op.output, None)


@first_operand
def spatial(labels: Labels, op: Operation, first: Tensor) -> None:
    """Pool or resize the dimensions after the batch and the channels."""
    if over := [d for d in varying(first) if d > 1]:
        labels.fix_along(first, over, f"{labels.where()} pools or resizes over its channels ({op.name})")
        if not labels.is_grid(first):
            return
    for leaf in pytree.tree_leaves(op.output):
        labels.put(leaf, first)
    return


@first_operand
def regions(labels: Labels, op: Operation, first: Tensor) -> None:
    """Pool regions of interest: each output has the channels of its image."""
    if varying(first) not in ([], [1]):
        return labels.fix(first, f"{labels.where()} cuts regions out along its channels ({op.name})")
    for leaf in pytree.tree_leaves(op.output):
        labels.put(leaf, first)
    return None


@first_operand
def gated(labels: Labels, op: Operation, first: Tensor) -> None:
    """Apply GLU: tie each channel of the first half to its gate in the second half."""
    dim = op.given["dim"] % first.ndim
    if dim in varying(first):
        first, gates = first.chunk(2, dim)
        labels.tie(first, gates, FIXED_SIZE)
    labels.put(op.output, first)


# --- the table ------------------------------------------------------------------------------

#: Prefixes of the names of pooling and resizing operators.
SPATIAL = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "reflection_pad",
    "replication_pad", "fractional_max_pool", "max_unpool", "grid_sampler",
)  # fmt: skip

#: By the name of the operator. Those that torch tags as pointwise or as reductions need no entry.
RULES: dict[str, OperatorRule] = {
    **dict.fromkeys(
        ("masked_fill", "where", "lerp", "addcmul", "addcdiv", "threshold", "rrelu_with_noise", "hardswish",
         "_prelu_kernel"), pointwise
    ),
    **dict.fromkeys(("cat", "stack", "concat"), join),
    **dict.fromkeys(("bmm", "baddbmm"), batched),
    **dict.fromkeys(("mm", "addmm"), product),
    **dict.fromkeys(GROUPED, grouped),
    "convolution": convolution,
    "embedding": lookup,
    **dict.fromkeys(RESHAPES, view),
    **dict.fromkeys(
        ("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "repeat", "unfold", "flip",
         "pixel_unshuffle", "diagonal"), move
    ),
    **dict.fromkeys(
        ("slice", "select", "split", "split_with_sizes", "unbind", "narrow", "unsafe_split",
         "unsafe_chunk", "chunk"), split
    ),
    **dict.fromkeys(("roll", "index_select", "cumsum", "sort", "topk", "gather"), shift),
    **dict.fromkeys(("index_add", "scatter_add", "index_reduce", "scatter_reduce"), accumulate),
    "copy": assign,
    **dict.fromkeys(("index_put", "_index_put_impl"), put_indexed),
    **dict.fromkeys(
        ("alias", "log_sigmoid_forward", "detach", "clone", "_to_copy", "lift_fresh", "contiguous",
         "native_dropout", "bernoulli", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
         "randn_like", "zero", "fill"), same
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod",
         "logsumexp", "norm", "linalg_vector_norm", "argmax", "argmin", "any", "all", "median"), reduction
    ),
    **dict.fromkeys(("new_empty", "new_empty_strided"), unlabeled),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), batch_norm),
    "constant_pad_nd": pad,
    "index": index,
    "as_strided": restride,
    "pixel_shuffle": pixel_shuffle,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "im2col": unfold_patches,
    **dict.fromkeys(("torchvision::roi_align", "torchvision::roi_pool"), regions),
    "glu": gated,
}  # fmt: skip

#: Rules that users added, by the id of their handle.
_REGISTERED: OrderedDict[int, tuple[str, OperatorRule]] = OrderedDict()


def _require_operator(name: str) -> None:
    """Raise `PruningError` if torch has no operator of this name."""
    space, _, operator = name.partition("::") if "::" in name else ("aten", "", name)
    space_of = getattr(torch.ops, space)
    if not hasattr(space_of, operator.partition(".")[0]):
        near = difflib.get_close_matches(operator, dir(space_of), 1)
        hint = f"; did you mean {space}::{near[0]}?" if near else ""
        raise PruningError(
            f"torch has no operator {name!r}: give the name under which torch.library defined it, with its "
            f"namespace, and define it first{hint}"
        )


def register_operator(name: str, rule: OperatorRule, *, replace: bool = False) -> RemovableHandle:
    """Tell the toolkit how channels pass through an operator, such as a custom one of `torch.library`.

    An existing rule often fits: `pointwise` (elementwise, any number of tensors), `same` (the output has
    the channels of the first tensor at the same places), `spatial` (pooling, resizing), `reduction`. A
    rule of your own takes the `Labels` of the pass and the `Operation`: it reads the labels of operands
    (`labels.of`), then ties them (`labels.tie`), fixes them (`labels.fix`) or passes them on
    (`labels.put`). `prune` compares its result with the masked model, and so detects a wrong rule.

    Args:
        name: the operator's name with its namespace, `mine::blur`; for torch's own (`aten`) without it.
        rule: called each time the operator runs on a tensor with channels.
        replace: whether to replace a rule that the operator already has.

    Returns a handle: its method `remove`, or the end of a `with` block, removes the rule.
    Raises `PruningError` for a name that no operator has, for a rule that is not callable, and for an
    operator that already has a rule.

    >>> @torch.library.custom_op("pruning_example::halve", mutates_args=())
    ... def halve(x: Tensor) -> Tensor:
    ...     return x / 2
    >>> _ = halve.register_fake(torch.empty_like)
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    ...     def forward(self, x):
    ...         return self.last(halve(self.first(x)))
    >>> from pruning import trace
    >>> trace(Net(), torch.randn(2, 4)).widths
    {}
    >>> with register_operator("pruning_example::halve", pointwise):
    ...     trace(Net(), torch.randn(2, 4)).widths
    {'first': 8}
    """
    if not isinstance(name, str) or not name.replace("::", "", 1).replace(".", "").isidentifier():
        raise PruningError(f"{name!r} is not an operator name; give one such as 'mine::blur'")
    if not callable(rule):
        raise PruningError(
            f"the rule for {name} is a {type(rule).__name__}; give a function (labels, operation)"
        )
    _require_operator(name)
    name = name.removeprefix("aten::").rstrip("_")
    if not replace and rule_for(name) is not None:
        raise PruningError(f"operator {name!r} has a rule already; pass replace=True to replace it")
    handle = RemovableHandle(_REGISTERED)
    _REGISTERED[handle.id] = name, rule
    return handle


def registered_operators() -> list[str]:
    """Return the names of the operators that have a registered rule."""
    return list(dict.fromkeys(name for name, _ in _REGISTERED.values()))


def rule_for(name: str) -> OperatorRule | None:
    """Return the rule for an operator: registered, of `RULES`, or by torch's tags; None if there is none."""
    return _registered_rule(name) or RULES.get(name) or _rule_by_kind(name)


def _registered_rule(name: str) -> OperatorRule | None:
    return next((rule for known, rule in reversed(_REGISTERED.values()) if known == name), None)


@functools.cache
def _rule_by_kind(name: str) -> OperatorRule | None:
    if name.lstrip("_").startswith(SPATIAL):
        return spatial
    if _has_tag(name, "pointwise"):
        return pointwise
    return reduction if _has_tag(name, "reduction") else None


def _has_tag(name: str, tag: str) -> bool:
    """Whether any overload of an operator has a tag in torch; older versions lack some tags."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return any(str(each) == f"Tag.{tag}" for overload in overloads for each in overload.tags)


def follow(labels: Labels, op: Operation) -> None:
    """Give labels to the outputs of an operation, or fix those of its operands."""
    rule = rule_for(op.name)
    if rule is None:
        labels.fix_operands(op.name, op.operands)
        return
    run = functools.partial(run_registered, rule=rule) if rule is _registered_rule(op.name) else rule
    if rule is not pointwise:
        for table in (t for t in op.operands if labels.tables.others(t)):
            if len(op.operands) == 1 and isinstance(op.output, Tensor):
                _follow_tables(labels, op, run, labels_of_all(labels, table))
                return
            for other in labels.tables.others(table):
                labels.fix(other, f"{labels.where()} uses a sum of tensors outside layers in {op.name}")
    run(labels, op)


def _follow_tables(labels: Labels, op: Operation, rule: OperatorRule, tables: list[Tensor]) -> None:
    """Apply a rule to each of the tables of which the operand is the sum."""
    made = []
    for each in tables:
        labels.put(op.operands[0], each)
        rule(labels, op)
        made.append(labels.of(op.output))
    held = [found for found in made if found is not None]
    labels.put(op.operands[0], tables[0])
    labels.tables.put_others(op.operands[0], tables[1:])
    labels.put(op.output, next(iter(held), None))
    labels.tables.put_others(op.output, held[1:])
