"""Follow channels through a model: one forward pass in which every tensor carries labels.

Each channel on each side of each layer gets a label. The labels travel with the tensors through a pass on the
meta device: operations that move data are applied to the labels, elementwise operations tie those of their
operands (`pruning.tracing.operators`), a layer ties those of its inputs to its own and gives its outputs new
ones (`pruning.tracing.layer_rules`). Channels whose labels are tied are pruned together. Channels that reach
any other operation are fixed, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.errors import PruningError
from pruning.graph.layers import holds_layers, is_depthwise, is_read_by_parent, rule_for
from pruning.graph.recurrent import is_recurrent
from pruning.surgery.statistics import CallCounter
from pruning.surgery.width_attributes import attributes_with
from pruning.tracing.functions import Functions
from pruning.tracing.labels import Labels
from pruning.tracing.layer_rules import LayerCall, follow_layer, is_known, refuse
from pruning.tracing.movement import selects_one
from pruning.tracing.multihead import begin_multihead, tie_multihead
from pruning.tracing.operation import Operation
from pruning.tracing.operators import follow
from pruning.tracing.parameter_views import ParameterView, Weights
from pruning.tracing.record import Flow
from pruning.tracing.ties import spread, varying, vector_along
from pruning.tracing.uniform import fills, pass_uniform
from pruning.tracing.weights import WEIGHTED
from pruning.utils.meta import run_operation
from pruning.utils.modules import submodule
from pruning.utils.outputs import Outputs, counted, kept_output, named_outputs
from pruning.utils.tree import tensors, tensors_among

#: Libraries of operators whose products torch counts.
_OF_TORCH = frozenset(("aten", "prims", "torchvision"))

#: Operations that return a view of a whole parameter.
_VIEWS = frozenset(("t", "transpose", "permute", "detach", "alias", "unsqueeze", "view", "_unsafe_view"))

Result = TypeVar("Result")


class Tracer(TorchDispatchMode):
    """Label the tensors of one forward pass: hook the layers, and intercept all operations between them."""

    def __init__(self, probe: nn.Module, found: Flow):
        super().__init__()
        self.probe, self.found = probe, found
        #: By output tensor, the layer that made it, if a BatchNorm could be folded into this layer.
        self.makers = WeakTensorKeyDictionary()
        self.calls = CallCounter()
        #: Number of nested calls whose operations are not followed.
        self.depth, self.handles = 0, list[RemovableHandle]()
        # Keep all tensors alive: the `id` of one that the pass replaces could be given to a new tensor.
        self.alive = [*probe.parameters(), *probe.buffers()]
        #: By `id` of a parameter, the layer that owns it.
        self.owners: dict[int, str] = {}
        #: Layers whose parameters code outside of them multiplies by, with the parameter.
        self.multiplied: list[tuple[str, ParameterView | None]] = []
        self.functions = Functions(self)
        owned: set[int] = set()
        for name, module in probe.named_modules():
            owned.update(self._hook(name, module))
        # Code outside a layer may read its bias, scales or kernels, which are then as any other parameter.
        for p in probe.parameters():
            layer = self.owners.get(id(p))
            if layer is not None and (p.ndim == 1 or is_depthwise(submodule(probe, layer))):
                owned.discard(id(p))
        loose = {
            id(tensor): name
            for name, tensor in (*probe.named_parameters(), *probe.named_buffers())
            if id(tensor) not in owned and tensor.is_floating_point() and tensor.numel()
        }
        self.labels = Labels(found, loose, Weights(probe))

    # --- layers ------------------------------------------------------------------------

    def _hook(self, name: str, module: nn.Module) -> set[int]:
        """Hook a module; return the ids of its tensors if it is a layer with a rule."""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks; its tensors keep their size
            return {id(t) for t in (*own.values(), *module.buffers(recurse=False))}
        if not is_known(module, own) or name in self.found.opened:
            self._add_hooks(module, self._enter_module(name, module), self._leave_module)
            return set()
        if holds_layers(module) and "weight" in own:
            self.functions.layers[id(own["weight"])] = name, module
            self._add_hooks(module, self._enter_module(name, module), self._leave_module)
        else:
            parent = submodule(self.probe, name.rpartition(".")[0])
            if not is_read_by_parent(parent, module):
                self.owners.update((id(t), name) for t in own.values())
            self._add_hooks(module, self._enter_layer(name, module), self._leave_layer(name, module))
        return {id(t) for t in (*own.values(), *module.buffers(recurse=False))}

    def _add_hooks(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _enter_module(self, name: str, module: nn.Module) -> Callable[..., None]:
        described = f"{name} ({type(module).__name__})".lstrip()

        def before(*_: object) -> None:
            self.labels.path.append((name, described))

        return before

    def _leave_module(self, _: nn.Module, args: object, kwargs: object, output: object) -> None:
        name, _described = self.labels.path.pop()
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            self.found.seen[name] = [
                vector_along(labels, dims[0], x.shape[dims[0]]).numpy()
                for x in tensors_among((output,))
                if len(dims := varying(labels := self.labels.carried(x))) == 1 and labels is not None
            ]

    def _enter_layer(self, name: str, module: nn.Module) -> Callable[..., None]:
        norm = name if isinstance(module, nn.modules.batchnorm._BatchNorm) else ""

        def before(_: nn.Module, args: object, kwargs: object) -> None:
            if not self.depth:
                self._read((args, kwargs), norm)
            self.depth += 1

        return before

    def _leave_layer(self, name: str, module: nn.Module) -> Callable[..., None]:
        def after(_: nn.Module, args: object, kwargs: object, output: object) -> None:
            self.depth -= 1
            inputs = tensors_among((args, kwargs))
            rule = rule_for(module)
            if self.depth or not (inputs or (rule is not None and rule.kind == "embedding")):
                return  # an embedding may be given the number of positions alone
            self.follow_layer(name, module, inputs, output)

        return after

    def follow_layer(self, name: str, module: nn.Module, inputs: list[Tensor], output: object) -> None:
        """Apply the rule of a layer to one call of it."""
        outputs = tensors_among((output,))
        call = LayerCall(name, module, inputs, (outputs or inputs)[0], outputs)
        # Operations on labels are not part of the pass, and would take most of its time if followed.
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            if not isinstance(output, Tensor) and not is_recurrent(module):
                refuse(self.labels, call, f"{name} returns a {type(output).__name__}, no tensor")
            elif follow_layer(self.labels, call):
                self.makers[outputs[0]] = name
                self.found.readers.setdefault(name, [])

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    # --- operations --------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        with torch._C.DisableTorchFunction():  # `_Functions` has seen the call already
            return self._follow_operation(func, args, kwargs or {})

    def _follow_operation(
        self, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        output = run_operation(func, args, kwargs)
        self.found.done.note_batch(func, args)
        if fills(self.labels, func._schema.name, args):
            self.labels.mark_uniform(output)
            self.labels.filled.note(output)
            return output
        if not self.depth:
            if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
                self.found.other_macs += flops / 2
            elif func.namespace not in _OF_TORCH:
                self.found.foreign.add(self.labels.path[-1][0])
            operation = Operation(func, args, kwargs, output)
            if self.found.composed or self.found.axes is not None:
                self.labels.weights.computed.note(operation.operands, output)
            self._read_by(operation)
            place = self.calls.place(self.labels.path[-1][0], func)
            self.labels.place = None if self.probe.training else place  # outputs are compared in eval mode
            self.labels.fix_positions(operation.operands)
            if selects_one(self.labels, operation):  # code may read no more than its shape
                self.labels.defer(operation.output, partial(follow, self.labels, operation))
            elif operation.name in WEIGHTED or any(self.labels.of(t) is not None for t in operation.operands):
                follow(self.labels, operation)
        if self.labels.has_uniform:
            pass_uniform(self.labels, func, tensors_among((args, kwargs)), output, not self.depth)
        return output

    def run_layer(
        self, name: str, module: nn.Module, inputs: list[Tensor], run: Callable[[], Tensor]
    ) -> Tensor:
        """Run the function that a convolution or linear layer's own code calls, under the layer's rule."""
        output = self._run_whole(inputs[0], run)
        if not self.depth:
            self.follow_layer(name, module, inputs, output)
        return output

    def run_channelwise(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run a function that treats all channels alone and in the same way, without following it."""
        labels = self.labels.of(x)
        if set(varying(labels)) - {1}:
            return run()
        output = self._run_whole(x, run)
        if not self.depth:
            self.labels.put(output, labels)
        return output

    def run_packing(self, x: Tensor, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run a function that packs sequences or undoes it, without following it."""
        labels = self.labels.of(x)
        packed, sizes = self._run_whole(x, run)
        if labels is not None and not self.depth:
            if varying(labels) == [x.ndim - 1]:
                vector = vector_along(labels, x.ndim - 1, x.shape[-1])
                self.labels.put(packed, spread(vector, packed.ndim, -1))
            else:
                self.labels.fix(labels, f"{self.labels.where()} packs channels along another dimension")
        return packed, sizes

    def run_multihead(self, read: tuple[Tensor, Tensor, Tensor], run: Callable[[], object]) -> object:
        """Run the function that `nn.MultiheadAttention` calls, and tie the channels that its code ties."""
        name = self.labels.path[-1][0]
        layer = submodule(self.probe, name)
        if not isinstance(layer, nn.MultiheadAttention) or self.depth:
            return run()
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            begin_multihead(self.labels, name, layer, read)
        output = run()
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            tie_multihead(self.labels, name, layer, read)
        return output

    def _run_whole(self, x: Tensor, run: Callable[[], Result]) -> Result:
        """Run a function without following its operations."""
        if not self.depth:
            self._read(x, "")
        self.depth += 1
        try:
            return run()
        finally:
            self.depth -= 1

    def note_function(self, weight: int, function: str) -> None:
        """Record that the code calls a function with a parameter outside the layers, given by its `id`."""
        name = self.labels.loose.get(weight)
        if name is not None and not self.depth:
            self.found.functional[name] = (
                f"{self.labels.where()} calls {function} with it; put it in a layer of torch to let it be "
                "pruned"
            )

    def note_shape(self, x: Tensor) -> None:
        """Record that the code reads the shape of a tensor: it may compare a width with a constant."""
        labels = self.labels.carried(x)
        if labels is not None and not self.depth and varying(labels):
            self.labels.note_sizes(labels, labels)

    def note_normalized(self, x: Tensor) -> None:
        """Record that the code normalizes over a given size, which on the meta device may be wrong."""
        labels = self.labels.of(x)
        if labels is not None and not self.depth and varying(labels) == [x.ndim - 1]:
            why = f"{self.labels.where()} normalizes over a size that does not follow its width"
            self.labels.note_positions([vector_along(labels, x.ndim - 1, x.shape[-1])], why)

    def _read(self, arguments: object, norm: str) -> None:
        """Record who reads tensors: the BatchNorm of this name, or "" for anything else."""
        for leaf in tensors_among((arguments,)):
            if leaf in self.makers:
                self.found.readers[self.makers[leaf]].append(norm)
            if id(leaf) in self.owners:
                self.found.read_elsewhere.add(self.owners[id(leaf)])

    def _read_by(self, op: Operation) -> None:
        """Record what an operation reads; views of weights, and products with them, may be followed."""
        viewed = op.name in _VIEWS and id(op.operands[0]) in self.owners
        if viewed and isinstance(op.output, Tensor):
            self.owners[id(op.output)] = self.owners[id(op.operands[0])]
            self.alive.append(op.output)
        elif op.name in WEIGHTED:
            owned = [t for t in op.operands if id(t) in self.owners]
            self._read([t for t in op.operands if id(t) not in self.owners], "")
            self.multiplied += [(self.owners[id(t)], self.labels.weights.find(t)) for t in owned]
        else:
            self._read((op.args, op.kwargs), "")

    def finish(self, output: object, outputs: Outputs) -> None:
        """Fix the channels of the outputs that count, and tie the slices that the pass recorded."""
        if not tensors(output):
            raise PruningError(
                f"{type(self.probe).__name__} returns no tensor (a {type(output).__name__}), so whether a "
                "smaller one computes the same cannot be checked; let it return tensors, in any container"
            )
        self._read(tensors(output), "")
        try:
            kept = counted(output, outputs)
        except PruningError:
            if not self.probe.training:
                raise
            kept = tensors(output)  # in training mode a model may return something else
        self.labels.fix_positions(kept)
        names = {id(tensor): name for name, tensor in named_outputs(output).items()}
        for leaf in kept:
            self.labels.fix(self.labels.of(leaf), kept_output(names.get(id(leaf), ""), len(names)))
        self._close()

    def finish_entry(self, output: object, name: str) -> None:
        """Finish the pass of another call of the model, by its name; it need not return tensors."""
        outputs = tensors(output)
        self._read(outputs, "")
        self.labels.fix_positions(outputs)
        for leaf in outputs:
            reason = (
                f"its channels are an output of {name}, whose size is kept; return only what has to keep it"
            )
            self.labels.fix(self.labels.of(leaf), reason)
        self._close()

    def _close(self) -> None:
        for name in self.found.reduced.keys() - self.found.noted.keys() - self.found.composed.keys():
            self.labels.fix(torch.from_numpy(self.found.sides[name, "self"].labels), self.found.reduced[name])
        for owner, place in self.multiplied:
            if place is None or (place.full_name, "in") not in self.found.sides:
                self.found.read_elsewhere.add(owner)
        for (name, side), use in self.found.sides.items():
            layer = name.rpartition(".")[0] if side == "self" else name
            if layer in self.found.read_elsewhere and (side != "self" or (layer, "out") in self.found.sides):
                reason = f"the code of another module reads what {layer} holds"
                self.labels.fix(torch.from_numpy(use.labels), reason)
        self.labels.close_slices(lambda name, value: any(attributes_with(submodule(self.probe, name), value)))
