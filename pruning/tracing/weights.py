"""Rules for products and convolutions whose weight is a parameter of the module that calls them.

A module that multiplies by its own parameter (`torch.addmm(self.bias, x, self.weight)`) is a weighted layer
whose rule is inferred: `x` has the input channels, the result the output channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from pruning.graph.inferred import infer_rule, inferred_rule
from pruning.graph.layers import is_depthwise, is_read_by_parent, parts, rule_for
from pruning.graph.rule import Rule, Side
from pruning.tracing.computed_weights import (
    computed_convolution,
    computed_product,
    note_macs,
    product_of_parameters,
)
from pruning.tracing.labels import FIXED_SIZE, Labels
from pruning.tracing.operation import Operation
from pruning.tracing.parameter_views import ParameterView
from pruning.tracing.products import AxesNeeded, batched_product, product_of_activations
from pruning.tracing.ties import spread, varying, vector_along
from pruning.utils.held_weight import held_weight

#: Operators that multiply each group of rows by a matrix of its own, as the experts of a mixture.
GROUPED = frozenset(("_grouped_mm", "transformers::grouped_mm_fallback"))

#: Bytes of which torch's grouped product wants the rows of its operands to be a multiple.
_ALIGNED = 16

#: Operators that may multiply by a weight of the module that calls them.
WEIGHTED = GROUPED | {"mm", "addmm", "bmm", "convolution", "embedding"}


def product(labels: Labels, op: Operation) -> None:
    """Multiply a matrix by a weight (mm, addmm, bmm of an expanded weight)."""
    bias = op.given.get("self") if op.name == "addmm" else None
    left, right = op.operands[-2:]
    if product_of_parameters(labels, op):
        return None
    for x, weight, read, made in ((left, right, 0, 1), (right, left, 1, 0)):
        dim = 1 if weight is right else 0
        if _weighted(labels, op, (x, weight, bias), (read, made), dim):
            return None
    if computed_product(labels, op):
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


def batched(labels: Labels, op: Operation) -> None:
    """Multiply batches of matrices; a batch of one, as `torch.einsum` makes it, may hold a weight."""
    left, right = op.operands[-2:]
    if product_of_parameters(labels, op):
        return
    if op.name == "bmm" and len(left) == 1:
        for x, weight, dims, dim in ((left, right, (1, 2), 2), (right, left, (2, 1), 1)):
            if _weighted(labels, op, (x, weight, None), dims, dim):
                return
    if computed_product(labels, op):
        return
    if any(labels.of(t) is not None for t in op.operands):
        batched_product(labels, op)


def grouped(labels: Labels, op: Operation) -> None:
    """Multiply groups of rows by the matrices of one weight, (groups, in, out): all have the same widths."""
    x, weight = op.operands[:2]
    if x.ndim == 2 and weight.ndim == 3:
        macs = float(op.output.numel() * x.shape[-1])
        labels.found.other_macs += macs  # torch counts none
        if _weighted(labels, op, (x, weight, None), (1, 2), 1, len(weight)):
            multiple = max(1, _ALIGNED // x.element_size())
            rows = [labels.of(x)] + [labels.of(op.output)] * (weight.stride(2) == 1)
            labels.found.aligned += [(held.numpy().ravel(), multiple) for held in rows if held is not None]
            return
        labels.found.other_macs -= macs
    labels.fix_operands(op.name, op.operands)


def lookup(labels: Labels, op: Operation) -> None:
    """Look up rows of a parameter (F.embedding), which is then a layer of its own."""
    place = labels.weights.find(op.given["weight"])
    if place is None or place.dims.get(1) != 1:
        return labels.fix_operands(op.name, op.operands)
    layer = held_weight(labels.weights.modules[place.module], place.attribute)
    if not infer_rule(type(layer), Rule({"weight": 1}, kind="embedding"), labels.weights.inferred):
        return labels.fix_operands(op.name, op.operands)
    made = labels.side(place.full_name, layer, "out", -1)
    labels.found.uses.setdefault(place.full_name, (0.0, 0.0))
    labels.found.calls[place.full_name] += 1
    return labels.put(op.output, spread(made, op.output.ndim, -1))


def convolution(labels: Labels, op: Operation) -> None:
    """Convolve with a weight of the module, or each channel with a fixed kernel of its own."""
    x, weight, bias = (op.given[key] for key in ("input", "weight", "bias"))
    dim, transposed = 1, op.given["transposed"]
    if op.given["groups"] == x.shape[1] > 1 and not transposed:
        return _depthwise(labels, op, x, weight, bias)
    images = labels.of(x)
    if images is not None and x.shape[1] == op.output.shape[1] == 1 and varying(images) == [0]:
        note_macs(labels, op, vector_along(images, 0, len(x)))  # each channel is an image of its own
        return labels.put(op.output, images)
    if op.given["groups"] == 1:
        read, made = (0, 1) if transposed else (1, 0)
        if _weighted(labels, op, (x, weight, bias), (read, made), dim):
            return None
    if computed_convolution(labels, op):
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
    note_macs(labels, op, vector)
    labels.put(op.output, spread(vector, op.output.ndim, 1))


def _weighted(
    labels: Labels,
    op: Operation,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    dims: tuple[int, int],
    dim: int,
    groups: int = 1,
) -> bool:
    """Follow a product with a weight of a module; return whether it is one.

    Args:
        tensors: the activations, the weight, the bias. dims: the dimensions of the weight that are read
            and made. dim: the dimension of the activations and the output along which channels lie.
        groups: number of matrices in the weight, one of which multiplies each row.
    """
    x, weight, bias = tensors
    place = labels.weights.find_part(weight)
    if place is None or place.full_name in labels.found.composed:
        return False
    read, made = (place.dims.get(d) for d in dims)
    module = labels.weights.modules[place.module]
    if read is None or made is None:
        return False
    if place.spans and place.spans[made] > 1 and place.full_name not in labels.found.divided:
        labels.found.spanned.add(place.full_name)  # this pass tells whether it mixes several weights into one
        return False
    own_bias = labels.weights.find_part(bias) if bias is not None else None
    elsewhere = bias is not None and (
        own_bias is None or own_bias.module != place.module or own_bias.positions(0) != place.positions(made)
    )
    if not place.module or elsewhere or groups > 1 or place.spans or not _is_one_layer(module):
        return _held(labels, op, tensors, (read, made), dim, groups)
    biases = {own_bias.attribute: 0} if own_bias is not None else {}
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
        biases = {"in_proj_bias": 0}  # also where the code adds it later
    rule = Rule({place.attribute: made} | biases, {place.attribute: read}, kind="weighted")
    known = rule_for(module)
    if known is not None and inferred_rule(type(module)) is None:
        parent = labels.weights.modules[place.module.rpartition(".")[0]]
        held = known.out.get(place.attribute), known.into.get(place.attribute)
        if not is_read_by_parent(parent, module) or held != (made, read):
            return _held(labels, op, tensors, (read, made), dim)  # code reads the weight of a layer
    elif not infer_rule(type(module), rule, labels.weights.inferred):
        return False
    _pass_through(labels, op, x, (place.module, module), (place, read, made), dim)
    whole = labels.side(place.module, module, "out", dim - x.ndim)
    for bias_name in biases:
        labels.own[id(getattr(module, bias_name))] = whole
    return True


def _is_one_layer(module: nn.Module) -> bool:
    """Whether the parameters of a module may be those of one layer: there is one matrix among them."""
    if isinstance(module, nn.MultiheadAttention):
        return module._qkv_same_embed_dim
    if rule_for(module) is not None:
        return True
    own = (p for p in module.parameters(recurse=False) if p.ndim > 1 and p.numel() > max(p.shape))
    return sum(1 for _ in own) < 2 and not isinstance(module, nn.ParameterList | nn.ParameterDict)


def _held(
    labels: Labels,
    op: Operation,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    dims: tuple[int, int],
    dim: int,
    groups: int = 1,
) -> bool:
    """Follow a product with a parameter that is a layer of its own (`HeldWeight`); return whether it is one.

    Args:
        tensors: as in `_weighted`. dims: the dimensions of the parameter that are read and made.
        dim, groups: as in `_weighted`.
    """
    x, weight, bias = tensors
    place = labels.weights.find_part(weight)
    assert place is not None
    owner = labels.weights.modules[place.module]
    if parts(owner) > 1 or is_depthwise(owner):
        return False
    layer, (read, made) = held_weight(owner, place.attribute), dims
    rule = Rule({"weight": made}, {"weight": read}, kind="weighted", spans=place.spans)
    if not infer_rule(type(layer), rule, labels.weights.inferred):
        return False
    name = place.full_name
    if place.spans:
        if labels.found.axes is None:
            raise AxesNeeded
        ends: dict[Side, range] = {"out": rule.span(made), "in": rule.span(read)}
        for side, span in ends.items():  # a channel has a place along each dimension
            shape = [labels.weights.parameter(place).shape[d] for d in span]
            labels.vectors(labels.side(name, layer, side, dim - x.ndim).view(shape))
    own = None if bias is None else labels.of(bias)
    made_labels = _pass_through(labels, op, x, (name, layer), (place, read, made), dim, groups)
    if bias is not None:
        vector = None if own is None else vector_along(own, own.ndim - 1, bias.shape[-1])
        if own is None or varying(own) not in ([], [bias.ndim - 1]) or vector is None:
            labels.fix(made_labels, f"{labels.where()} adds a tensor of fixed size to it")
            labels.fix(own, f"{labels.where()} adds it along another dimension")
        else:
            labels.tie(made_labels, vector, f"{labels.where()} adds a tensor of fixed size to it")
            labels.found.biases.append((vector.numpy(), made_labels.numpy()))
    return True


def _pass_through(
    labels: Labels,
    op: Operation,
    x: Tensor,
    layer: tuple[str, nn.Module],
    weight: tuple[ParameterView, int, int],
    dim: int,
    groups: int = 1,
) -> Tensor:
    """Tie what a product reads to the inputs of a layer, label its output, and return these labels.

    Args:
        x: the activations. layer: name of the layer, and the layer.
        weight: the weight, and the dimensions of the parameter that are read and made.
        dim, groups: as in `_weighted`.
    """
    (name, module), (place, *dims) = layer, weight
    arriving = labels.of(x)
    if arriving is not None:
        reason = f"its channels do not lie along the dimension that {labels.where()} reads"
        arriving = labels.row(arriving, dim, reason)
    end = dim - x.ndim
    whole: dict[Side, Tensor] = {side: labels.side(name, module, side, end) for side in ("in", "out")}
    sides = {side: held[place.positions(d)] for (side, held), d in zip(whole.items(), dims, strict=True)}
    if arriving is not None:
        vector = vector_along(arriving, dim, x.shape[dim])
        labels.tie(vector, sides["in"], f"{labels.where()} also reads positions of fixed size")
    positions = op.output.numel() / sides["out"].numel() / groups
    transposed = op.name == "convolution" and op.given["transposed"]
    uses = x.numel() / sides["in"].numel() if transposed else positions
    share = (sides["in"].numel() * sides["out"].numel()) / (whole["in"].numel() * whole["out"].numel())
    elements = labels.weights.parameter(place).numel()
    _count(labels, name, uses * share, positions * share, elements)
    labels.put(op.output, spread(sides["out"], op.output.ndim, dim))
    return sides["out"]


def _count(labels: Labels, name: str, uses: float, positions: float, elements: int) -> None:
    """Count the MACs of a product as those of an inferred layer; they were counted as those of no layer.

    Args:
        uses: number of times that each element of the weight is used.
        positions: number of output positions. elements: number of elements of the weight.
    """
    found = labels.found
    before = found.uses.get(name, (0.0, 0.0))
    found.uses[name] = before[0] + uses, before[1] + positions
    found.other_macs -= uses * elements
    found.calls[name] += 1
