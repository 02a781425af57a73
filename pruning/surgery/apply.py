"""Surgery: a model and a plan give a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.layers import DeformableConv, Side, layer_width, narrow, output_rows, parts, readers
from pruning.graph.plan import Plan
from pruning.surgery.sizes import resize
from pruning.utils.modules import buffers_unchanged, call, copied, eval_mode, hooked, on_input
from pruning.utils.tree import Inputs, fresh

#: For consumers of pruned channels, the value each of their input channels is taken to have
#: once it is gone: layer name to (input channels,).
Constants = Mapping[str, Tensor]


def apply(model: nn.Module, trace: Trace, plan: Plan, constants: Constants | None = None) -> nn.Module:
    """The model that keeps only the channels of the plan.

    Args:
        model: left as it is.
        trace: of this model.
        plan: what each group keeps; a group it does not name is kept whole.
        constants: folded into the bias of the consumer, or into the running mean of the
            BatchNorm behind it, for the channels that go (see `channel_constants`).

    Returns a new model on the same device, in the same mode, without gradients.
    Raises `PruningError` for a plan that names a group or channel the trace does not have.
    """
    dropped = dropped_positions(trace, plan)
    # Weights that are narrowed below are not copied whole before.
    narrowed = [
        weight
        for name, side in dropped
        if side != "self" and isinstance(weight := getattr(model.get_submodule(name), "weight", None), Tensor)
    ]
    small = copied(model, {id(weight): weight for weight in narrowed})
    # Fold while every layer still has its full width, then narrow.
    for (name, side), drop in dropped.items():
        if side == "in" and constants is not None and name in constants:
            _fold_constants(small, name, trace, drop, constants[name])
    _cut(small, trace, dropped)
    resize(small, trace, plan)
    small.zero_grad(set_to_none=True)
    return small


def cut(model: nn.Module, trace: Trace, plan: Plan) -> None:
    """Take the channels that a plan does not keep out of a model, in place."""
    _cut(model, trace, dropped_positions(trace, plan))
    resize(model, trace, plan)


def _cut(model: nn.Module, trace: Trace, dropped: Mapping[tuple[str, Side], Tensor]) -> None:
    lies = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    # Rows first: what is left of them is then less to gather columns from.
    for (name, side), drop in sorted(dropped.items(), key=lambda item: item[0][1] != "out"):
        if side == "self":
            _narrow_tensor(model, name, lies[name, side], drop)
        else:
            layer = model.get_submodule(name)
            narrow(layer, side, others(layer_width(layer, side), drop))


def others(width: int, drop: Tensor) -> Tensor:
    """The positions that stay of so many, sorted."""
    keep = torch.ones(width, dtype=torch.bool)
    keep[drop] = False
    return keep.nonzero().flatten()


def _narrow_tensor(model: nn.Module, name: str, dim: int, drop: Tensor) -> None:
    """Take positions out of a parameter or buffer, in place."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module, attribute)
    keep = others(tensor.shape[dim], drop).to(tensor.device)
    kept = tensor.detach().index_select(dim, keep)
    if isinstance(tensor, nn.Parameter):
        kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
    setattr(module, attribute, kept)


def dropped_positions(trace: Trace, plan: Plan) -> dict[tuple[str, Side], Tensor]:
    """For each side of each layer that loses channels, the positions that go, sorted."""
    dropped: dict[tuple[str, Side], list[Tensor]] = {}
    for name, kept in plan.keep.items():
        group = trace.groups.get(name)
        if group is None:
            raise PruningError(
                f"the plan names group {name!r}, which this model does not have; it has: "
                f"{', '.join(trace.groups) or 'none'}"
            )
        if kept[-1] >= group.channels:
            raise PruningError(f"the plan keeps channel {kept[-1]} of {name!r}, which has {group.channels}")
        gone = torch.ones(group.channels, dtype=torch.bool)
        gone[list(kept)] = False
        if not gone.any():
            continue
        channels = gone.nonzero().flatten()
        for member in group.members:
            dropped.setdefault((member.layer, member.side), []).append(member.positions(channels))
    return {side: torch.cat(positions).unique() for side, positions in dropped.items()}


def may_leave_constants(model: nn.Module, trace: Trace, plan: Plan) -> bool:
    """Whether a channel that goes may be a constant other than 0: its scale or all its weights are 0.

    Without such a channel `channel_constants(..., exact_only=True)` would find nothing.
    """
    for (name, side), drop in dropped_positions(trace, plan).items():
        weight = getattr(model.get_submodule(name), "weight", None) if side == "out" else None
        if weight is None:
            continue  # an input, or a norm without scales
        rows = output_rows(model.get_submodule(name), "weight", weight.detach())
        at = drop.to(rows.device)
        at = at[rows[at, 0] == 0]  # most rows are told by their first weight
        if len(at) and (~rows[at].any(1)).any():
            return True
    return False


@buffers_unchanged
def channel_constants(
    model: nn.Module, trace: Trace, batches: Iterable[Inputs], *, exact_only: bool = False
) -> dict[str, Tensor]:
    """The mean that each channel has where a layer consumes it, over calibration batches.

    A channel with γ = 0 is constant: its mean is the constant that β leaves behind the
    activation, and folding it loses nothing. For any other channel the mean is the constant
    that replaces it with the least squared error.

    Layers that pad with zeros have no entry: near the border the constant would be missing.
    With `exact_only`, channels that vary count as 0, so that example inputs of any kind do;
    noise of their shape is run besides, because a single example varies nowhere.
    """
    sums: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, dim: int) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            values = x.detach().movedim(dim, 0).flatten(1)
            low, high = values.amin(1).cpu(), values.amax(1).cpu()
            if name in sums:
                low, high = torch.minimum(low, spread[name][0]), torch.maximum(high, spread[name][1])
            sums[name] = sums.get(name, 0) + values.sum(1).double().cpu()
            counts[name] = counts.get(name, 0) + values.shape[1]
            spread[name] = torch.stack([low, high])

        return observe

    handles: list[RemovableHandle] = []
    with hooked(handles), torch.no_grad(), eval_mode(model):
        for group in trace.groups.values():
            for member in group.side("in"):
                layer = model.get_submodule(member.layer)
                if _pads_with_zeros(layer) or member.layer in counts:
                    continue
                counts[member.layer] = 0
                handles.append(on_input(layer, watch(member.layer, member.dim)))
        for inputs in batches:
            for variant in (inputs, *(_noise_like(inputs) if exact_only else ())):
                call(model, fresh(variant))

    constants = {}
    for name, total in sums.items():
        mean = total / counts[name]
        if exact_only:
            low, high = spread[name]
            mean = torch.where(high - low <= 1e-6 * high.abs(), mean, 0)
        constants[name] = mean
    return constants


def _noise_like(inputs: Inputs) -> list[Any]:
    """Two inputs in which every floating-point tensor is replaced by noise, always the same."""
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return [pytree.tree_map(noise, inputs) for _ in range(2)]


def _pads_with_zeros(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.modules.conv._ConvTransposeNd, DeformableConv)):
        return True  # its output positions see different numbers of inputs
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    pads = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    return pads and layer.padding_mode == "zeros"


def _fold_constants(model: nn.Module, name: str, trace: Trace, drop: Tensor, constants: Tensor) -> None:
    """Add what the dropped inputs of a layer contribute to its bias or the norm behind it."""
    layer = model.get_submodule(name)
    values = torch.zeros_like(constants, dtype=torch.double)
    values[drop] = constants.double()[drop]
    with torch.no_grad():
        for weight, bias in readers(layer):
            per_input = weight.detach().cpu().double()
            if per_input.ndim > 2:
                per_input = per_input.flatten(2).sum(2)
            if parts(layer) > 1:
                inputs = values.view(parts(layer), -1).repeat_interleave(len(weight) // parts(layer), dim=0)
                shift = (per_input * inputs).sum(1)
            else:
                shift = per_input @ values
            if bias is not None:
                bias.add_(shift.to(bias))
            elif name in trace.foldable:
                mean = model.get_submodule(trace.foldable[name]).get_buffer("running_mean")
                mean.sub_(shift.to(mean))


def foldable_constants(trace: Trace, model: nn.Module, constants: Constants) -> dict[str, Tensor]:
    """The constants that surgery can put somewhere: a bias, or a BatchNorm directly behind."""
    return {
        name: value
        for name, value in constants.items()
        if name in trace.foldable or all(bias is not None for _, bias in readers(model.get_submodule(name)))
    }


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a submodule's place, under each of the names that it may have."""
    replaced = model.get_submodule(name)
    for parent in list(model.modules()):
        for child in [child for child, held in parent._modules.items() if held is replaced]:
            setattr(parent, child, module)
