"""How channels flow through a model: one forward pass in which every tensor carries labels.

Each channel on each side of each layer gets a number. While the model runs (on the meta
device, so nothing is computed), the numbers travel with the tensors: operations that only
move data are applied to the numbers themselves, elementwise operations tie the numbers of
their operands (`pruning.operations`), a layer ties those of its inputs to its own and sends
out those of its outputs. What is tied goes together. Where an operation does something else
with them the channels are fixed, and the reason is kept.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.errors import PruningError
from pruning.graph.layers import (
    WEIGHTED,
    DeformableConv,
    Side,
    channel_dim,
    count_deformable,
    holds_layers,
    is_depthwise,
    is_recurrent,
    layer_width,
    parts,
    rule_for,
)
from pruning.surgery.sizes import holding
from pruning.tracing.labels import FIXED_SIZE, Flow, Labels, SideUse, spread, varying, vector_along
from pruning.tracing.operators import Operation, follow
from pruning.utils.meta import run_operation, without_computing
from pruning.utils.tree import tensors, tensors_among

#: The functions that layers of `WEIGHTED` are made of, called as (input, weight, bias, …).
_WEIGHTING = frozenset(
    getattr(nn.functional, name)
    for name in (
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
    )
)  # fmt: skip

#: Operations that make a tensor of one value.
_FILLING = frozenset(
    f"aten::{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
)

_COPYING = frozenset(("aten::_to_copy", "aten::clone"))


@functools.cache
def _shares_memory(func: Any) -> bool:
    """Whether an operation writes to what it is given, or gives a view of it."""
    return any(argument.alias_info for argument in func._schema.arguments)


def flow(model: nn.Module, run: Callable[[nn.Module, Any], Any], inputs: Any) -> Flow:
    """Follow the channels of a model through a forward pass in eval mode.

    Where layers do not run in eval mode (auxiliary heads), the pass in training mode counts
    as well. Raises `PruningError` when the model does not run on the inputs.
    """
    try:
        return without_computing(lambda probe, example: _follow(probe, run, example), model, inputs)
    except PruningError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}"
        ) from error


def _follow(probe: nn.Module, run: Callable[[nn.Module, Any], Any], inputs: Any) -> Flow:
    example = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    count_deformable()
    found = Flow(probe=probe if any(leaf.is_meta for leaf in example) else None)
    batch = example[0].shape[0] if example and example[0].ndim else 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with _Follower(probe.eval(), found, batch) as follower, follower.functions:
            output = run(probe, inputs)
            follower.finish(output)
        found.outputs = [leaf.shape for leaf in tensors(output)]
        table = [name for name, layer in probe.named_modules() if rule_for(layer) is not None]
        if any(not found.calls[name] for name in table):
            # Its ties count; what it costs and what can be folded is a matter of eval mode.
            also = replace(found, calls=Counter(), uses={}, follows={})
            with (
                contextlib.suppress(Exception),  # it need not run in this mode
                _Follower(probe.train(), also, batch) as follower,
                follower.functions,
            ):
                follower.finish(run(probe, inputs))
            probe.eval()
    return found


class _Follower(TorchDispatchMode):
    """Labels the tensors of one forward pass."""

    def __init__(self, probe: nn.Module, found: Flow, batch: int):
        super().__init__()
        self.probe, self.found, self.batch = probe, found, batch
        self.name = type(probe).__name__
        self.makers = WeakTensorKeyDictionary()
        self.inside = 0
        self.handles: list[Any] = []
        # Tensors are told by their identity, which one that a pass replaces would hand on.
        self.alive = [*probe.parameters(), *probe.buffers()]
        owned: set[int] = set()
        self.holders: dict[int, str] = {}
        self.functions = _Functions(self)
        for name, module in probe.named_modules():
            rule = rule_for(module)
            own = dict(module.named_parameters(recurse=False))
            known = rule is not None and (is_recurrent(module) or own.keys() <= {*rule.out, *rule.into})
            if known or isinstance(module, nn.modules.dropout._DropoutNd):
                owned.update(id(t) for t in (*own.values(), *module.buffers(recurse=False)))
                if holds_layers(module) and "weight" in own:
                    self.functions.layers[id(own["weight"])] = name, module
                else:
                    self.holders.update((id(t), name) for t in own.values())
                    self._hook(module, self._enter(name, module), self._leave(name, module))
                    continue
            self._hook(module, self._come(name, module), self._go)
        loose = {
            id(tensor): name
            for name, tensor in (*probe.named_parameters(), *probe.named_buffers())
            if id(tensor) not in owned and tensor.is_floating_point() and tensor.numel()
        }
        self.book = Labels(found, loose)

    def _hook(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _come(self, name: str, module: nn.Module) -> Callable[..., None]:
        described = f"{name} ({type(module).__name__})".lstrip()

        def before(*_: Any) -> None:
            self.book.path.append((name, described))

        return before

    def _go(self, *_: Any) -> None:
        self.book.path.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

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
            x, *others = tensors_among((args, kwargs)) or (None,)
            if x is None:
                return
            if is_recurrent(module):
                self._recurrent(name, module, x, others)
                return
            if not isinstance(output, Tensor):
                return
            if rule_for(module) is None or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
                self.book.put(output, self.book.of(x))  # dropout; one slope for all channels
                return
            self.found.calls[name] += 1
            if isinstance(module, WEIGHTED):
                self._weighted(name, module, x, others, output)
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                labels = self.side(name, module, "out", -1)
                if module.max_norm is not None:
                    self.book.fix(labels, f"{name} brings rows to max_norm over all their channels")
                self.book.put(output, labels.reshape([1] * (output.ndim - 1) + [-1]))
            else:
                self._channelwise(name, module, x, output)

        return after

    def _weighted(
        self, name: str, module: nn.Module, x: Tensor, others: list[Tensor], output: Tensor
    ) -> None:
        dim = channel_dim(module)
        if isinstance(module, DeformableConv):
            self._deformed(name, module, x, others)
        labels = self.book.labels_or_even(x, dim)
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
                self.book.tie(vector, inner, f"{name} also reads a tensor of fixed size beside its channels")
            outer = self.side(name, module, "out", dim)
            self.book.put(output, spread(outer, output.ndim, dim))
        self.makers[output] = name
        self.found.follows.setdefault(name, [])

    def _deformed(self, name: str, module: DeformableConv, x: Tensor, others: list[Tensor]) -> None:
        """What tells a deformable convolution where to read; parts of its input may have a place each."""
        for other in others:
            self.book.fix(self.book.of(other), f"{name} takes places from it")
        offsets = max((other.shape[-3] for other in others), default=0)  # a mask has half as many
        apart = offsets // (2 * math.prod(module.kernel_size))
        if apart <= 1:
            return
        vector = self._along(self.book.labels_or_even(x, -3), x, -3, name)
        if vector is not None:
            by_part = vector.reshape(apart, -1)
            for part in by_part[1:]:
                self.book.tie(by_part[0], part, FIXED_SIZE)

    def _recurrent(self, name: str, module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
        """A layer that reads channels at every time step; what it gives has its hidden size."""
        self.found.calls[name] += 1
        uses, positions = self.found.uses.get(name, (0.0, 0.0))
        now = x.numel() / layer_width(module, "in") / self.batch
        self.found.uses[name] = uses + now, positions + now
        for state in states:
            self.book.fix(self.book.of(state), f"{name} starts from it, and keeps its hidden size")
        vector = self._along(self.book.of(x), x, -1, name)
        if vector is not None:
            inner = self.side(name, module, "in", -1)
            self.book.tie(vector, inner, f"{name} also reads a tensor of fixed size beside its channels")

    def _channelwise(
        self, name: str, module: nn.Module, x: Tensor, output: Tensor, dim: int | None = None
    ) -> None:
        """A layer whose channels go in and out at once."""
        labels = self.book.of(x)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            lies = varying(labels)
            front = lies[0] if len(lies) == 1 else x.ndim - 1
            dim = front - x.ndim
            several = len(module.normalized_shape) > 1 and dim != -1
            if several or x.shape[front] != module.normalized_shape[-1]:
                self.book.fix(labels, f"{name} normalises over other dimensions than its channels'")
                self.book.put(output, None)
                return
        elif dim is None:
            dim = 1 - x.ndim if x.ndim > 1 else -1
        labels = self.book.labels_or_even(x, dim)
        own = self.side(name, module, "out", dim)
        vector = self._along(labels, x, dim, name)
        if vector is None:
            self.book.fix(own, f"the input of {name} has a fixed size")
            self.book.put(output, None)
        else:
            each = len(own) // len(vector)  # a depthwise convolution may make several channels of one
            self.book.tie(
                vector.repeat_interleave(each), own, f"the input of {name} has a fixed size in part"
            )
            self.book.put(output, spread(own, output.ndim, dim))

    def _along(self, labels: Tensor | None, x: Tensor, dim: int, name: str) -> Tensor | None:
        """Labels along one dimension, as a vector; channels along another are fixed."""
        if labels is None:
            return None
        front = dim + x.ndim
        if any(d != front for d in varying(labels)):
            self.book.fix(labels, f"its channels lie along another dimension than the one that {name} reads")
            return None
        return vector_along(labels, front, x.shape[front])

    # --- operations --------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = run_operation(func, args, kwargs)
        if func._schema.name in _FILLING or (
            func._schema.name in _COPYING and any(map(self.book.is_even, tensors_among(args)))
        ):
            self.book.filled(output)
            return output
        if not self.inside:
            if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
                self.found.other_macs += flops / 2 / self.batch
            self._read((args, kwargs), "")
            operation = Operation(func, args, kwargs, output)
            if any(self.book.of(t) is not None for t in operation.operands):
                follow(self.book, operation)
        if _shares_memory(func):
            self.book.written(tensors_among((args, kwargs)))
        return output

    def weighing(
        self, name: str, module: nn.Module, x: Tensor, others: list[Tensor], run: Callable[[], Tensor]
    ) -> Tensor:
        """What a layer of `WEIGHTED` does, called by its own code."""
        output = self._as_one(x, run)
        if not self.inside:
            self.found.calls[name] += 1
            self._weighted(name, module, x, others, output)
        return output

    def each_channel(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """A function that treats every channel alike and alone, whatever operations it consists of."""
        labels = self.book.of(x)
        if set(varying(labels)) - {1}:
            return run()
        output = self._as_one(x, run)
        if not self.inside:
            self.book.put(output, labels)
        return output

    def _as_one(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """A function whose operations are not looked at."""
        if not self.inside:
            self._read(x, "")
        self.inside += 1
        try:
            return run()
        finally:
            self.inside -= 1

    def weighted_by(self, weight: int, function: str) -> None:
        """A function of `_WEIGHTING` is called by the model's code, with a weight of this identity."""
        name = self.book.own.get(weight)
        if name is not None and not self.inside:
            self.found.functional[name] = (
                f"{self.book.where()} calls {function} with it; put it in a layer of torch to let it be "
                "pruned"
            )

    def _read(self, arguments: Any, norm: str) -> None:
        for leaf in tensors_among(arguments):
            if leaf in self.makers:
                self.found.follows[self.makers[leaf]].append(norm)
            if id(leaf) in self.holders:
                self.found.borrowed.add(self.holders[id(leaf)])

    def finish(self, output: Any) -> None:
        """Fix what the model gives back."""
        outputs = tensors(output)
        if not outputs:
            raise PruningError(
                f"{self.name} returns no tensor (a {type(output).__name__}), so whether a smaller one "
                "computes the same cannot be checked; let it return tensors, in whatever holds them"
            )
        self._read(outputs, "")
        for leaf in outputs:
            self.book.fix(self.book.of(leaf), "its channels are the model's output, whose size is kept")
        for (name, _), use in self.found.sides.items():
            if name in self.found.borrowed:
                self.book.fix(
                    torch.from_numpy(use.labels), f"the code of another module reads what {name} holds"
                )
        self.book.settle(lambda name, n: any(holding(self.probe.get_submodule(name), n)))


class _Functions(TorchFunctionMode):
    """Sees layers that do more than their type says where they call what it does."""

    def __init__(self, follower: _Follower):
        super().__init__()
        self.follower = follower
        #: By the identity of their weights.
        self.layers: dict[int, tuple[str, nn.Module]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        deforming = getattr(func, "_qualified_op_name", "") == "torchvision::deform_conv2d"
        if func in _WEIGHTING or deforming:
            given = {**dict(zip(("input", "weight", "offset", "mask"), args, strict=False)), **kwargs}
            weight = id(given.get("weight"))
            if weight in self.layers:
                # Without a mask torchvision gives one of another rank.
                beside = [given[key] for key in ("offset", "mask")] if deforming else []
                places = [tensor for tensor in beside if tensor.ndim == 4]
                return self.follower.weighing(
                    *self.layers[weight], given["input"], places, lambda: func(*args, **kwargs)
                )
            self.follower.weighted_by(weight, func.__name__)
        elif func is nn.functional.instance_norm and len(read := tensors_among((args, kwargs))) == 1:
            return self.follower.each_channel(read[0], lambda: func(*args, **kwargs))
        return func(*args, **kwargs)
