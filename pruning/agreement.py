"""Whether two networks compute the same, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pruning.graph import tensors

#: Largest difference, relative to the largest output, that float32 rounding explains (for
#: coarser types it is 16 of their rounding steps).
TOLERANCE = 1e-4


def outputs_of(run: Callable[[], Any]) -> list[Tensor] | Exception:
    """The tensors that a run gives, or the error it ends with."""
    try:
        with torch.no_grad():
            return tensors(run())
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return error


def compare(oracle: list[Tensor] | Exception, result: list[Tensor] | Exception) -> tuple[str, float]:
    """What is wrong with the second (empty: nothing), and the largest relative difference."""
    for outputs in (oracle, result):
        if isinstance(outputs, Exception):
            return f"the model no longer runs ({outputs})", float("inf")
    assert not isinstance(oracle, Exception) and not isinstance(result, Exception)
    shapes = [tuple(t.shape) for t in oracle], [tuple(t.shape) for t in result]
    if shapes[0] != shapes[1]:
        return f"outputs of shape {shapes[0]} became {shapes[1]}", float("inf")
    if not oracle:
        return "the outputs hold no tensor to compare", float("inf")
    worst = 0.0
    for expected, got in zip(oracle, result, strict=True):
        if not expected.numel() or not (expected.is_floating_point() or expected.is_complex()):
            continue  # a choice among equals (an argmax) may fall either way
        tolerance = max(TOLERANCE, 16 * torch.finfo(expected.dtype).eps)
        scale = expected.abs().max().item() or 1.0
        difference = (expected - got).abs().max().item() / scale
        if not difference <= tolerance:  # NaN included
            return f"outputs differ by {difference:.2g} of their largest value", difference
        worst = max(worst, difference)
    return "", worst
