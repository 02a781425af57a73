"""Count the work of a forward pass, and note the batches of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pruning.utils.meta import run_operation
from pruning.utils.tree import storage_of, tensors_among


@dataclass
class Pass:
    """What a forward pass did.

    Attributes:
        flops: that torch's formulas count, but for those of weights that code computes from others.
        batches: sizes of the batches of convolutions and BatchNorms.
        shapes: of the outputs.
    """

    flops: float = 0.0
    batches: set[int] = field(default_factory=set)
    shapes: list[torch.Size] = field(default_factory=list)

    def note_batch(self, func: OpOverload, args: Sequence[object]) -> None:
        """Note the batch of an operation if it is a convolution or a BatchNorm."""
        if func._schema.name.endswith(("convolution", "batch_norm")) and isinstance(args[0], Tensor):
            self.batches.add(args[0].shape[0])


class ComputedFromParameters:
    """Tell tensors that depend on parameters and buffers alone, such as weights that code computes.

    Args:
        model: the model that runs.
    """

    def __init__(self, model: nn.Module) -> None:
        #: The tensors by their memory, kept alive so that no other tensor takes it.
        self._known = {storage_of(t)[0]: t for t in (*model.parameters(), *model.buffers())}

    def __contains__(self, tensor: Tensor) -> bool:
        return storage_of(tensor)[0] in self._known

    def note(self, operands: Sequence[Tensor], output: object) -> bool:
        """Note an operation that has run; return whether its outputs are such tensors."""
        computed = bool(operands) and all(t in self for t in operands)
        for made in tensors_among((output,)):
            if computed:
                self._known.setdefault(storage_of(made)[0], made)
            elif operands and made is operands[0]:  # written in place
                self._known.pop(storage_of(made)[0], None)
        return computed


class Work(TorchDispatchMode):
    """Count the FLOPs of a forward pass, and note the batches of its convolutions and BatchNorms.

    A weight that code computes from parameters (W + B A of a LoRA) is the same for every batch. The products
    that compute it are left out: they tell nothing about the examples, and may outweigh a small batch.

    Args:
        model: the model that runs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.done = Pass()
        self.computed = ComputedFromParameters(model)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        output = run_operation(func, args, kwargs)
        computed = self.computed.note(tensors_among((args, kwargs)), output)
        if func._overloadpacket in flop_registry and not computed:
            self.done.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
        self.done.note_batch(func, args)
        return output
