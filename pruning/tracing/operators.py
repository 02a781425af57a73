"""What operations do to labels: the rules by which channels are followed between layers.

Every rule takes the labels of the pass, the operation, and the labels of its first tensor.
An operation without a rule fixes the channels that reach it, with the reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.tracing.labels import FIXED_SIZE, NONE, Labels, compact, spread, varying, vector_along
from pruning.utils.tree import tensors_among


@dataclass
class Operation:
    """One operation as it ran."""

    func: Any
    args: Any
    kwargs: dict[str, Any]
    output: Any

    @functools.cached_property
    def name(self) -> str:
        return self.func._schema.name.removeprefix("aten::").rstrip("_")

    @functools.cached_property
    def operands(self) -> list[Tensor]:
        return tensors_among((self.args, self.kwargs))

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """Arguments by the names of the operation's schema."""
        given = {}
        for i, argument in enumerate(self.func._schema.arguments):
            if i < len(self.args):
                given[argument.name] = self.args[i]
            elif argument.name in self.kwargs:
                given[argument.name] = self.kwargs[argument.name]
            elif argument.has_default_value():
                given[argument.name] = argument.default_value
        return given


def follow(book: Labels, op: Operation) -> None:
    """Label what an operation gives, or fix what it takes."""
    rule = _rule(op.name)
    if rule is None and (op.name in POINTWISE or _tagged(op.name, "pointwise")):
        return pointwise(book, op)
    if op.name in JOINS:
        return join(book, op)
    if op.name == "bmm":
        return product(book, op)
    rule = rule or (reduction if _tagged(op.name, "reduction") else None)
    labels = book.of(op.operands[0])
    if rule is None or labels is None:
        return book.unknown(op.name, op.operands)
    for other in op.operands[1:]:  # the indices of an unpooling go with its channels; a grid says where
        also = book.of(other)
        if also is None or other is op.operands[0]:
            continue
        if varying(also) == varying(labels) and also.shape == labels.shape:
            book.tie(labels, also, f"{book.where()} uses it in {op.name} beside a tensor of fixed size")
        else:
            book.fix(also, f"{book.where()} takes places from it ({op.name})")
    return rule(book, op, labels)


def _rule(name: str) -> Callable[[Labels, Operation, Tensor], None] | None:
    return RULES.get(name) or (spatial if name.lstrip("_").startswith(SPATIAL) else None)


@functools.cache
def _tagged(name: str, tag: str) -> bool:
    """Whether torch gives an operation, in any of its forms, a tag; older versions lack some."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return any(str(each) == f"Tag.{tag}" for overload in overloads for each in overload.tags)


# --- several tensors ------------------------------------------------------------------------


def pointwise(book: Labels, op: Operation) -> None:
    """Elementwise operations tie what lies in the same place."""
    if not isinstance(op.output, Tensor):
        return book.unknown(op.name, op.operands)
    rank = op.output.ndim
    if any(t.ndim > rank for t in op.operands):
        return book.unknown(op.name, op.operands)
    shapes = [[1] * (rank - t.ndim) + list(t.shape) for t in op.operands]
    aligned = [
        None if found is None else found.reshape([1] * (rank - found.ndim) + list(found.shape))
        for found in map(book.of, op.operands)
    ]
    known = [i for i, found in enumerate(aligned) if found is not None]
    first = max(known, key=lambda i: (len(varying(aligned[i])), math.prod(shapes[i])))
    result = aligned[first]
    assert result is not None
    lies = varying(result)
    combines = f"{book.where()} combines it ({op.name})"
    for i, other in enumerate(aligned):
        if i == first:
            continue
        wide = [d for d in lies if shapes[i][d] > 1]
        expanded = [d for d in wide if op.operands[i].stride(d - rank) == 0]
        even = other is None and book.is_even(op.operands[i])
        if (expanded == wide or even) and not varying(other):
            # One value for all channels. The size that it was expanded to may be written in the code.
            if wide:
                book.rigid(result, result)
            elif other is not None and not lies:
                book.tie(result, other, f"{combines} with a tensor of fixed size")
        elif other is None:
            book.fix(result, f"{combines} with a tensor of fixed size")
        elif set(varying(other)) <= set(lies) and wide == lies:
            book.tie(result, other, f"{combines} with a tensor of fixed size")
        else:
            for each in (result, other):
                book.fix(each, f"{combines} with channels along another dimension")
    if len(lies) > 1:  # of a parameter that is now tied, along one of its dimensions perhaps
        result = compact(torch.from_numpy(book.found.ties.root(result.numpy())))
    return book.put(op.output, result)


def product(book: Labels, op: Operation) -> None:
    """A batched matrix product: what is summed over is fixed, what is not passes on."""
    left, right = map(book.of, op.operands)
    passing = [x for x, summed in ((left, 2), (right, 1)) if varying(x) and summed not in varying(x)]
    result = passing[0] if len(passing) == 1 else None
    for labels in (left, right):
        if labels is not result:
            book.fix(
                labels, f"{book.where()} multiplies activations over its channels, as attention heads do"
            )
    book.put(op.output, result)


def join(book: Labels, op: Operation) -> None:
    """Concatenation and stacking."""
    rank = op.output.ndim
    dim = (op.given.get("dim") or 0) % rank
    pieces = [t for t in op.operands if t.numel() or t.ndim == rank]
    stacked = rank > op.operands[0].ndim
    found = [book.of(piece) for piece in pieces]
    if not stacked and any(dim in varying(x) for x in found):
        found = [book.labels_or_even(piece, dim) for piece in pieces]
    if stacked:
        found = [None if x is None else x.unsqueeze(dim) for x in found]
    sizes = [1 if stacked else piece.shape[dim] for piece in pieces]
    across = next((x for x in found if x is not None and set(varying(x)) - {dim}), None)
    if across is None:
        column = [
            torch.full([size], NONE) if x is None else vector_along(x, dim, size)
            for x, size in zip(found, sizes, strict=True)
        ]
        return book.put(op.output, spread(torch.cat(column), rank, dim))
    for piece, x in zip(pieces, found, strict=True):
        if x is None:
            book.fix(across, f"{book.where()} joins it with a tensor of fixed size")
        elif dim in varying(x) or varying(x) != varying(across):
            for each in (across, x):
                book.fix(each, f"{book.where()} joins it with channels along another dimension")
        elif x is not across and piece.numel():
            book.tie(across, x, f"{book.where()} joins it with a tensor of fixed size")
    return book.put(op.output, across if dim not in varying(across) else None)


# --- the first tensor's channels ------------------------------------------------------------


def same(book: Labels, op: Operation, labels: Tensor) -> None:
    """Operations whose result has the labels of the first tensor."""
    book.put(op.output[0] if isinstance(op.output, tuple) else op.output, labels)


def anew(book: Labels, op: Operation, labels: Tensor) -> None:
    """A tensor that shares its type and device alone with the first one: no channel lies in it."""
    book.put(op.output, None)


def reduction(book: Labels, op: Operation, labels: Tensor) -> None:
    rank = op.operands[0].ndim
    dims = op.given.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else dims
    dims = sorted({d % max(1, rank) for d in ([dims] if isinstance(dims, int) else dims)})
    if any(d in dims for d in varying(labels)):
        return book.fix(labels, f"{book.where()} reduces over its channels ({op.name})")
    for leaf in pytree.tree_leaves(op.output):
        kept = labels
        for d in reversed(dims):
            kept = kept.narrow(d, 0, 1)
            if leaf.ndim < rank:
                kept = kept.squeeze(d)
        book.put(leaf, kept)
    return None


def softmax(book: Labels, op: Operation, labels: Tensor) -> None:
    if op.given["dim"] % labels.ndim in varying(labels):
        book.fix(labels, f"{book.where()} takes {op.name.strip('_')} over its channels")
    book.put(op.output, labels)


def spatial(book: Labels, op: Operation, labels: Tensor) -> None:
    """Pooling and resizing: batch and channels stay, whatever lies behind them changes."""
    if any(d > 1 for d in varying(labels)):
        return book.fix(labels, f"{book.where()} pools or resizes over its channels ({op.name})")
    for leaf in pytree.tree_leaves(op.output):
        book.put(leaf, labels)
    return None


def regions(book: Labels, op: Operation, labels: Tensor) -> None:
    """Pooling of regions: each region becomes a map with the channels of its image."""
    if varying(labels) not in ([], [1]):
        return book.fix(labels, f"{book.where()} cuts regions out along its channels ({op.name})")
    return spatial(book, op, labels)


# --- operations that move data --------------------------------------------------------------


def move(book: Labels, op: Operation, labels: Tensor) -> None:
    """Do with the labels what is done with the tensor."""
    x = op.operands[0]
    full = labels.expand(x.shape)
    moved = op.func(*[full if a is x else a for a in op.args], **op.kwargs)
    for leaf, found in zip(pytree.tree_leaves(op.output), pytree.tree_leaves(moved), strict=True):
        book.put(leaf, compact(found))


def view(book: Labels, op: Operation, labels: Tensor) -> None:
    found = compact(labels.expand(op.operands[0].shape).reshape(op.output.shape))
    found = _along_one_dimension(book, found)
    book.rigid(labels, found)
    book.put(op.output, found)


def _along_one_dimension(book: Labels, labels: Tensor) -> Tensor:
    """Channels divided over several dimensions: the largest counts, across others all are tied.

    Of the sizes that a view names, the others are taken for written in the code.
    """
    lies = varying(labels)
    if len(lies) < 2:
        return labels
    largest = max(lies, key=lambda d: (labels.shape[d], d))
    flat = labels.movedim(largest, -1).reshape(-1, labels.shape[largest])
    for row in flat[1:]:
        book.tie(flat[0], row, FIXED_SIZE)
    return spread(flat[0], labels.ndim, largest)


def cut(book: Labels, op: Operation, labels: Tensor) -> None:
    """A part or the parts along a dimension: equal parts keep as many channels each.

    Whether a slice is one of equal parts shows when the others are taken.
    """
    x = op.operands[0]
    if not x.ndim:
        return
    dim = (op.given.get("dim") or 0) % x.ndim
    pieces = pytree.tree_leaves(op.output)
    lengths = [1 if piece.ndim < x.ndim else piece.shape[dim] for piece in pieces]
    if dim in varying(labels) and lengths[0] < x.shape[dim]:
        start, step = (op.given.get("start") or 0) % x.shape[dim], op.given.get("step") or 1
        reason = f"{book.where()} takes channels out of it by position"
        alone = varying(labels) == [dim]
        equal = all(n == lengths[0] for n in lengths) and not (
            x.shape[dim] % lengths[0] or start % lengths[0]
        )
        if pieces[0].ndim < x.ndim or step != 1 or not (alone or equal):
            book.fix(labels, reason)
        else:
            book.placed(_counts(labels, dim, start, lengths), reason)
            if len(pieces) == 1 and alone:
                book.sliced(labels, dim, start, lengths[0])
            elif equal:
                book.equal_parts(labels, dim, lengths[0])
    move(book, op, labels)


def _counts(labels: Tensor, dim: int, start: int, lengths: list[int]) -> Iterator[Tensor]:
    """Channels that the code may count to cut pieces out: those in each piece; of a slice, up to its ends."""
    for length in lengths:
        ends = {(0, start), (0, start + length)} if len(lengths) == 1 else set()
        for first, last in sorted({(start, start + length), *ends}):
            if 0 < last - first < labels.shape[dim]:
                yield labels.narrow(dim, first, last - first)
        start += length


def pad(book: Labels, op: Operation, labels: Tensor) -> None:
    pads = list(op.given["pad"])
    if all(not any(pads[2 * (labels.ndim - 1 - d) : 2 * (labels.ndim - d)]) for d in varying(labels)):
        return book.put(op.output, labels)
    full = labels.expand(op.operands[0].shape)
    return book.put(op.output, compact(torch.constant_pad_nd(full, pads, NONE)))


def shift(book: Labels, op: Operation, labels: Tensor) -> None:
    """Rolling or picking along dimensions: fine where no channel lies along them."""
    dims = op.given.get("dims", op.given.get("dim", []))
    touched = {d % labels.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    if not touched or touched & set(varying(labels)):
        return book.fix(labels, f"{book.where()} rearranges its channels by position")
    return book.put(op.output, labels)


def index(book: Labels, op: Operation, labels: Tensor) -> None:
    places = op.given["indices"]
    used = [d for d, place in enumerate(places) if place is not None]
    plain = all(place is None or place.dtype == torch.long for place in places)
    if not plain or set(used) & set(varying(labels)) or used != list(range(used[0], used[-1] + 1)):
        return book.fix(labels, f"{book.where()} picks from it by position")
    narrowed = labels
    for d in reversed(used):
        narrowed = narrowed.select(d, 0)
    for _ in range(max(place.ndim for place in places if place is not None)):
        narrowed = narrowed.unsqueeze(used[0])
    return book.put(op.output, narrowed)


def gated(book: Labels, op: Operation, labels: Tensor) -> None:
    """GLU: a channel of the second half weighs one of the first."""
    dim = op.given["dim"] % labels.ndim
    if dim in varying(labels):
        labels, gates = labels.chunk(2, dim)
        book.tie(labels, gates, FIXED_SIZE)
    book.put(op.output, labels)


def restride(book: Labels, op: Operation, labels: Tensor) -> None:
    """Another layout in memory."""
    if list(op.given["size"]) == list(op.operands[0].shape):
        book.put(op.output, labels)
    else:
        book.unknown(op.name, op.operands)


def pixel_shuffle(book: Labels, op: Operation, labels: Tensor) -> None:
    if varying(labels) not in ([], [labels.ndim - 3]):
        return book.fix(labels, f"{book.where()} shuffles pixels of channels along another dimension")
    vector = vector_along(labels, labels.ndim - 3, op.operands[0].shape[-3])
    by_output = vector.reshape(op.output.shape[-3], -1)
    for column in by_output.T[1:]:
        book.tie(by_output[:, 0], column, FIXED_SIZE)
    return book.put(op.output, spread(by_output[:, 0].contiguous(), op.output.ndim, -3))


def channel_shuffle(book: Labels, op: Operation, labels: Tensor) -> None:
    """Channels of as many parts as `groups` in turn: every part keeps the same places."""
    x = op.operands[0]
    if varying(labels) not in ([], [1]):
        return book.fix(labels, f"{book.where()} shuffles channels along another dimension")
    by_part = vector_along(labels, 1, x.shape[1]).reshape(op.given["groups"], -1)
    for other in by_part[1:]:
        book.tie(by_part[0], other, FIXED_SIZE)
    return book.put(op.output, spread(by_part.T.flatten(), x.ndim, 1))


def patches(book: Labels, op: Operation, labels: Tensor) -> None:
    """F.unfold: every channel becomes as many rows as the kernel has places."""
    x = op.operands[0]
    if varying(labels) not in ([], [1]) or x.ndim != 4:
        return book.fix(labels, f"{book.where()} unfolds channels along another dimension")
    vector = vector_along(labels, 1, x.shape[1]).repeat_interleave(op.output.shape[1] // x.shape[1])
    return book.put(op.output, vector.reshape(1, -1, 1))


#: Elementwise operations without torch's tag.
POINTWISE = frozenset(
    ("masked_fill", "where", "lerp", "addcmul", "addcdiv", "threshold", "rrelu_with_noise", "hardswish",
     "_prelu_kernel")
)  # fmt: skip

JOINS = frozenset(("cat", "stack", "concat"))

#: How the names of pooling and resizing begin.
SPATIAL = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "reflection_pad",
    "replication_pad", "fractional_max_pool", "max_unpool", "grid_sampler",
)  # fmt: skip

#: By the name of the operation; reductions that torch tags need no entry.
RULES: dict[str, Callable[[Labels, Operation, Tensor], None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view),
    **dict.fromkeys(
        ("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "repeat", "unfold", "flip",
         "pixel_unshuffle", "diagonal"), move
    ),
    **dict.fromkeys(
        ("slice", "select", "split", "split_with_sizes", "unbind", "narrow", "unsafe_split",
         "unsafe_chunk", "chunk"), cut
    ),
    **dict.fromkeys(("roll", "index_select", "cumsum", "sort", "gather"), shift),
    **dict.fromkeys(
        ("alias", "log_sigmoid_forward", "detach", "clone", "_to_copy", "lift_fresh", "contiguous",
         "native_dropout", "bernoulli", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
         "randn_like", "zero", "fill"), same
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod",
         "logsumexp", "norm", "linalg_vector_norm", "argmax", "argmin", "any", "all", "median"), reduction
    ),
    **dict.fromkeys(("new_empty", "new_empty_strided"), anew),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
    "constant_pad_nd": pad,
    "index": index,
    "as_strided": restride,
    "pixel_shuffle": pixel_shuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "im2col": patches,
    **dict.fromkeys(("torchvision::roi_align", "torchvision::roi_pool"), regions),
    "glu": gated,
}  # fmt: skip
