"""Rules for products and convolutions whose weight is a parameter of the module that calls them.

A module that multiplies by its own parameter (`torch.addmm(self.bias, x, self.weight)`) is a weighted layer
whose rule is inferred: `x` has the input channels, the result the output channels.
"""

from __future__ import annotations

from torch import Tensor

from pruning.graph.inferred import infer_rule, inferred_rule
from pruning.graph.layers import rule_for
from pruning.graph.rule import Rule, Side
from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.operation import Operation
from pruning.tracing.products import product_of_activations
from pruning.tracing.ties import spread, varying, vector_along

#: Operators that may multiply by a weight of the module that calls them.
WEIGHTED = frozenset(("mm", "addmm", "convolution"))


def product(labels: Labels, op: Operation) -> None:
    """Multiply a matrix by a weight (mm, addmm, bmm of an expanded weight)."""
    bias = op.given.get("self") if op.name == "addmm" else None
    left, right = op.operands[-2:]
    for x, weight, read, made in ((left, right, 0, 1), (right, left, 1, 0)):
        dim = 1 if weight is right else 0
        if _weighted(labels, op, (x, weight, bias), (read, made), dim):
            return None
    if op.name == "mm" and all(
        labels.of(x) is not None and labels.weights.find(x) is None for x in (left, right)
    ):
        return product_of_activations(labels, op, left, right)
    reason = (
        f"{labels.where()} multiplies it by a matrix ({op.name}) that is no weight of a layer alone; put the "
        "weight into a layer of torch to let it be pruned"
    )
    for operand in op.operands:
        labels.fix(labels.of(operand), reason)
    return None


def convolution(labels: Labels, op: Operation) -> None:
    """Convolve with a weight of the module, or each channel with a fixed kernel of its own."""
    x, weight, bias = (op.given[key] for key in ("input", "weight", "bias"))
    dim, transposed = 1, op.given["transposed"]
    if op.given["groups"] == x.shape[1] > 1 and not transposed:
        return _depthwise(labels, op, x, weight, bias)
    if op.given["groups"] == 1:
        read, made = (0, 1) if transposed else (1, 0)
        if _weighted(labels, op, (x, weight, bias), (read, made), dim):
            return None
    reason = (
        f"{labels.where()} convolves it with a weight that is no parameter of a layer alone, or in groups; "
        "put the weight into nn.Conv2d (or the like) to let it be pruned"
    )
    for operand in op.operands:
        labels.fix(labels.of(operand), reason)
    return None


def _depthwise(labels: Labels, op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Convolve every channel with its own kernel: tie the kernels to the channels."""
    arriving = labels.of(x)
    many, each = len(weight) // x.shape[1], f"{labels.where()} convolves each of its channels by a kernel"
    if arriving is None or varying(arriving) != [1]:
        for operand in op.operands:
            labels.fix(labels.of(operand), f"{each}, beside a tensor of fixed size")
        return
    vector = vector_along(arriving, 1, x.shape[1]).repeat_interleave(many)
    labels.note_sizes(arriving, arriving)  # the number of groups, or the size of an expanded kernel
    for own in (weight, bias):
        if own is None:
            continue
        found = labels.of(own)
        if found is not None and varying(found) and 0 in varying(found):
            labels.tie(spread(vector, own.ndim, 0), found, FIXED_SIZE)
        elif found is None and own.stride(0) != 0 and not labels.is_uniform(own):
            labels.fix(arriving, f"{each}, which is a tensor of fixed size")
    labels.put(op.output, spread(vector, op.output.ndim, 1))


def _weighted(
    labels: Labels,
    op: Operation,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    dims: tuple[int, int],
    dim: int,
) -> bool:
    """Follow a product with a weight of a module; return whether it is one.

    Args:
        tensors: the activations, the weight, the bias. dims: the dimensions of the weight that are read
            and made. dim: the dimension of the activations and the output along which channels lie.
    """
    x, weight, bias = tensors
    place = labels.weights.find(weight)
    if place is None or not place.module:  # the model as a whole is no layer
        return False
    read, made = (place.dims.get(d) for d in dims)
    module = labels.weights.modules[place.module]
    if read is None or made is None:
        return False
    own_bias = labels.weights.find(bias) if bias is not None else None
    if bias is not None and (own_bias is None or own_bias.module != place.module):
        return False
    rule = Rule(
        {place.attribute: made} | ({own_bias.attribute: 0} if own_bias is not None else {}),
        {place.attribute: read},
        kind="weighted",
    )
    if rule_for(module) is not None and inferred_rule(type(module)) is None:
        return False  # code reads the weight of a layer of the table
    if not infer_rule(type(module), rule, labels.weights.inferred):
        return False
    arriving = labels.of(x)
    if set(varying(arriving)) - {dim % x.ndim}:
        labels.fix(arriving, f"its channels do not lie along the dimension that {labels.where()} reads")
        arriving = None
    end = dim - x.ndim
    sides: dict[Side, Tensor] = {side: labels.side(place.module, module, side, end) for side in ("in", "out")}
    if arriving is not None:
        vector = vector_along(arriving, dim, x.shape[dim])
        labels.tie(vector, sides["in"], f"{labels.where()} also reads positions of fixed size")
    labels.note_weighted(place.module, op.output.numel() / sides["out"].numel(), weight.numel())
    labels.put(op.output, spread(sides["out"], op.output.ndim, dim))
    return True
