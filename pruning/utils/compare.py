"""Compare the outputs of two networks, up to rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.errors import PruningError
from pruning.utils.entries import Entry
from pruning.utils.fast_path import without_fast_path
from pruning.utils.modules import buffers_kept, call, copied, eval_mode
from pruning.utils.outputs import Outputs, counted
from pruning.utils.tree import Inputs, fresh, map_tensors, tensors

#: Largest relative difference attributed to rounding in float32. For coarser types the tolerance is
#: 16 times the machine epsilon.
TOLERANCE = 1e-4


def outputs_of(model: nn.Module, inputs: Inputs, outputs: Outputs = None) -> list[Tensor] | Exception:
    """Return the output tensors of a model in eval mode that count, or the error of the forward pass.

    The pass changes neither the inputs nor the model's buffers. Random numbers are replaced by a
    constant, so that they do not depend on the shapes of tensors.
    """
    try:
        with torch.no_grad(), _plainly(model), buffers_kept(model), _ConstantRandomNumbers():
            return counted(call(model, fresh(inputs)), outputs)
    except PruningError:
        raise
    except Exception as error:  # of the model: its code may depend on widths
        return error


def outputs_of_entry(
    model: nn.Module, entry: Entry, convert: Callable[[Tensor], object] | None = None
) -> list[Tensor] | Exception:
    """Return the tensors that another call of a model returns, or its error; as `outputs_of`.

    Args:
        model: a copy, which the entry may change.
        convert: changes the tensors of the entry's inputs.
    """
    try:
        with torch.no_grad(), _plainly(model), _ConstantRandomNumbers():
            return tensors(entry.run(model, convert))
    except Exception as error:  # of the user's function
        return error


@contextlib.contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without kernels that compute padded positions in another way."""
    with eval_mode(model), without_fast_path():
        yield


def joined(parts: Iterable[list[Tensor] | Exception]) -> list[Tensor] | Exception:
    """Return the outputs of several calls as one list, or the first error."""
    together: list[Tensor] = []
    for outputs in parts:
        if isinstance(outputs, Exception):
            return outputs
        together += outputs
    return together


def doubled(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of a model and its inputs in double precision, to distinguish faults from rounding."""

    return copied(model).double(), map_tensors(to_double, inputs)


def to_double(tensor: Tensor) -> Tensor:
    """Return a tensor of floating-point numbers in double precision; others unchanged."""
    return tensor.double() if tensor.is_floating_point() else tensor


class _ConstantRandomNumbers(TorchDispatchMode):
    """Replace random numbers by a constant.

    A fixed seed is not enough: a narrower tensor would draw different numbers.
    """

    #: Neither 0 nor 1, so that both a product with it and a comparison have an effect.
    VALUE = 0.5

    def __enter__(self) -> _ConstantRandomNumbers:
        self.fork = torch.random.fork_rng(devices=cuda_devices())
        self.fork.__enter__()
        torch.default_generator.manual_seed(0)
        for device in cuda_devices():
            torch.cuda.default_generators[device].manual_seed(0)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.fork.__exit__(None, None, None)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return output
        name = func._schema.name.removeprefix("aten::")
        if name == "native_dropout":
            return args[0] / (1 - args[1]) if args[1] < 1 else args[0] * 0, torch.ones_like(output[1])
        if name.startswith("bernoulli"):
            return output.fill_(1)
        is_sample = name.startswith(("rand", "normal", "uniform", "exponential"))
        if is_sample and isinstance(output, Tensor) and output.is_floating_point():
            output.fill_(self.VALUE)
        return output


def cuda_devices() -> list[int]:
    """Return the CUDA devices whose random state a forward pass may change."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def compare(oracle: list[Tensor] | Exception, result: list[Tensor] | Exception) -> tuple[str, float]:
    """Compare the outputs of two networks, as `outputs_of` returns them.

    Args:
        oracle: the expected outputs. result: the outputs to compare with them.

    Returns:
        A description of the difference (empty if the outputs agree), and the largest difference,
        relative to the largest expected value of its tensor. Integers are not compared: an argmax
        may choose either of two equal values.

    >>> compare([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 3.0])])
    ('outputs differ by 0.25 of their largest value', 0.25)
    """
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
            continue
        tolerance = max(TOLERANCE, 16 * torch.finfo(expected.dtype).eps)
        finite = expected.isfinite()  # masked values are often -inf, on both sides
        scale = torch.where(finite, expected.abs(), 0).max().item() or 1.0
        difference = torch.where(expected == got, 0, (expected - got).abs()).max().item() / scale
        if not difference <= tolerance:  # NaN included
            return f"outputs differ by {difference:.2g} of their largest value", difference
        worst = max(worst, difference)
    return "", worst
