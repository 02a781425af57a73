"""Intercept functions of torch that are followed as a whole, before they call operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.surgery.linear_form import FUNCTIONS
from pruning.surgery.multihead import attended
from pruning.utils.tree import tensors_among

#: Functions that pack sequences of different lengths; each channel stays along the last dimension.
_PACKING = frozenset(("_pack_padded_sequence", "_pad_packed_sequence"))


#: Functions by which code reads the shape of a tensor.
_SHAPES = frozenset((vars(torch._C.TensorBase)["shape"].__get__, Tensor.size, Tensor.__len__))


class FunctionFollower(Protocol):
    """What `Functions` tells of the functions that it intercepts."""

    def run_layer(
        self, name: str, module: nn.Module, inputs: list[Tensor], run: Callable[[], Tensor]
    ) -> Tensor: ...

    def run_channelwise(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor: ...

    def run_packing(self, x: Tensor, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]: ...

    def run_multihead(self, read: tuple[Tensor, Tensor, Tensor], run: Callable[[], object]) -> object: ...

    def note_function(self, weight: int, function: str) -> None: ...

    def note_normalized(self, x: Tensor) -> None: ...

    def note_shape(self, x: Tensor) -> None: ...


class Functions(TorchFunctionMode):
    """Intercept the functions that the own code of convolutions and linear layers calls."""

    def __init__(self, tracer: FunctionFollower):
        super().__init__()
        self.tracer = tracer
        #: By `id` of its weight, the name of a layer and the layer.
        self.layers: dict[int, tuple[str, nn.Module]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _SHAPES:
            self.tracer.note_shape(args[0])
            return func(*args, **kwargs)
        deforming = getattr(func, "_qualified_op_name", "") == "torchvision::deform_conv2d"
        if func in FUNCTIONS or deforming:
            given = {**dict(zip(("input", "weight", "offset", "mask"), args, strict=False)), **kwargs}
            weight = id(given.get("weight"))
            if weight in self.layers:
                # Without a mask, torchvision passes an empty tensor of another rank.
                others = [given[key] for key in ("offset", "mask")] if deforming else []
                inputs = [given["input"], *(tensor for tensor in others if tensor.ndim == 4)]
                return self.tracer.run_layer(*self.layers[weight], inputs, lambda: func(*args, **kwargs))
            self.tracer.note_function(weight, func.__name__)
        elif func is nn.functional.instance_norm and len(read := tensors_among((args, kwargs))) == 1:
            return self.tracer.run_channelwise(read[0], lambda: func(*args, **kwargs))
        elif getattr(func, "__name__", "") in _PACKING:
            return self.tracer.run_packing(args[0], lambda: func(*args, **kwargs))
        elif func is nn.functional.multi_head_attention_forward:
            attention = attended(args, kwargs)
            inputs_of = attention["query"], attention["key"], attention["value"]
            return self.tracer.run_multihead(inputs_of, lambda: func(*args, **kwargs))
        elif func is nn.functional.rms_norm:
            self.tracer.note_normalized(tensors_among((args, kwargs))[0])
        return func(*args, **kwargs)
