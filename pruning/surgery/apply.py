"""Surgery: apply a plan to a model and return the smaller model."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.deformable import DeformableConv
from pruning.graph.groups import Trace
from pruning.graph.inferred import reinstate
from pruning.graph.layer_tensors import narrow, output_rows, readers
from pruning.graph.layers import is_inferred, is_registered, layer_width, parts, rule_of, weight_of
from pruning.graph.plan import Plan
from pruning.graph.rule import Side, dimensions, in_rectangle
from pruning.surgery.held_weights import narrows_with_layer, set_counts, set_parametrized_counts
from pruning.surgery.width_attributes import mark_changed, update_attributes
from pruning.utils.held_weight import HeldWeight
from pruning.utils.modules import (
    buffers_unchanged,
    call,
    copied,
    eval_mode,
    hooked,
    on_input,
    parameter_places,
    submodule,
)
from pruning.utils.sharing import sharing
from pruning.utils.tree import Inputs, fresh, noise_like
from pruning.utils.wrappers import unwrapped

#: By layer, the constant that replaces each input channel when it is removed, (input channels,).
Constants = Mapping[str, Tensor]


def apply(
    model: nn.Module, trace: Trace, plan: Plan, constants: Constants | None = None, *, shared: bool = False
) -> nn.Module:
    """Return a copy of a model that keeps only the channels of a plan.

    Args:
        model: the traced model; it is not changed.
        trace: of this model.
        plan: the channels that each group keeps; a group that it does not name keeps all.
        constants: values of input channels (see `channel_constants`). The contribution of the removed
            channels is folded into the layer's bias, or into the running mean of the BatchNorm behind it.
        shared: whether parameters that stay whole are the model's own, for one comparison without constants.

    Returns a new model on the same device, in the same mode, without gradients.
    Raises `PruningError` for a plan that names a group or channel which the trace does not have.

    >>> from pruning import trace
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3))
    >>> small = apply(model, trace(model, torch.zeros(1, 3, 9, 9)), Plan({"0": (0, 4, 7)}))
    >>> small[0].weight.shape, small[1].num_features, small[3].in_channels
    (torch.Size([3, 3, 3, 3]), 3, 3)
    """
    model = unwrapped(model)
    dropped = dropped_positions(trace, plan)
    # Share weights that are narrowed below with the copy: copying them at full width would be wasted.
    narrowed = [
        weight
        for name, side in dropped
        if side != "self" and (weight := _weight_along(submodule(model, name), side)) is not None
    ]
    small = sharing(model) if shared else copied(model, {id(weight): weight for weight in narrowed})
    # Fold while every layer still has its full width, then narrow.
    for (name, side), drop in dropped.items():
        if side == "in" and constants is not None and name in constants:
            fold_constants(small, name, trace, drop, constants[name])
    _cut(small, trace, plan, dropped)
    for (name, side), factors in output_factors(model, trace, plan).items():
        _scale(small, name, side, trace, factors)
    if not shared:
        small.zero_grad(set_to_none=True)
    return small


def _weight_along(layer: nn.Module, side: Side) -> Tensor | None:
    """Return the weight of a layer if it has a dimension for the channels of this side."""
    rule = rule_of(layer)
    return weight_of(layer) if rule.weight in (rule.out if side == "out" else rule.into) else None


def cut_channels(model: nn.Module, trace: Trace, plan: Plan) -> None:
    """Remove the channels that a plan does not keep from a model, in place."""
    _cut(model, trace, plan, dropped_positions(trace, plan))


def _cut(model: nn.Module, trace: Trace, plan: Plan, dropped: Mapping[tuple[str, Side], Tensor]) -> None:
    dims = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    shared = [places for places in parameter_places(model).values() if len(places) > 1]
    # Remove output channels first: fewer elements are then gathered for the input channels.
    for (name, side), drop in sorted(dropped.items(), key=lambda item: item[0][1] != "out"):
        if side == "self":
            _narrow_tensor(model, name, dims[name, side], drop)
        else:
            layer = submodule(model, name)
            if isinstance(layer, HeldWeight) and narrows_with_layer(name, layer, dims):
                continue
            narrow(layer, side, kept_positions(layer_width(layer, side), drop))
            if isinstance(layer, HeldWeight):
                set_counts(layer.owner)
            if is_registered(layer):
                rule = rule_of(layer)
                mark_changed(layer, [name for name in (rule.count(side), rule.parts) if name])
    for (first, attribute), *others in shared:  # each was narrowed for itself
        for name, other in others:
            setattr(submodule(model, name), other, submodule(model, first).get_parameter(attribute))
    set_parametrized_counts(model, [name for name, _ in dropped])
    update_attributes(model, trace, plan)


def output_factors(model: nn.Module, trace: Trace, plan: Plan) -> dict[tuple[str, Side], Tensor]:
    """Return the factors by which a plan multiplies the kept outputs of layers, (kept,) each.

    They keep the scales of products that the code computes from a width, see `Rescale`.
    """
    dropped = {name: trace.groups[name].dropped(kept) for name, kept in plan.keep.items()}
    factors: dict[tuple[str, Side], Tensor] = {}
    for rescale in trace.rescales:
        share = 1 - len(rescale.summed.dropped(dropped)) / rescale.summed.size
        if share == 1:
            continue
        layer, side = rescale.layer, rescale.side
        width = (
            operator.attrgetter(layer)(model).shape[rescale.dim]
            if side == "self"
            else layer_width(submodule(model, layer), side)
        )
        whole = factors.setdefault((layer, side), torch.ones(width, dtype=torch.double))
        whole[rescale.index] *= share**rescale.power
    removed = dropped_positions(trace, plan) if factors else {}
    return {
        key: whole[kept_positions(len(whole), removed[key])] if key in removed else whole
        for key, whole in factors.items()
    }


def _scale(model: nn.Module, name: str, side: Side, trace: Trace, factors: Tensor) -> None:
    """Multiply the outputs of a layer, or a tensor, by factors along its channels, in place."""
    if side == "self":
        owner, _, attribute = name.rpartition(".")
        dims = [r.dim for r in trace.rescales if (r.layer, r.side) == (name, side)]
        tensors = [(submodule(model, owner), attribute, dims[0])]
    else:
        layer = submodule(model, name)
        tensors = [(layer, key, dim) for key, dim in rule_of(layer).out.items()]
    for module, attribute, dim in tensors:
        tensor = getattr(module, attribute, None)
        if isinstance(tensor, Tensor):
            matrix = tensor.detach() if side == "self" else rule_of(module).merged(tensor.detach())
            scaled = matrix.movedim(dim, -1).mul(factors.to(tensor)).movedim(-1, dim).reshape(tensor.shape)
            if isinstance(tensor, nn.Parameter):
                scaled = nn.Parameter(scaled, requires_grad=tensor.requires_grad)
            setattr(module, attribute, scaled)


def kept_positions(width: int, drop: Tensor) -> Tensor:
    """Return the positions below `width` that are not dropped, sorted.

    >>> kept_positions(5, torch.tensor([1, 3]))
    tensor([0, 2, 4])
    """
    keep = torch.ones(width, dtype=torch.bool)
    keep[drop] = False
    return keep.nonzero().flatten()


def _narrow_tensor(model: nn.Module, name: str, dim: int, drop: Tensor) -> None:
    """Remove positions from a parameter or buffer, in place."""
    owner, _, attribute = name.rpartition(".")
    module = submodule(model, owner)
    tensor = getattr(module, attribute)
    dims = dimensions(tensor, dim)
    keep = kept_positions(math.prod(tensor.shape[d] for d in dims), drop)
    kept = in_rectangle(tensor.detach(), dims, keep)
    if isinstance(tensor, nn.Parameter):
        kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
    setattr(module, attribute, kept)


def dropped_positions(trace: Trace, plan: Plan) -> dict[tuple[str, Side], Tensor]:
    """Return, for each side of each layer that loses channels, the positions that are removed, sorted."""
    reinstate(trace.inferred)
    dropped: dict[tuple[str, Side], list[Tensor]] = {}
    for name, kept in plan.keep.items():
        group = trace.groups.get(name)
        if group is None:
            raise PruningError(
                f"the plan names group {name!r}, which this model does not have; give a plan of its groups: "
                f"{', '.join(trace.groups) or 'none'}"
            )
        if kept[-1] >= group.channels:
            raise PruningError(
                f"the plan keeps channel {kept[-1]} of {name!r}, whose last channel is "
                f"{group.channels - 1}; give a plan for this model"
            )
        drop = group.dropped(kept)
        for member in group.members if drop.any() else ():
            positions = member.index[drop[member.channel]]
            dropped.setdefault((member.layer, member.side), []).append(positions)
    return {side: torch.cat(positions).unique() for side, positions in dropped.items()}


def may_leave_constants(model: nn.Module, trace: Trace, plan: Plan) -> bool:
    """Whether a removed channel may be a nonzero constant: its norm's scale or all its weights are 0.

    Otherwise `channel_constants(..., exact_only=True)` finds no constant.
    """
    for (name, side), drop in dropped_positions(trace, plan).items():
        layer = submodule(model, name) if side == "out" else None
        weight = weight_of(layer) if layer is not None else None
        if layer is None or weight is None:
            continue  # an input, or a norm without scales
        rows = output_rows(layer, rule_of(layer).weight, weight.detach())
        at = drop.to(rows.device)
        at = at[rows[at, 0] == 0]  # checking one weight excludes most rows
        if len(at) and (~rows[at].any(1)).any():
            return True
    return False


@buffers_unchanged
def channel_constants(
    model: nn.Module, trace: Trace, batches: Iterable[Inputs], *, exact_only: bool = False
) -> dict[str, Tensor]:
    """Return the mean of each input channel of the layers that read prunable channels.

    A channel with γ = 0 is constant: its mean is the activation of β, and `apply` folds it without error.
    For any other channel the mean is the constant with the least squared error.

    Args:
        model: the traced model; it is not changed.
        trace: of this model.
        batches: calibration inputs, in the form that `trace` takes.
        exact_only: return 0 for channels that are not constant. Example inputs then suffice: the model
            also runs on noise of their shape, on which such channels vary.

    Returns a tensor (input channels,) for each layer that reads prunable channels, except for layers that
    pad with zeros: at the border, the padding takes the place of the constant.

    >>> from pruning import trace
    >>> model, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.ones(2, 4)
    >>> constants = channel_constants(model, trace(model, inputs), [inputs, -inputs])
    >>> {name: mean.shape for name, mean in constants.items()}
    {'2': torch.Size([6])}
    """
    seen: dict[str, _Statistics] = {}
    handles: list[RemovableHandle] = []
    with hooked(handles), torch.no_grad(), eval_mode(model):
        for group in trace.groups.values():
            for member in group.side("in"):
                layer = submodule(model, member.layer)
                if _pads_with_zeros(layer) or is_inferred(layer) or member.layer in seen:
                    continue
                seen[member.layer] = _Statistics(member.dim)
                handles.append(on_input(layer, seen[member.layer].observe))
        for inputs in batches:
            for variant in (inputs, *(noise_like(inputs) if exact_only else ())):
                call(model, fresh(variant))
    return {name: found.constants(exact_only) for name, found in seen.items() if found.count}


class _Statistics:
    """Mean and range of each channel of a layer's input; channels lie along dimension `dim`."""

    def __init__(self, dim: int):
        self.dim, self.count = dim, 0
        self.total, self.low, self.high = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def observe(self, x: Tensor) -> None:
        values = x.detach().movedim(self.dim, 0).flatten(1)
        low, high = values.amin(1).cpu(), values.amax(1).cpu()
        if self.count:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.total = self.total + values.sum(1).double().cpu()
        self.count += values.shape[1]
        self.low, self.high = low, high

    def constants(self, exact_only: bool) -> Tensor:
        """Return the means; with `exact_only`, 0 for channels that are not constant."""
        mean = self.total / self.count
        constant = self.high - self.low <= 1e-6 * self.high.abs()
        return torch.where(constant, mean, 0) if exact_only else mean


def _pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a constant input channel may contribute differently to different output positions."""
    if isinstance(layer, (nn.modules.conv._ConvTransposeNd, DeformableConv)):
        return True  # output positions depend on different numbers of inputs
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    pads = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    return pads and layer.padding_mode == "zeros"


def fold_constants(model: nn.Module, name: str, trace: Trace, drop: Tensor, constants: Tensor) -> None:
    """Fold the constants of dropped input channels into a layer's bias, or into the norm behind it."""
    layer = submodule(model, name)
    values = torch.zeros_like(constants, dtype=torch.double)
    values[drop] = constants.double()[drop]
    with torch.no_grad():
        for reader in readers(layer):
            weight = reader.weight.detach().movedim((reader.out_dim, reader.in_dim), (0, 1))
            per_input = weight.cpu().double()
            if per_input.ndim > 2:
                per_input = per_input.flatten(2).sum(2)
            if parts(layer) > 1:
                inputs = values.view(parts(layer), -1).repeat_interleave(len(weight) // parts(layer), dim=0)
                shift = (per_input * inputs).sum(1)
            else:
                shift = per_input @ values
            if reader.bias is not None:
                reader.bias.add_(shift.to(reader.bias))
            elif name in trace.foldable:
                mean = submodule(model, trace.foldable[name]).get_buffer("running_mean")
                mean.sub_(shift.to(mean))


def foldable_constants(trace: Trace, model: nn.Module, constants: Constants) -> dict[str, Tensor]:
    """Return the constants of layers that have a bias or a foldable BatchNorm to fold them into."""
    return {
        name: value
        for name, value in constants.items()
        if name in trace.foldable
        or ((read := readers(submodule(model, name))) and all(each.bias is not None for each in read))
    }


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule under all of its names, in place.

    >>> model = nn.Sequential(nn.ReLU())
    >>> replace_module(model, "0", nn.Identity())
    >>> model
    Sequential(
      (0): Identity()
    )
    """
    replaced = submodule(model, name)
    for parent in list(model.modules()):
        for child in [child for child, held in parent._modules.items() if held is replaced]:
            setattr(parent, child, module)
