"""How channels flow through a model: one forward pass in which every tensor carries labels.

Each channel on each side of each layer gets a number. While the model runs (on the meta
device, so nothing is computed), the numbers travel with the tensors: operations that only
move data are applied to the numbers themselves, elementwise operations tie the numbers of
their operands, a layer ties those of its inputs to its own and sends out those of its
outputs. What is tied goes together. Where an operation does something else with them the
channels are fixed, and the reason is kept.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.errors import PruningError
from pruning.layers import Side, is_depthwise, layer_width, parts, rule_for

_Weighted = (nn.modules.conv._ConvNd, nn.Linear)
#: Of tensors that no layer in the table owns (a layer scale, a position embedding), those
#: with more elements than this are not followed: what they touch is fixed.
MOST_ELEMENTS = 1_000_000
#: The label of a position that belongs to no channel.
NONE = -1


class Ties:
    """Numbers that are tied to one another, as disjoint sets; vectors at a time."""

    def __init__(self) -> None:
        self._parent = np.arange(0)
        self._size = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def new(self, count: int) -> np.ndarray:
        self._size += count
        return np.arange(self._size - count, self._size)

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """Tie two vectors element by element."""
        self._waiting.append((left, right))

    def root(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest number that each one is tied to; `NONE` stays."""
        self._settle()
        return np.where(numbers == NONE, NONE, self._parent[numbers])

    def _settle(self) -> None:
        if len(self._parent) < self._size:
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), self._size)])
        if not self._waiting:
            return
        left, right = (np.concatenate(side) for side in zip(*self._waiting, strict=True))
        self._waiting = []
        parent = self._parent
        while True:
            left, right = parent[left], parent[right]
            differ = left != right
            if not differ.any():
                break
            left, right = left[differ], right[differ]
            np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
            while not np.array_equal(parent[parent], parent):
                parent = parent[parent]
        self._parent = parent


@dataclass(frozen=True)
class SideUse:
    """One side of a layer as it was met: the label of each position, and where they lie.

    `dim` counts from the front where the layer says so (1 behind the batch) and from the
    end otherwise; for a tensor of its own (side `self`) it is one of that tensor's.
    """

    labels: np.ndarray
    dim: int


@dataclass
class Flow:
    """What a forward pass showed.

    Attributes:
        ties: between labels. sides: by layer (or tensor) name and side.
        fixed: labels that must stay, each with the reason.
        rigid: labels that passed an operation whose sizes may be written in the code.
        calls: how often each layer in the table ran.
        uses: (uses of a weight, output positions) per layer, summed over the pass.
        follows: for every convolution and linear layer, what reads its output; the empty
            text is anything but a norm.
        other_macs: of matrix products outside those layers, for one example.
    """

    ties: Ties = field(default_factory=Ties)
    sides: dict[tuple[str, Side], SideUse] = field(default_factory=dict)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    rigid: list[np.ndarray] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    uses: dict[str, tuple[float, float]] = field(default_factory=dict)
    follows: dict[str, list[str]] = field(default_factory=dict)
    other_macs: float = 0.0
    probe: nn.Module | None = None


def flow(model: nn.Module, run: Callable[[nn.Module, Any], Any], inputs: Any) -> Flow:
    """Follow the channels of a model through a forward pass in eval mode.

    Where layers do not run in eval mode (auxiliary heads), the pass in training mode counts
    as well. Raises `PruningError` when the model does not run on the inputs.
    """
    with contextlib.suppress(Exception):  # a model that looks at values runs on its own device only
        probe = on_meta(model)
        return replace(_follow(probe, run, pytree.tree_map(to_meta, inputs)), probe=probe.eval())
    try:
        return _follow(copy.deepcopy(model), run, pytree.tree_map(_detached, inputs))
    except PruningError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}"
        ) from error


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without storage: shapes alone."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = to_meta(tensor)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return _only_shapes(copy.deepcopy(model, memo))


def _only_shapes(probe: nn.Module) -> nn.Module:
    """Let BatchNorm pass its input on where nothing is computed anyway: on the meta device torch
    takes it apart into ten operations, which is most of the time of a pass."""
    for module in probe.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            module.forward = functools.partial(_same_shape, module)  # type: ignore[method-assign]
    return probe


def _same_shape(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    if x.ndim < 2 or x.shape[1] != norm.num_features:
        raise ValueError(f"{norm.num_features} channels expected, got an input of shape {tuple(x.shape)}")
    return torch.empty_like(x)


class Shapes(TorchDispatchMode):
    """Runs a model on the meta device without torch's own bookkeeping for elementwise operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _shape(func, args, kwargs or {})


def _shape(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives; for the most common elementwise ones on the meta device just its shape."""
    if args and func._schema.name in _SAME_SHAPE and isinstance(args[0], Tensor) and args[0].is_meta:
        x, other = args[0], args[1] if len(args) > 1 else None
        if x.is_floating_point() and (
            not isinstance(other, Tensor) or (other.shape == x.shape and other.dtype == x.dtype)
        ):
            return x if func._schema.name.endswith("_") else torch.empty_like(x)
    return func(*args, **kwargs)


def to_meta(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _follow(probe: nn.Module, run: Callable[[nn.Module, Any], Any], inputs: Any) -> Flow:
    found = Flow()
    example = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batch = example[0].shape[0] if example and example[0].ndim else 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with _Follower(probe.eval(), found, batch) as follower:
            follower.finish(run(probe, inputs))
        table = [name for name, layer in probe.named_modules() if rule_for(layer) is not None]
        if any(not found.calls[name] for name in table):
            # Its ties count; what it costs and what can be folded is a matter of eval mode.
            also = replace(found, calls=Counter(), uses={}, follows={})
            with contextlib.suppress(Exception), _Follower(probe.train(), also, batch) as follower:
                follower.finish(run(probe, inputs))  # it need not run in this mode
    return found


class _Follower(TorchDispatchMode):
    """Labels the tensors of one forward pass."""

    def __init__(self, probe: nn.Module, found: Flow, batch: int):
        super().__init__()
        self.found, self.batch = found, batch
        self.labels = WeakTensorKeyDictionary()
        self.makers = WeakTensorKeyDictionary()
        self.inside = 0
        self.path = ["the model"]
        self.handles: list[Any] = []
        owned: set[int] = set()
        for name, module in probe.named_modules():
            rule = rule_for(module)
            own = dict(module.named_parameters(recurse=False))
            known = rule is not None and own.keys() <= {*rule.out, *rule.into}
            if known or isinstance(module, nn.modules.dropout._DropoutNd):
                owned.update(id(t) for t in (*own.values(), *module.buffers(recurse=False)))
                self._hook(module, self._enter(name, module), self._leave(name, module))
            else:
                self._hook(module, self._come(f"{name} ({type(module).__name__})".lstrip()), self._go)
        # Tensors of no layer in the table are followed by their elements, from their first use on.
        self.own = {
            id(tensor): (name, tensor)
            for name, tensor in (*probe.named_parameters(), *probe.named_buffers())
            if id(tensor) not in owned and tensor.is_floating_point() and tensor.numel()
        }

    def _hook(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _come(self, name: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            self.path.append(name)

        return before

    def _go(self, *_: Any) -> None:
        self.path.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    # --- labels of tensors -------------------------------------------------------------

    def of(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor: of its shape, with size 1 along dimensions that do not matter."""
        known = self.labels.get(tensor)
        if known is None and id(tensor) in self.own and tensor.numel() <= MOST_ELEMENTS:
            name, _ = self.own[id(tensor)]
            if (name, "self") not in self.found.sides:
                numbers = self.found.ties.new(tensor.numel())
                self.found.sides[name, "self"] = SideUse(numbers.reshape(tensor.shape), 0)
            known = torch.from_numpy(self.found.sides[name, "self"].labels)
        return known

    def put(self, tensor: Any, labels: Tensor | None) -> None:
        if not isinstance(tensor, Tensor):
            self.fix(labels, f"{self.where()} makes something else than a tensor of it")
        elif labels is not None and tensor.ndim == labels.ndim:
            self.labels[tensor] = labels
        else:
            self.fix(labels, f"{self.where()} gives it another shape")
            if tensor in self.labels:
                del self.labels[tensor]

    def tie(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Tie labels element by element; what is tied to no channel is fixed."""
        left, right = torch.broadcast_tensors(left, right)
        a, b = left.flatten().numpy(), right.flatten().numpy()
        both = (a != NONE) & (b != NONE)
        if both.all():
            self.found.ties.tie(a, b)
            return
        self.found.ties.tie(a[both], b[both])
        lone = np.concatenate([a[~both], b[~both]])
        self.found.fixed.append((lone[lone != NONE], reason))

    def fix(self, labels: Tensor | None, reason: str) -> None:
        if labels is not None:
            numbers = labels.flatten().numpy()
            self.found.fixed.append((numbers[numbers != NONE], reason))

    def where(self) -> str:
        return self.path[-1]

    def side(self, name: str, module: nn.Module, side: Side, dim: int) -> Tensor:
        """The labels of one side of a layer, made when it is first met."""
        use = self.found.sides.get((name, side))
        if use is None:
            width = layer_width(module, side)
            use = SideUse(self.found.ties.new(width), dim)
            self.found.sides[name, side] = use
            if parts(module) > 1:  # as many must go from each part
                by_part = use.labels.reshape(parts(module), -1)
                for other in by_part[1:]:
                    self.found.ties.tie(by_part[0], other)
        return torch.from_numpy(use.labels)

    # --- layers in the table -----------------------------------------------------------

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        norm = name if isinstance(module, nn.modules.batchnorm._BatchNorm) else ""

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.inside:
                self._read((args, kwargs), norm)
            self.inside += 1

        return before

    def _leave(self, name: str, module: nn.Module) -> Callable[..., None]:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            if self.inside:
                return
            x = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if x is None or not isinstance(output, Tensor):
                return
            if rule_for(module) is None or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
                self.put(output, self.of(x))  # dropout; one slope for all channels
                return
            self.found.calls[name] += 1
            if isinstance(module, _Weighted):
                self._weighted(name, module, x, output)
            elif isinstance(module, nn.Embedding):
                labels = self.side(name, module, "out", -1)
                self.put(output, labels.reshape([1] * (output.ndim - 1) + [-1]))
            else:
                self._channelwise(name, module, x, output)

        return after

    def _weighted(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        dim = -1 - len(getattr(module, "kernel_size", ()))  # of a linear layer the last
        labels = self.of(x)
        uses, positions = self.found.uses.get(name, (0.0, 0.0))
        now = output.numel() / layer_width(module, "out") / self.batch
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        used = x.numel() / layer_width(module, "in") / self.batch if transposed else now
        self.found.uses[name] = uses + used, positions + now
        if is_depthwise(module):
            self._channelwise(name, module, x, output, dim)
        else:
            inner = self.side(name, module, "in", dim)
            vector = self._along(labels, x, dim, name)
            if vector is not None:
                self.tie(vector, inner, f"{name} also reads a tensor of fixed size beside its channels")
            outer = self.side(name, module, "out", dim)
            self.put(output, _spread(outer, output.ndim, dim))
        self.makers[output] = name
        self.found.follows.setdefault(name, [])

    def _channelwise(
        self, name: str, module: nn.Module, x: Tensor, output: Tensor, dim: int | None = None
    ) -> None:
        """A layer whose channels go in and out at once."""
        labels = self.of(x)
        if isinstance(module, nn.LayerNorm):
            varying = _varying(labels) if labels is not None else []
            front = varying[0] if len(varying) == 1 else x.ndim - 1
            dim = front - x.ndim
            several = len(module.normalized_shape) > 1 and dim != -1
            if several or x.shape[front] != module.normalized_shape[-1]:
                self.fix(labels, f"{name} normalises over other dimensions than its channels'")
                self.put(output, None)
                return
        elif dim is None:
            dim = 1 - x.ndim if x.ndim > 1 else -1
        own = self.side(name, module, "out", dim)
        vector = self._along(labels, x, dim, name)
        if vector is None:
            self.fix(own, f"the input of {name} has a fixed size")
            self.put(output, None)
        else:
            self.tie(vector, own, f"the input of {name} has a fixed size in part")
            self.put(output, _spread(own, output.ndim, dim))

    def _along(self, labels: Tensor | None, x: Tensor, dim: int, name: str) -> Tensor | None:
        """Labels along one dimension, as a vector; channels along another are fixed."""
        if labels is None:
            return None
        front = dim + x.ndim
        if any(d != front for d in _varying(labels)):
            self.fix(labels, f"its channels lie along another dimension than the one that {name} reads")
            return None
        for _ in range(front):
            labels = labels.select(0, 0)
        while labels.ndim > 1:
            labels = labels.select(-1, 0)
        return labels.expand(x.shape[front])

    # --- operations --------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = _shape(func, args, kwargs)
        if not self.inside:
            if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
                self.found.other_macs += flops / 2 / self.batch
            self._read((args, kwargs), "")
            operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if any(self.of(t) is not None for t in operands):
                self._operate(func, args, kwargs, operands, output)
        return output

    def _read(self, arguments: Any, norm: str) -> None:
        for leaf in pytree.tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf in self.makers:
                self.found.follows[self.makers[leaf]].append(norm)

    def finish(self, output: Any) -> None:
        """Fix what the model gives back."""
        self._read(output, "")
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.fix(self.of(leaf), "its channels are the model's output, whose size is kept")

    def _operate(self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], output: Any) -> None:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = _by_name(func, args, kwargs)
        if name in MOVES:
            MOVES[name](self, func, args, kwargs, given, operands, output)
        elif name in SAME:
            self.put(output[0] if isinstance(output, tuple) else output, self.of(operands[0]))
        elif name in POINTWISE or _tagged(name, "pointwise"):
            self.pointwise(name, operands, output)
        elif name in REDUCTIONS or _tagged(name, "reduction"):
            self.reduction(name, operands[0], given, output)
        elif name in SOFTMAX:
            labels = self.of(operands[0])
            if labels is not None and given["dim"] % operands[0].ndim in _varying(labels):
                self.fix(labels, f"{self.where()} takes {name.strip('_')} over its channels")
            self.put(output, labels)
        elif name.lstrip("_").startswith(SPATIAL):
            self.spatial(name, operands[0], output)
        elif name == "bmm":
            self.product(operands, output)
        else:
            self.unknown(name, operands)

    def unknown(self, name: str, operands: Iterable[Tensor]) -> None:
        """An operation that channels cannot be followed through: they stay."""
        for operand in operands:
            self.fix(
                self.of(operand), f"{self.where()} uses it in {name}, which channels are not followed through"
            )

    def pointwise(self, name: str, operands: list[Tensor], output: Any) -> None:
        if not isinstance(output, Tensor):
            return self.unknown(name, operands)
        rank = output.ndim
        shapes = [[1] * (rank - t.ndim) + list(t.shape) for t in operands]
        labels = [self.of(t) for t in operands]
        if any(t.ndim > rank for t in operands):
            return self.unknown(name, operands)
        aligned = [
            None if found is None else found.reshape([1] * (rank - found.ndim) + list(found.shape))
            for found in labels
        ]
        known = [i for i, found in enumerate(aligned) if found is not None]
        first = max(known, key=lambda i: (len(_varying(aligned[i])), math.prod(shapes[i])))
        result = aligned[first]
        assert result is not None
        lies = _varying(result)
        for i, other in enumerate(aligned):
            if i == first:
                continue
            sizes = [shapes[i][d] for d in lies]
            if other is None:
                if any(size > 1 for size in sizes):
                    self.fix(result, f"{self.where()} combines it ({name}) with a tensor of fixed size")
            elif not _varying(other) and all(size == 1 for size in sizes) and lies:
                continue  # one value for all channels
            elif set(_varying(other)) <= set(lies) and all(size > 1 for size in sizes):
                self.tie(result, other, f"{self.where()} combines it ({name}) with a tensor of fixed size")
            else:
                for each in (result, other):
                    self.fix(
                        each, f"{self.where()} combines it ({name}) with channels along another dimension"
                    )
        if len(lies) > 1:  # of a parameter that is now tied, along one of its dimensions perhaps
            result = _compact(torch.from_numpy(self.found.ties.root(result.numpy())))
        self.put(output, result)
        return None

    def reduction(self, name: str, x: Tensor, given: dict[str, Any], output: Any) -> None:
        labels = self.of(x)
        if labels is None:
            return
        dims = given.get("dim")
        dims = list(range(x.ndim)) if dims is None or dims == [] else dims
        dims = sorted({d % max(1, x.ndim) for d in ([dims] if isinstance(dims, int) else dims)})
        if any(d in dims for d in _varying(labels)):
            self.fix(labels, f"{self.where()} reduces over its channels ({name})")
            return
        for leaf in pytree.tree_leaves(output):
            kept = labels
            for d in reversed(dims):
                kept = kept.narrow(d, 0, 1)
                if leaf.ndim < x.ndim:
                    kept = kept.squeeze(d)
            self.put(leaf, kept)

    def spatial(self, name: str, x: Tensor, output: Any) -> None:
        """Pooling and resizing: batch and channels stay, whatever lies behind them changes."""
        labels = self.of(x)
        if labels is None:
            return
        if any(d > 1 for d in _varying(labels)):
            self.fix(labels, f"{self.where()} pools or resizes over its channels ({name})")
            return
        for leaf in pytree.tree_leaves(output):
            self.put(leaf, labels)

    def product(self, operands: list[Tensor], output: Tensor) -> None:
        """A batched matrix product: what is summed over is fixed, what is not passes on."""
        left, right = (self.of(operand) for operand in operands)
        passing = [x for x, summed in ((left, 2), (right, 1)) if _varying(x) and summed not in _varying(x)]
        result = passing[0] if len(passing) == 1 else None
        for labels in (left, right):
            if labels is not result:
                self.fix(
                    labels, f"{self.where()} multiplies activations over its channels, as attention heads do"
                )
        self.put(output, result)

    # --- operations that move data -----------------------------------------------------

    def move(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Any) -> None:
        """Do with the labels what is done with the tensor."""
        x = operands[0]
        labels = self.of(x)
        if labels is None:
            return self.unknown(str(func), operands)
        full = labels.expand(x.shape)
        moved = func(*[full if a is x else a for a in args], **kwargs)
        for leaf, found in zip(pytree.tree_leaves(output), pytree.tree_leaves(moved), strict=True):
            self.put(leaf, _compact(found))
        return None

    def view(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor) -> None:
        x = operands[0]
        labels = self.of(x)
        if labels is None:
            return
        found = _compact(labels.expand(x.shape).reshape(output.shape))
        self.found.rigid.append(labels.flatten().numpy())
        self.put(output, self._one_dimension(found))

    def _one_dimension(self, labels: Tensor) -> Tensor:
        """Channels divided over several dimensions: the largest counts, across others all are tied.

        Of the sizes that a view names, the others are taken for written in the code.
        """
        varying = _varying(labels)
        if len(varying) < 2:
            return labels
        largest = max(varying, key=lambda d: (labels.shape[d], d))
        flat = labels.movedim(largest, -1).reshape(-1, labels.shape[largest])
        for row in flat[1:]:
            self.tie(flat[0], row, "it is joined with a tensor of fixed size")
        return flat[0].reshape([labels.shape[d] if d == largest else 1 for d in range(labels.ndim)])

    def cut(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Any) -> None:
        """A part or the parts along a dimension: equal parts keep as many channels each."""
        x = operands[0]
        labels = self.of(x)
        if labels is None or not x.ndim:
            return
        dim = (given.get("dim") or 0) % x.ndim
        pieces = pytree.tree_leaves(output)
        single = pieces[0].ndim < x.ndim
        length = 1 if single else pieces[0].shape[dim]
        if dim in _varying(labels) and length < x.shape[dim]:
            start, step = given.get("start") or 0, given.get("step") or 1
            even = not single and step == 1 and x.shape[dim] % length == 0 and start % length == 0
            if even and all(piece.shape[dim] == length for piece in pieces):
                by_part = labels.movedim(dim, 0).reshape(-1, length, *labels.movedim(dim, 0).shape[1:])
                for other in by_part[1:]:
                    self.tie(by_part[0], other, "it is joined with a tensor of fixed size")
                self.found.rigid.append(labels.flatten().numpy())
            else:
                self.fix(labels, f"{self.where()} takes channels out of it by position")
        self.move(func, args, kwargs, given, operands, output)

    def join(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor) -> None:
        """Concatenation and stacking."""
        dim = (given.get("dim") or 0) % output.ndim
        pieces = [t for t in operands if t.numel() or t.ndim == output.ndim]
        stacked = output.ndim > operands[0].ndim
        found = []
        for piece in pieces:
            labels = self.of(piece)
            if stacked:
                labels = labels.unsqueeze(dim) if labels is not None else None
            found.append(labels)
        sizes = [1 if stacked else piece.shape[dim] for piece in pieces]
        across = next((x for x in found if x is not None and set(_varying(x)) - {dim}), None)
        if across is None:
            column = [
                torch.full([size], NONE) if x is None else _vector(x, dim, size)
                for x, size in zip(found, sizes, strict=True)
            ]
            self.put(output, torch.cat(column).reshape([-1 if d == dim else 1 for d in range(output.ndim)]))
            return
        for piece, x in zip(pieces, found, strict=True):
            if x is None:
                self.fix(across, f"{self.where()} joins it with a tensor of fixed size")
            elif dim in _varying(x) or _varying(x) != _varying(across):
                for each in (across, x):
                    self.fix(each, f"{self.where()} joins it with channels along another dimension")
            elif x is not across and piece.numel():
                self.tie(across, x, f"{self.where()} joins it with a tensor of fixed size")
        self.put(output, across if dim not in _varying(across) else None)

    def pad(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor) -> None:
        labels = self.of(operands[0])
        if labels is None:
            return
        pads = list(given["pad"])
        if all(not any(pads[2 * (labels.ndim - 1 - d) : 2 * (labels.ndim - d)]) for d in _varying(labels)):
            self.put(output, labels)
            return
        full = labels.expand(operands[0].shape)
        self.put(output, _compact(torch.constant_pad_nd(full, pads, NONE)))

    def shift(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor) -> None:
        """Rolling or picking along dimensions: fine where no channel lies along them."""
        labels = self.of(operands[0])
        if labels is None:
            return self.unknown(str(func), operands)
        dims = given.get("dims", given.get("dim", []))
        touched = {d % labels.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        if not touched or touched & set(_varying(labels)):
            self.fix(labels, f"{self.where()} rearranges its channels by position")
            return None
        self.put(output, labels)
        return None

    def index(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor) -> None:
        x = operands[0]
        labels = self.of(x)
        if labels is None:
            return self.unknown("index", operands)
        used = [d for d, place in enumerate(given["indices"]) if place is not None]
        varying = _varying(labels)
        plain = all(place is None or place.dtype == torch.long for place in given["indices"])
        if not plain or set(used) & set(varying) or used != list(range(used[0], used[-1] + 1)):
            self.fix(labels, f"{self.where()} picks from it by position")
            return None
        ranks = {place.ndim for place in given["indices"] if place is not None}
        narrowed = labels
        for d in reversed(used):
            narrowed = narrowed.select(d, 0)
        for _ in range(max(ranks)):
            narrowed = narrowed.unsqueeze(used[0])
        self.put(output, narrowed)
        return None

    def restride(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Any) -> None:
        """Another layout in memory."""
        if list(given["size"]) == list(operands[0].shape):
            self.put(output, self.of(operands[0]))
        else:
            self.unknown("as_strided", operands)

    def pixel_shuffle(
        self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor
    ) -> None:
        labels = self.of(operands[0])
        if labels is None:
            return
        if _varying(labels) not in ([], [labels.ndim - 3]):
            self.fix(labels, f"{self.where()} shuffles pixels of channels along another dimension")
            return
        vector = _vector(labels, labels.ndim - 3, operands[0].shape[-3])
        by_output = vector.reshape(output.shape[-3], -1)
        for column in by_output.T[1:]:
            self.tie(by_output[:, 0], column, "it is joined with a tensor of fixed size")
        self.put(output, _spread(by_output[:, 0].contiguous(), output.ndim, -3))

    def patches(self, func: Any, args: Any, kwargs: Any, given: Any, operands: Any, output: Tensor) -> None:
        """F.unfold: every channel becomes as many rows as the kernel has places."""
        labels, x = self.of(operands[0]), operands[0]
        if labels is None:
            return
        if _varying(labels) not in ([], [1]) or x.ndim != 4:
            self.fix(labels, f"{self.where()} unfolds channels along another dimension")
            return
        vector = _vector(labels, 1, x.shape[1]).repeat_interleave(output.shape[1] // x.shape[1])
        self.put(output, vector.reshape(1, -1, 1))


#: Elementwise operations whose result is like their first operand.
_SAME_SHAPE = frozenset(
    f"aten::{name}{place}"
    for name in (
        "add", "sub", "mul", "div", "relu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "silu", "gelu",
        "tanh", "leaky_relu", "elu", "mish", "clamp", "clamp_min", "exp", "sqrt", "rsqrt", "neg", "abs",
    )
    for place in ("", "_")
)  # fmt: skip


def _varying(labels: Tensor | None) -> list[int]:
    """The dimensions along which channels lie."""
    return [] if labels is None else [d for d, size in enumerate(labels.shape) if size > 1]


def _vector(labels: Tensor, dim: int, size: int) -> Tensor:
    """Labels that lie along one dimension at most, as a vector along it."""
    for d in reversed(range(labels.ndim)):
        if d != dim:
            labels = labels.select(d, 0)
    return labels.expand(size)


def _spread(vector: Tensor, rank: int, dim: int) -> Tensor:
    """A vector of labels along one dimension of several."""
    return vector.reshape([-1 if d == dim % rank else 1 for d in range(rank)])


def _compact(full: Tensor) -> Tensor:
    """Labels with size 1 along every dimension on which they do not depend."""
    for d in range(full.ndim):
        if full.shape[d] < 2:
            continue
        first = full.narrow(d, 0, 1)
        if full.stride(d) == 0 or torch.equal(full, first.expand(full.shape)):
            full = first
    return full


@functools.cache
def _tagged(name: str, tag: str) -> bool:
    """Whether torch gives an operation, in any of its forms, a tag; older versions lack some."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return any(str(each) == f"Tag.{tag}" for overload in overloads for each in overload.tags)


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of the operation's schema."""
    given = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            given[argument.name] = args[i]
        elif argument.name in kwargs:
            given[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            given[argument.name] = argument.default_value
    return given


_F = _Follower
#: Operations that move data, each with what it does to labels.
MOVES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _F.view),
    **dict.fromkeys(
        ("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "repeat", "unfold", "flip",
         "pixel_unshuffle", "diagonal"), _F.move
    ),
    **dict.fromkeys(
        ("slice", "select", "split", "split_with_sizes", "unbind", "narrow", "unsafe_split",
         "unsafe_chunk", "chunk"), _F.cut
    ),
    **dict.fromkeys(("cat", "stack", "concat"), _F.join),
    **dict.fromkeys(("roll", "index_select", "cumsum", "sort", "gather"), _F.shift),
    "constant_pad_nd": _F.pad,
    "index": _F.index,
    "as_strided": _F.restride,
    "pixel_shuffle": _F.pixel_shuffle,
    "im2col": _F.patches,
}  # fmt: skip
#: Operations whose result has the labels of the first tensor.
SAME = frozenset(
    (
        "alias",
        "log_sigmoid_forward",
        "detach",
        "clone",
        "_to_copy",
        "lift_fresh",
        "contiguous",
        "native_dropout",
        "bernoulli",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "zero",
        "fill",
    )
)
#: Elementwise operations without torch's tag.
POINTWISE = frozenset(
    (
        "masked_fill",
        "where",
        "lerp",
        "addcmul",
        "addcdiv",
        "threshold",
        "rrelu_with_noise",
        "hardswish",
        "_prelu_kernel",
    )
)
REDUCTIONS = frozenset(
    (
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "prod",
        "logsumexp",
        "norm",
        "linalg_vector_norm",
        "argmax",
        "argmin",
        "any",
        "all",
        "median",
    )
)
SOFTMAX = frozenset(("_softmax", "_log_softmax", "_safe_softmax"))
SPATIAL = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "reflection_pad",
    "replication_pad", "fractional_max_pool", "max_unpool", "grid_sampler",
)  # fmt: skip
