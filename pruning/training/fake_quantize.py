"""Quantization-aware training: round weights and activations to 8 bits in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.graph.layers import WEIGHTED, is_registered, rule_for
from pruning.utils.modules import on_input

#: Weight of the newest training batch in the moving average of a range.
MOMENTUM = 0.01

#: Smallest quantization step, for tensors that are all 0.
LEAST_STEP = 1e-8

#: Moving averages of the smallest and the largest value of a layer's input.
Range = tuple[Tensor, Tensor]


class Rounding:
    """Make a model compute like its int8 export within a `with` block (Jacob et al., arXiv 1712.05877).

    Convolutions and linear layers round their weights to 255 symmetric levels per output channel, and
    their inputs to 256 levels between the smallest and the largest value. The gradient passes the
    rounding unchanged (straight-through estimator), so training finds weights that rounding harms
    little. A BatchNorm after a layer need not be folded: it scales whole channels, which does not
    change how they are rounded. The ranges of activations are moving averages over training batches;
    before the first training batch, each batch is rounded by its own range. The parameters themselves
    are never rounded, and at the end of the block the model computes as before.

    `state_dict` returns the ranges; an interrupted training resumes from them.

    >>> layer = nn.Linear(4, 2)
    >>> with Rounding(layer):
    ...     layer(torch.rand(8, 4)).shape
    torch.Size([8, 2])
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.ranges: dict[str, Range] = {}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Rounding:
        for name, layer in self.model.named_modules():
            if isinstance(layer, WEIGHTED) and not is_registered(layer):
                self._attach(name, layer)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def state_dict(self) -> dict[str, Range]:
        """Return the range of the input of each layer, by name."""
        return dict(self.ranges)

    def load_state_dict(self, state: dict[str, Range]) -> None:
        """Restore ranges returned by `state_dict`."""
        self.ranges = dict(state)

    def _attach(self, name: str, layer: nn.Module) -> None:
        """Register hooks that round the input and the weight of a layer in the forward pass."""

        def before(module: nn.Module, _: object) -> None:
            # An instance attribute hides the parameter during the forward pass. The parameter itself
            # stays registered, so the optimizer, the state dict and the order of parameters keep it.
            if "weight" in module._parameters and module.weight.dtype == torch.float32:
                module.__dict__["weight"] = rounded_weight(module)

        def after(module: nn.Module, *_: object) -> None:
            module.__dict__.pop("weight", None)

        self.handles += [
            on_input(layer, lambda x: self._rounded_input(name, layer, x)),
            layer.register_forward_pre_hook(before),
            layer.register_forward_hook(after, always_call=True),
        ]

    def _rounded_input(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a layer's input, rounded to 256 levels; in training mode, update its range first."""
        if x.dtype != torch.float32 or not x.numel():
            return x
        low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
        known = self.ranges.get(name)
        if layer.training:
            if known is not None:
                low, high = (
                    old.to(x.device).lerp(new, MOMENTUM) for old, new in zip(known, (low, high), strict=True)
                )
            self.ranges[name] = low, high
        elif known is not None:
            low, high = (value.to(x.device) for value in known)
        step = ((high - low) / 255).clamp(min=LEAST_STEP)
        zero = (-low / step).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 255)


def rounded_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a convolution or linear layer, rounded to 255 symmetric levels per output channel.

    In a grouped transposed convolution, the output channels at the same position of every group share
    one quantization step, as in the int8 file.
    """
    weight, rule = layer.weight, rule_for(layer)
    assert rule is not None and isinstance(weight, Tensor)
    dim = rule.out["weight"]
    others = [d for d in range(weight.ndim) if d != dim]
    step = (weight.detach().abs().amax(others) / 127).clamp(min=LEAST_STEP)
    zero = torch.zeros(len(step), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, step, zero, dim, -127, 127)
