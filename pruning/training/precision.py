"""Train in lower precision, with a scaled loss where that needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pruning.errors import PruningError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def require_precision(name: str, device: torch.device) -> None:
    """Raise `PruningError` if a device cannot train in a precision.

    >>> require_precision("fp16", torch.device("cpu"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pruning.errors.PruningError: precision fp16 needs a GPU, and the network is on the cpu: ...
    """
    if name == "fp16" and device.type == "cpu":
        raise PruningError("precision fp16 needs a GPU, and the network is on the cpu: train in bf16 or fp32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise PruningError("precision bf16 is not supported by this GPU: train in fp16 or fp32")


class Precision:
    """The precision of a training: the forward pass runs in `autocast`, weights stay in float32.

    In float16 small gradients would become 0, so the loss is multiplied by a factor first, which grows
    until a gradient overflows (Micikevicius et al., arXiv 1710.03740); such a step is skipped.

    Args:
        name: fp32, bf16 or fp16.
        device: where the network is.

    Attributes:
        scales: whether the loss is scaled, so that a gradient that is not finite only skips a step.

    >>> half = Precision("bf16", torch.device("cpu"))
    >>> with half.autocast():
    ...     torch.nn.Linear(4, 2)(torch.ones(1, 4)).dtype
    torch.bfloat16
    """

    def __init__(self, name: str, device: torch.device):
        self.dtype, self.device = _DTYPES.get(name), device
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    @property
    def scales(self) -> bool:
        return self.scaler is not None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of a forward pass and its loss."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled where that is needed."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, clip_norm: float | None, params: Iterable[Tensor]
    ) -> None:
        """Take an optimizer step with the true gradients, scaled down to a norm if one is given."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, clip_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state of the scale; None without one."""
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a state returned by `state_dict`."""
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)
