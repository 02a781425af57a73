"""The check that surgery was right: the equivalence law on example inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.layers import layer_width, narrow
from pruning.graph.plan import Plan
from pruning.surgery.apply import Constants, apply, dropped_positions, foldable_constants, others
from pruning.surgery.batchnorm import recalibrate
from pruning.utils.compare import compare, doubled, outputs_of
from pruning.utils.modules import copied, hooked, on_input
from pruning.utils.tree import Inputs, fresh


def verify(
    model: nn.Module,
    small: nn.Module,
    trace: Trace,
    plan: Plan,
    inputs: Inputs,
    constants: Constants | None = None,
) -> float:
    """Check the equivalence law, and return the largest relative difference found.

    The dense model, with every dropped channel set to its constant (zero without one)
    wherever a layer consumes it, must compute what the small one computes. Norms that mix
    channels take their statistics over the kept ones.

    Raises `PruningError` when the outputs differ in shape or value; it names the group.
    """
    problem, largest = difference(model, small, trace, plan, inputs, constants)
    if problem:
        raise PruningError(
            f"surgery is not equivalent to the plan: {problem}{_blame(model, trace, plan, inputs)}; "
            "nothing was changed. List these layers as ignored, or mend what ties the model to its widths"
        )
    return largest


def enliven(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy with random weights under which the outputs depend on every layer.

    At initial or zero weights (a residual branch scaled by 0, say) outputs may hardly depend
    on what surgery touches, and a check of equivalence would see nothing.
    """
    lively = copied(model).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for parameter in lively.parameters():
            if parameter.ndim > 1 and parameter.numel() > max(parameter.shape):
                parameter.copy_(draw(parameter) * (2 / max(1, parameter[0].numel())) ** 0.5)
            else:
                parameter.copy_(1 + draw(parameter) / 4)
    return recalibrate(lively, [fresh(inputs)])


def difference(
    model: nn.Module,
    small: nn.Module,
    trace: Trace,
    plan: Plan,
    inputs: Inputs,
    constants: Constants | None = None,
) -> tuple[str, float]:
    """How a small model's outputs differ from what `verify` asks for, in words, and how far."""
    found = compare(_run_masked(model, trace, plan, inputs, constants or {}), outputs_of(small, inputs))
    if not found[0] or not found[1] < float("inf"):
        return found
    # A deep network may amplify rounding, or its signals vanish.
    (wide, finer), (narrow, _) = doubled(model, inputs), doubled(small, ())
    again = compare(_run_masked(wide, trace, plan, finer, constants or {}), outputs_of(narrow, finer))
    return found if again[0] else again


def _blame(model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs) -> str:
    """The groups that are at fault when narrowed alone."""
    alone = {group: Plan({group: kept}) for group, kept in plan.keep.items()}
    culprits = [
        group
        for group, part in alone.items()
        if len(part.keep[group]) < trace.groups[group].channels
        and difference(model, apply(model, trace, part), trace, part, inputs)[0]
    ]
    return f", at fault: {', '.join(culprits)}" if culprits else ""


def _run_masked(
    model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs, constants: Constants
) -> list[Tensor] | Exception:
    """The model's outputs with the dropped channels at their constants; it is left as it was."""
    constants = foldable_constants(trace, model, constants)
    lies = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    handles: list[RemovableHandle] = []
    with hooked(handles):
        for (name, side), drop in dropped_positions(trace, plan).items():
            layer = model.get_submodule(name) if side != "self" else None
            if side == "in" and layer is not None:
                value = constants.get(name, torch.zeros(int(drop.max()) + 1))[drop]
                handles.append(on_input(layer, _replace_channels(lies[name, side], drop, value)))
            elif isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
                hook = _norm_over_kept(layer, lies[name, side], drop)
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        return outputs_of(model, inputs)


def _replace_channels(dim: int, drop: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        changed = x.movedim(dim, -1).clone()
        changed[..., drop.to(x.device)] = value.to(x)
        return changed.movedim(-1, dim)

    return replace


def _norm_over_kept(
    layer: nn.LayerNorm | nn.RMSNorm | nn.GroupNorm, dim: int, drop: Tensor
) -> Callable[[nn.Module, Any, Any, Tensor], Tensor]:
    """What a norm that mixes channels gives when it sees the kept ones alone; 0 for the others."""
    keep = others(layer_width(layer, "out"), drop)
    smaller = copy.deepcopy(layer)
    narrow(smaller, "out", keep)

    def normalise(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        kept = keep.to(output.device)
        x = args[0] if args else kwargs["input"]
        values = smaller(x.index_select(dim, kept)).to(output.dtype)
        return torch.zeros_like(output).index_copy(dim, kept, values)

    return normalise
