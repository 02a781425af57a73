"""Whole layers: which of them a model can do without, and the model without them.

Two kinds can go. A hidden layer, when a single layer consumes its channels: that layer is
fitted anew, by least squares on calibration data, to do the work of both; where nothing
non-linear lies between the two, this is exact. And a residual block, when its input can
pass in its place. Training then makes up for the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Trace
from pruning.graph.layers import WEIGHTED
from pruning.surgery.apply import replace_module
from pruning.utils.meta import Shapes, without_storage
from pruning.utils.modules import call, call_until, copied, eval_mode, hooked, on_input
from pruning.utils.tree import Inputs, fresh, tensors, tensors_among

#: Added to the diagonal of the normal equations, relative to its mean: inputs that hardly
#: vary in the calibration data get no weight.
RIDGE = 1e-5


@dataclass(frozen=True)
class Removable:
    """A layer that can go.

    Attributes:
        name: of the hidden layer or the residual block.
        bypassed: the modules that an identity replaces.
        joined: the layer that is fitted anew; empty for a residual block.
    """

    name: str
    bypassed: tuple[str, ...]
    joined: str = ""


def removable(model: nn.Module, traced: Trace, inputs: Inputs) -> dict[str, Removable]:
    """The layers that the model can do without, by name, in the order of the forward pass.

    Args:
        model: left as it is. traced: of this model; layers that it ignores stay, and with
            them the blocks around them. inputs: example inputs, as `trace` takes them.
    """
    seen = _observe(model, inputs)
    probe, example = without_storage(model, lambda copied, x: call(copied, x), inputs)
    found: dict[str, Removable] = {}
    for name, uses in seen.items():
        if len(uses) != 1 or not name:
            continue
        candidate = None
        if name in traced.groups:
            candidate = _hidden(model, traced.groups[name], seen)
        elif _passes_input_on(model.get_submodule(name), uses[0]):
            kept = any(f"{layer}.".startswith(f"{name}.") for layer in traced.ignored)
            candidate = None if kept else Removable(name, (name,))
        if candidate is not None and _runs(probe, candidate, example, seen):
            found[name] = candidate
    # Of nested blocks (a stage of blocks passes its input on, too) the innermost.
    blocks = [name for name, candidate in found.items() if not candidate.joined]
    return {
        name: candidate
        for name, candidate in found.items()
        if candidate.joined or not any(other.startswith(f"{name}.") for other in blocks)
    }


def without_layer(
    model: nn.Module, traced: Trace, layer: Removable, batches: Iterable[Inputs] = ()
) -> nn.Module:
    """A new model without a layer; the given one is left as it is.

    Args:
        traced: of the model. layer: as `removable` gave it.
        batches: calibration inputs, to fit the joined layer.

    Raises `PruningError` when a layer must be fitted and there is no calibration data.
    """
    smaller = _bypassed(model, layer)
    if layer.joined:
        _fit(model, smaller, layer, list(batches), traced.foldable.get(layer.joined))
    smaller.zero_grad(set_to_none=True)
    return smaller


@dataclass
class _Use:
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self) -> list[Tensor]:
        return tensors_among((*self.args, *self.kwargs.values()))


def _observe(model: nn.Module, inputs: Inputs) -> dict[str, list[_Use]]:
    """Every module's calls in a forward pass, in the order in which they begin."""
    seen: dict[str, list[_Use]] = {}
    handles = []

    def begin(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(name, []).append(_Use(args, kwargs, None))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            seen[name][-1].output = output

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(begin(name), with_kwargs=True))
        handles.append(module.register_forward_hook(end(name)))
    with hooked(handles), torch.no_grad(), eval_mode(model):
        call(model, fresh(inputs))
    return seen


def _hidden(model: nn.Module, group: Group, seen: dict[str, list[_Use]]) -> Removable | None:
    """The layer that makes a group's channels, when one other layer consumes all of them."""
    makers = [m.layer for m in group.side("out")]
    weighted = [m for m in makers if isinstance(model.get_submodule(m), WEIGHTED)]
    consumers = group.side("in")
    if len(weighted) != 1 or len(consumers) != 1 or group.side("self"):
        return None
    layer, consumer = model.get_submodule(weighted[0]), model.get_submodule(consumers[0].layer)
    if len(consumers[0].index) != group.channels or len(seen.get(consumers[0].layer, ())) != 1:
        return None
    for fitted in (layer, consumer):
        if not isinstance(fitted, nn.Linear) and not (isinstance(fitted, nn.Conv2d) and fitted.groups == 1):
            return None
    if isinstance(consumer, nn.Conv2d) and consumer.padding_mode != "zeros":
        return None
    if (
        consumer.in_features != group.channels
        if isinstance(consumer, nn.Linear)
        else (consumer.in_channels != group.channels)
    ):
        return None
    use = seen[weighted[0]][0]
    if isinstance(layer, nn.Conv2d) and use.args[0].shape[2:] != use.output.shape[2:]:
        return None
    return Removable(weighted[0], tuple(makers), consumers[0].layer)


def _passes_input_on(module: nn.Module, use: _Use) -> bool:
    """Whether a module returns its input when all its parameters are 0: a residual block."""
    if not any(True for _ in module.children()) or not list(module.parameters()):
        return False
    if len(use.args) != 1 or use.kwargs or not isinstance(use.args[0], Tensor):
        return False
    x, y = use.args[0], use.output
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype or not x.any():
        return False
    zeroed = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in zeroed.parameters():
            parameter.zero_()
        try:
            return torch.equal(zeroed(x), x)
        except (RuntimeError, ValueError):
            return False


def _input_of(model: nn.Module, name: str, inputs: Inputs) -> Tensor:
    """What a layer receives in a forward pass."""
    with torch.no_grad():
        return call_until(model, inputs, name, "in").detach()


def _bypassed(model: nn.Module, layer: Removable) -> nn.Module:
    """A copy with identities in place of the bypassed modules.

    The activation behind them now sees the tensor that they received, which others may use,
    too: it must not write into it.
    """
    smaller = copied(model)
    for name in layer.bypassed:
        replace_module(smaller, name, nn.Identity())
    for module in smaller.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute
    return smaller


def _runs(model: nn.Module, layer: Removable, inputs: Inputs, seen: dict[str, list[_Use]]) -> bool:
    """Whether the model still fits together without the layer, and can be trained.

    One pass shows it: the joined layer takes its new width when its input arrives.
    """
    probe = _bypassed(model, layer)
    if layer.joined:
        joined = probe.get_submodule(layer.joined)
        before = seen[layer.joined][0].inputs()[0].shape
        on_input(joined, lambda x: _take_width(joined, x, before))
    try:
        with Shapes():
            shapes = [t.shape for t in _trainable_outputs(probe, inputs)]
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError):
        return False
    return bool(layer.joined) or shapes == [t.shape for t in tensors(seen[""][0].output)]


def _take_width(joined: Any, x: Tensor, before: torch.Size) -> None:
    """Make a layer's weights fit an input that differs from the one before in its channels alone."""
    linear = isinstance(joined, nn.Linear)
    if (x.shape[:-1] != before[:-1]) if linear else (x.shape[2:] != before[2:]):
        raise ValueError(f"{tuple(x.shape)} arrives in place of {tuple(before)}")
    width = x.shape[-1] if linear else x.shape[1]
    per_row = width * math.prod(getattr(joined, "kernel_size", ()))
    _replace_weights(joined, joined.weight.new_zeros(len(joined.weight), per_row))


def _trainable_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Outputs of a forward pass that a backward pass could follow; raises RuntimeError if not.

    An operation that writes into a tensor which the backward pass needs is found here.
    """
    with torch.enable_grad(), eval_mode(model):
        outputs = tensors(call(model, fresh(inputs)))
        total = torch.stack([t.float().sum() for t in outputs if t.requires_grad]).sum()
        total.backward()
    return outputs


def _fit(
    model: nn.Module, smaller: nn.Module, layer: Removable, batches: list[Inputs], norm: str | None
) -> None:
    """Fit the joined layer: least squares from what it now receives to what it gave before."""
    if not batches:
        raise PruningError(f"calibration data is needed to join {layer.name} and {layer.joined}")
    joined: Any = model.get_submodule(layer.joined)
    offset = joined.bias is not None or norm is not None
    gram: Any = 0.0
    cross: Any = 0.0
    weight: Tensor
    bias: Any
    with torch.no_grad():
        for inputs in batches:
            wanted = joined(_input_of(model, layer.joined, inputs))
            given, wanted = _rows(joined, _input_of(smaller, layer.joined, inputs), wanted)
            if offset:
                given = torch.cat([given, given.new_ones(len(given), 1)], 1)
            gram, cross = gram + given.T @ given, cross + given.T @ wanted
        diagonal = gram.diagonal()
        ridge = torch.full_like(diagonal, RIDGE * diagonal.mean().item() + 1e-12)
        if offset:
            ridge[-1] = 0
        solved = torch.linalg.solve(gram + torch.diag(ridge), cross).to(joined.weight)
        weight, bias = (solved[:-1], solved[-1]) if offset else (solved, None)
        fitted = smaller.get_submodule(layer.joined)
        _replace_weights(fitted, weight.T)
        if joined.bias is not None:
            fitted.get_parameter("bias").copy_(bias)
        elif norm is not None:
            smaller.get_submodule(norm).get_buffer("running_mean").sub_(bias)


def _rows(joined: nn.Module, given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer as the rows of a linear regression, in float64."""
    if isinstance(joined, nn.Conv2d):
        padding: Any = joined.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":
            given = F.pad(given, joined._reversed_padding_repeated_twice)
            padding = 0
        given = F.unfold(given, joined.kernel_size, joined.dilation, padding, joined.stride)
        given, wanted = given.movedim(1, -1), wanted.flatten(2).movedim(1, -1)
    return given.flatten(0, -2).double(), wanted.flatten(0, -2).double()


def _replace_weights(layer: Any, weight: Tensor) -> None:
    """Give a linear layer or convolution weights (outputs, inputs × kernel) of another input width."""
    if isinstance(layer, nn.Conv2d):
        layer.in_channels = weight.shape[1] // math.prod(layer.kernel_size)
        weight = weight.reshape(len(weight), layer.in_channels, *layer.kernel_size)
    else:
        layer.in_features = weight.shape[1]
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
