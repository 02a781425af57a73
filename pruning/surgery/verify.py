"""Verify surgery: the small model must compute the same as the masked dense model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.layer_tensors import ignore_channels, narrow
from pruning.graph.layers import is_inferred, is_read_by_parent, layer_width, rule_for, rule_of
from pruning.graph.plan import Plan
from pruning.graph.recurrent import columns, hidden_readers, is_recurrent
from pruning.surgery.apply import (
    Constants,
    apply,
    dropped_positions,
    fold_constants,
    foldable_constants,
    kept_positions,
)
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.statistics import StatisticsOverKept
from pruning.utils.compare import compare, doubled, joined, outputs_of, outputs_of_entry, to_double
from pruning.utils.entries import default_dtype
from pruning.utils.modules import copied, hooked, on_input, submodule
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs, fresh, tensors_among
from pruning.utils.wrappers import unwrapped


def verify(
    model: nn.Module,
    small: nn.Module,
    trace: Trace,
    plan: Plan,
    inputs: Inputs,
    constants: Constants | None = None,
) -> float:
    """Compare a small model with the masked dense model, and return the largest relative difference.

    In the masked model, every removed channel is set to its constant (0 without one) at the input of each
    layer, and norms over several channels compute their statistics over the kept channels. Both models
    must give the same outputs, up to rounding.

    Args:
        model: the dense model; it is not changed.
        small: the result of `apply` for this model, plan and constants.
        trace: of the dense model.
        plan: the channels that each group keeps.
        inputs: example inputs for both models.
        constants: as given to `apply`.

    Returns the largest difference between two outputs, relative to the largest output.
    Raises `PruningError` when the outputs differ in shape or value; the message names the groups at fault.

    >>> from pruning import trace
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    >>> images = torch.ones(1, 3, 9, 9)
    >>> traced, plan = trace(model, images), Plan({"0": (0, 4, 7)})
    >>> verify(model, apply(model, traced, plan), traced, plan, images) < 1e-4
    True
    """
    problem, largest = compare_with_masked(model, small, trace, plan, inputs, constants)
    if problem:
        raise PruningError(
            f"surgery is not equivalent to the plan: {problem}{_blame(model, trace, plan, inputs)}; "
            "nothing was changed. Ignore these layers, or let the code that depends on their widths take a "
            'constant (see "Read a refusal" in the documentation)'
        )
    return largest


def with_random_weights(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy of a model with random weights, so that the outputs depend on every layer.

    With initial or zero weights (a residual branch scaled by 0, for example) the outputs may hardly
    depend on the pruned layers, and `verify` would miss an error.

    Args:
        model: it is not changed.
        inputs: on which the statistics of BatchNorm layers are recalibrated.
    """
    model = unwrapped(model)
    randomized = copied(model).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for parameter in randomized.parameters():
            if parameter.ndim > 1 and parameter.numel() > max(parameter.shape):
                parameter.copy_(draw(parameter) * (2 / max(1, parameter[0].numel())) ** 0.5)
            else:
                parameter.copy_(1 + draw(parameter) / 4)
    return recalibrate(randomized, [fresh(inputs)], one_example=True)


def compare_with_masked(
    model: nn.Module,
    small: nn.Module,
    trace: Trace,
    plan: Plan,
    inputs: Inputs,
    constants: Constants | None = None,
    expected: list[Tensor] | Exception | None = None,
    in_double: bool = True,
) -> tuple[str, float]:
    """Return a description of the difference from the masked model, and the largest relative difference.

    The description is empty if the outputs agree. See `verify` for the arguments.

    Args:
        expected: `masked_outputs` of the same arguments, where the caller has them.
        in_double: whether to decide in double precision where the outputs differ.
    """
    model = unwrapped(model)
    if expected is None:
        expected = masked_outputs(model, trace, plan, inputs, constants)
    found = compare(expected, _outputs(small, trace, inputs))
    if not (found[0] and in_double and found[1] < math.inf):
        return found
    # A deep network may amplify rounding errors: decide in double precision.
    (wide, finer), (narrower, _) = doubled(model, inputs), doubled(small, ())
    with default_dtype(torch.double):
        oracle = masked_outputs(wide, trace, plan, finer, constants, to_double)
        again = compare(oracle, _outputs(narrower, trace, finer, to_double))
    return found if again[0] else again


def rounding_error(model: nn.Module, inputs: Inputs, outputs: Outputs = None) -> float:
    """Return the largest difference that rounding makes to an output, relative to the largest output.

    It is that between the model and its copy in double precision; infinite if the copy does not run.

    >>> rounding_error(nn.Linear(2, 2), torch.ones(1, 2)) < 1e-6
    True
    """
    wide, finer = doubled(model, inputs)
    with default_dtype(torch.double):
        exact = outputs_of(wide, finer, outputs)
    return compare(exact, outputs_of(model, inputs, outputs))[1]


def masked_outputs(
    model: nn.Module,
    trace: Trace,
    plan: Plan,
    inputs: Inputs,
    constants: Constants | None = None,
    convert: Callable[[Tensor], object] | None = None,
) -> list[Tensor] | Exception:
    """Return the outputs of the masked model, on the inputs and in the other calls that were traced.

    See `verify` for the arguments.

    Args:
        convert: changes the tensors of the inputs of other calls.

    Returns the error instead if the masked model does not run.
    """
    constants = constants or {}
    parts = [_run_masked(model, trace, plan, inputs, constants)]
    for entry in trace.also:
        masked = masked_copy(model, trace, plan, constants)
        with StatisticsOverKept(masked, trace, plan):
            parts.append(outputs_of_entry(masked, entry, convert))
    return joined(parts)


def _outputs(
    small: nn.Module, trace: Trace, inputs: Inputs, convert: Callable[[Tensor], object] | None = None
) -> list[Tensor] | Exception:
    """Return the outputs of the small model, as `masked_outputs` does those of the masked one."""
    others = [outputs_of_entry(copied(small), entry, convert) for entry in trace.also]
    return joined([outputs_of(small, inputs, trace.outputs), *others])


def masked_copy(model: nn.Module, trace: Trace, plan: Plan, constants: Constants) -> nn.Module:
    """Return a copy of a model whose layers ignore the channels that a plan drops: their weights are 0.

    Unlike the hooks of `verify`, this holds for code that uses the weights, such as a reparameterization.
    """
    masked, constants = copied(model), foldable_constants(trace, model, constants)
    dims = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    for (name, side), drop in dropped_positions(trace, plan).items():
        layer = submodule(masked, name) if side != "self" else None
        if layer is None:
            continue
        if side == "in":
            if name in constants:
                fold_constants(masked, name, trace, drop, constants[name])
            ignore_channels(layer, "in", drop)
        elif is_recurrent(layer):
            for weight, (dim, read) in _hidden_columns(layer, drop).items():
                own = layer.get_parameter(weight).data
                own.index_fill_(dim, read.to(own.device), 0)
        elif (rule := rule_for(layer)) is not None and rule.kind == "norm":
            layer.register_forward_hook(_norm_over_kept(layer, dims[name, side], drop), with_kwargs=True)
    return masked


def _blame(model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs) -> str:
    """Name the groups for which surgery of this group alone is wrong, for a message."""
    alone = {group: Plan({group: kept}) for group, kept in plan.keep.items()}
    culprits = [
        group
        for group, part in alone.items()
        if len(part.keep[group]) < trace.groups[group].channels
        and compare_with_masked(model, apply(model, trace, part), trace, part, inputs)[0]
    ]
    return f", at fault: {', '.join(culprits)}" if culprits else ""


def _run_masked(
    model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs, constants: Constants
) -> list[Tensor] | Exception:
    """Return the outputs of the masked model; the given model is not changed."""
    constants = foldable_constants(trace, model, constants)
    dims = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    handles: list[RemovableHandle] = []
    with hooked(handles), contextlib.ExitStack() as stack:
        for (name, side), drop in dropped_positions(trace, plan).items():
            layer = submodule(model, name) if side != "self" else None
            if layer is not None and side == "out" and is_recurrent(layer):
                stack.enter_context(_with_zeros(layer, _hidden_columns(layer, drop)))
            elif layer is not None and (is_inferred(layer) or _is_read_by_parent(model, name)):
                if side == "in":
                    into = {weight: (d, drop) for weight, d in rule_of(layer).into.items()}
                    stack.enter_context(_with_zeros(layer, into))
            elif side == "in" and layer is not None:
                value = constants.get(name, torch.zeros(int(drop.max()) + 1))[drop]
                handles.append(on_input(layer, _replace_channels(dims[name, side], drop, value)))
            elif layer is not None and (rule := rule_for(layer)) is not None and rule.kind == "norm":
                hook = _norm_over_kept(layer, dims[name, side], drop)
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        with StatisticsOverKept(model, trace, plan):
            return outputs_of(model, inputs, trace.outputs)


def _replace_channels(dim: int, drop: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that sets the dropped channels of a tensor to `value`, (dropped,)."""
    if not value.any():
        return lambda x: x.index_fill(dim, drop.to(x.device), 0)

    def replace(x: Tensor) -> Tensor:
        changed = x.movedim(dim, -1).clone()
        changed[..., drop.to(x.device)] = value.to(x)
        return changed.movedim(-1, dim)

    return replace


@contextlib.contextmanager
def _with_zeros(layer: nn.Module, zeros: Mapping[str, tuple[int, Tensor]]) -> Iterator[None]:
    """Let a layer ignore channels that its code reads for the block: its weights for them are 0.

    Args:
        zeros: by name of a weight, the dimension and the positions that are 0.
    """
    own = {name: layer.get_parameter(name) for name in zeros}
    try:
        for name, (dim, drop) in zeros.items():
            whole = own[name].detach()
            masked = rule_of(layer).merged(whole).index_fill(dim, drop.to(whole.device), 0).view(whole.shape)
            setattr(layer, name, nn.Parameter(masked, requires_grad=own[name].requires_grad))
        yield
    finally:
        for name, weight in own.items():
            setattr(layer, name, weight)


def _is_read_by_parent(model: nn.Module, name: str) -> bool:
    """Whether the layer itself does not run, so that it cannot be hooked."""
    return is_read_by_parent(submodule(model, name.rpartition(".")[0]), submodule(model, name))


def _hidden_columns(layer: nn.Module, drop: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Return the columns of a recurrent layer's weights that read the dropped hidden units."""
    width = layer_width(layer, "out")
    return {name: (1, columns(width, drop, times)) for name, times in hidden_readers(layer)}


def _norm_over_kept(
    layer: nn.Module, dim: int, drop: Tensor
) -> Callable[[nn.Module, tuple[object, ...], Mapping[str, object], Tensor], Tensor]:
    """Return a forward hook: the norm is computed over the kept channels, and the others are 0."""
    keep = kept_positions(layer_width(layer, "out"), drop)
    smaller = copy.deepcopy(layer)
    narrow(smaller, "out", keep)

    def normalize(
        _: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: Tensor
    ) -> Tensor:
        kept = keep.to(output.device)
        x = tensors_among((args, kwargs))[0]
        values = smaller(x.index_select(dim, kept)).to(output.dtype)
        return torch.zeros_like(output).index_copy(dim, kept, values)

    return normalize
