"""Whether two networks compute the same, up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.utils.modules import buffers_kept, call, copied, eval_mode
from pruning.utils.tree import Inputs, fresh, tensors

#: Largest difference, relative to the largest output, that float32 rounding explains (for
#: coarser types it is 16 of their rounding steps).
TOLERANCE = 1e-4


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor] | Exception:
    """The tensors that a model gives in eval mode, or the error it ends with.

    Nothing is left of the run: neither in the inputs nor in the model's buffers. What the
    model samples is the same in every run, whatever its shape.
    """
    try:
        with torch.no_grad(), eval_mode(model), buffers_kept(model), _Settled():
            return tensors(call(model, fresh(inputs)))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        return error


def doubled(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Any]:
    """A copy in double precision, and inputs for it; there rounding is told from an error."""
    double = lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
    return copied(model).double(), pytree.tree_map(double, inputs)


class _Settled(TorchDispatchMode):
    """Random numbers without chance.

    A seed would not do: a narrower tensor draws other numbers than the wider one.
    """

    #: Neither 0 nor 1, so that what it is multiplied with and what it is compared with both show.
    VALUE = 0.5

    def __enter__(self) -> Any:
        self.fork = torch.random.fork_rng(devices=_devices())
        self.fork.__enter__()
        torch.default_generator.manual_seed(0)
        for device in _devices():
            torch.cuda.default_generators[device].manual_seed(0)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fork.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return output
        name = func._schema.name.removeprefix("aten::")
        if name == "native_dropout":
            return args[0] / (1 - args[1]) if args[1] < 1 else args[0] * 0, torch.ones_like(output[1])
        if name.startswith("bernoulli"):
            return output.fill_(1)
        drawn = name.startswith(("rand", "normal", "uniform", "exponential"))
        if drawn and isinstance(output, Tensor) and output.is_floating_point():
            output.fill_(self.VALUE)
        return output


def _devices() -> list[int]:
    """The CUDA devices whose random state a run may advance."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


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
        finite = expected.isfinite()  # what is masked out is often -inf, on both sides
        scale = torch.where(finite, expected.abs(), 0).max().item() or 1.0
        difference = torch.where(expected == got, 0, (expected - got).abs()).max().item() / scale
        if not difference <= tolerance:  # NaN included
            return f"outputs differ by {difference:.2g} of their largest value", difference
        worst = max(worst, difference)
    return "", worst
