"""Surgery: a model and a plan give a smaller model. And the check that it was right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.graph import Inputs, Trace, call, tensors
from pruning.layers import Side, layer_width, narrow, parts
from pruning.modes import eval_mode
from pruning.plan import Plan

#: For consumers of pruned channels, the value each of their input channels is taken to have
#: once it is gone: layer name to (input channels,).
Constants = Mapping[str, Tensor]

#: Largest difference, relative to the largest output, that float32 rounding explains (for
#: coarser types it is 16 of their rounding steps).
TOLERANCE = 1e-4


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
    small = copy.deepcopy(model, {id(weight): weight for weight in narrowed})
    # Fold while every layer still has its full width, then narrow.
    for (name, side), drop in dropped.items():
        if side == "in" and constants is not None and name in constants:
            _fold_constants(small, name, trace, drop, constants[name])
    cut(small, trace, plan)
    small.zero_grad(set_to_none=True)
    return small


def cut(model: nn.Module, trace: Trace, plan: Plan) -> None:
    """Take the channels that a plan does not keep out of a model, in place."""
    lies = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    dropped = dropped_positions(trace, plan).items()
    # Rows first: what is left of them is then less to gather columns from.
    for (name, side), drop in sorted(dropped, key=lambda item: item[0][1] != "out"):
        if side == "self":
            _narrow_tensor(model, name, lies[name, side], drop)
        else:
            layer = model.get_submodule(name)
            narrow(layer, side, _others(layer_width(layer, side), drop))


def _others(width: int, drop: Tensor) -> Tensor:
    """The positions that stay."""
    keep = torch.ones(width, dtype=torch.bool)
    keep[drop] = False
    return keep.nonzero().flatten()


def _narrow_tensor(model: nn.Module, name: str, dim: int, drop: Tensor) -> None:
    """Take positions out of a parameter or buffer, in place."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module, attribute)
    keep = _others(tensor.shape[dim], drop).to(tensor.device)
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
    """Whether a channel that goes is a constant other than 0: its scale or all its weights are 0."""
    for (name, side), drop in dropped_positions(trace, plan).items():
        layer = model.get_submodule(name) if side == "out" else None
        bias, weight = getattr(layer, "bias", None), getattr(layer, "weight", None)
        if layer is None or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            continue
        dim = weight.ndim > 1 and isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups == 1
        rows = (
            weight.detach().movedim(int(dim), 0).flatten(1) if weight.ndim > 1 else weight.detach()[:, None]
        )
        if len(rows) != len(bias):
            continue
        at = drop.to(rows.device)
        at = at[rows[at, 0] == 0]  # most rows are told by their first weight
        if len(at) and (~rows[at].any(1)).any():
            return True
    return False


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

    def hook(name: str, dim: int) -> Callable[[nn.Module, Any], None]:
        def observe(_: nn.Module, args: Any) -> None:
            values = args[0].detach().movedim(dim, 0).flatten(1)
            low, high = values.amin(1).cpu(), values.amax(1).cpu()
            if name in sums:
                low, high = torch.minimum(low, spread[name][0]), torch.maximum(high, spread[name][1])
            sums[name] = sums.get(name, 0) + values.sum(1).double().cpu()
            counts[name] = counts.get(name, 0) + values.shape[1]
            spread[name] = torch.stack([low, high])

        return observe

    handles = []
    try:
        for group in trace.groups.values():
            for member in group.side("in"):
                layer = model.get_submodule(member.layer)
                if _pads_with_zeros(layer) or member.layer in counts:
                    continue
                counts[member.layer] = 0
                handles.append(layer.register_forward_pre_hook(hook(member.layer, member.dim)))
        with torch.no_grad(), eval_mode(model):
            for inputs in batches:
                for variant in (inputs, *(_noise_like(inputs) if exact_only else ())):
                    call(model, variant)
    finally:
        for handle in handles:
            handle.remove()

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
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return True  # its output positions see different numbers of inputs
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    pads = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    return pads and layer.padding_mode == "zeros"


def _fold_constants(model: nn.Module, name: str, trace: Trace, drop: Tensor, constants: Tensor) -> None:
    """Add what the dropped inputs of a layer contribute to its bias or the norm behind it."""
    layer = model.get_submodule(name)
    weight = layer.get_parameter("weight").detach().cpu().double()
    values = torch.zeros_like(constants, dtype=torch.double)
    values[drop] = constants.double()[drop]
    per_input = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    if parts(layer) > 1:
        inputs = values.view(parts(layer), -1).repeat_interleave(len(weight) // parts(layer), dim=0)
        shift = (per_input * inputs).sum(1)
    else:
        shift = per_input @ values
    with torch.no_grad():
        if layer.bias is not None:
            bias = layer.get_parameter("bias")
            bias.add_(shift.to(bias))
        elif name in trace.foldable:
            mean = model.get_submodule(trace.foldable[name]).get_buffer("running_mean")
            mean.sub_(shift.to(mean))


def foldable_constants(trace: Trace, model: nn.Module, constants: Constants) -> dict[str, Tensor]:
    """The constants that surgery can put somewhere: a bias, or a BatchNorm directly behind."""
    return {
        name: value
        for name, value in constants.items()
        if model.get_submodule(name).bias is not None or name in trace.foldable
    }


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
    problem, difference = _difference(model, small, trace, plan, inputs, constants or {})
    if problem:
        raise PruningError(
            f"surgery is not equivalent to the plan: {problem}{_blame(model, trace, plan, inputs)}; "
            "nothing was changed. List these layers as ignored, or mend what ties the model to its widths"
        )
    return difference


def enliven(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy with random weights under which the outputs depend on every layer.

    At initial or zero weights (a residual branch scaled by 0, say) outputs may hardly depend
    on what surgery touches, and a check of equivalence would see nothing.
    """
    lively = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for parameter in lively.parameters():
            if parameter.ndim > 1 and parameter.numel() > max(parameter.shape):
                parameter.copy_(draw(parameter) * (2 / max(1, parameter[0].numel())) ** 0.5)
            else:
                parameter.copy_(1 + draw(parameter) / 4)
    return recalibrate(lively, [inputs])


def _difference(
    model: nn.Module, small: nn.Module, trace: Trace, plan: Plan, inputs: Inputs, constants: Constants
) -> tuple[str, float]:
    oracle = _outputs(lambda: _run_masked(model, trace, plan, inputs, constants))
    with eval_mode(small):
        result = _outputs(lambda: call(small, inputs))
    return _compare(oracle, result)


def _blame(model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs) -> str:
    """The groups that are at fault when narrowed alone."""
    alone = {group: Plan({group: kept}) for group, kept in plan.keep.items()}
    culprits = [
        group
        for group, part in alone.items()
        if len(part.keep[group]) < trace.groups[group].channels
        and _difference(model, apply(model, trace, part), trace, part, inputs, {})[0]
    ]
    return f", at fault: {', '.join(culprits)}" if culprits else ""


def _outputs(run: Callable[[], Any]) -> list[Tensor] | Exception:
    try:
        with torch.no_grad():
            return tensors(run())
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return error


def _compare(oracle: list[Tensor] | Exception, result: list[Tensor] | Exception) -> tuple[str, float]:
    for outputs in (oracle, result):
        if isinstance(outputs, Exception):
            return f"the model no longer runs ({outputs})", float("inf")
    assert not isinstance(oracle, Exception) and not isinstance(result, Exception)
    shapes = [tuple(t.shape) for t in oracle], [tuple(t.shape) for t in result]
    if shapes[0] != shapes[1]:
        return f"outputs of shape {shapes[0]} became {shapes[1]}", float("inf")
    worst = 0.0
    for expected, got in zip(oracle, result, strict=True):
        if not expected.numel() or not expected.is_floating_point():
            continue  # a choice among equals (an argmax) may fall either way
        tolerance = max(TOLERANCE, 16 * torch.finfo(expected.dtype).eps)
        scale = expected.abs().max().item() or 1.0
        difference = (expected - got).abs().max().item() / scale
        if not difference <= tolerance:  # NaN included
            return f"outputs differ by {difference:.2g} of their largest value", difference
        worst = max(worst, difference)
    return "", worst


def _run_masked(model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs, constants: Constants) -> Any:
    """The model's outputs with the dropped channels at their constants; it is left as it was."""
    constants = foldable_constants(trace, model, constants)
    lies = {(m.layer, m.side): m.dim for group in trace.groups.values() for m in group.members}
    handles = []
    try:
        for (name, side), drop in dropped_positions(trace, plan).items():
            layer = model.get_submodule(name) if side != "self" else None
            if side == "in" and layer is not None:
                value = constants.get(name, torch.zeros(int(drop.max()) + 1))[drop]
                hook = _replace_channels(lies[name, side], drop, value)
                handles.append(layer.register_forward_pre_hook(hook))
            elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
                handles.append(layer.register_forward_hook(_norm_over_kept(layer, lies[name, side], drop)))
        with eval_mode(model):
            return call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _replace_channels(dim: int, drop: Tensor, value: Tensor) -> Callable[[nn.Module, Any], Any]:
    def replace(_: nn.Module, args: Any) -> Any:
        x = args[0].movedim(dim, -1).clone()
        x[..., drop.to(x.device)] = value.to(x)
        return (x.movedim(-1, dim), *args[1:])

    return replace


def _norm_over_kept(
    layer: nn.LayerNorm | nn.GroupNorm, dim: int, drop: Tensor
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """What a norm that mixes channels gives when it sees the kept ones alone; 0 for the others."""
    keep = _others(layer_width(layer, "out"), drop)
    smaller = copy.deepcopy(layer)
    narrow(smaller, "out", keep)

    def normalise(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept = keep.to(output.device)
        return torch.zeros_like(output).index_copy(
            dim, kept, smaller(args[0].index_select(dim, kept)).to(output.dtype)
        )

    return normalise


def fold_batchnorm(model: nn.Module, trace: Trace) -> nn.Module:
    """A copy in eval mode in which every BatchNorm that directly follows a layer is part of it.

    The norm's place is taken by `nn.Identity`. γ, β and the running statistics go into the
    layer's weight and a bias, which changes nothing in eval mode.
    """
    folded = copy.deepcopy(model).eval()
    for name, norm_name in trace.foldable.items():
        layer: Any = folded.get_submodule(name)
        norm: Any = folded.get_submodule(norm_name)
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        replace_module(folded, name, fuse(layer, norm))
        replace_module(folded, norm_name, nn.Identity())
    return folded


def recalibrate(model: nn.Module, batches: Iterable[Inputs], keep: Iterable[str] = ()) -> nn.Module:
    """Take the running statistics of every BatchNorm anew, as means over the batches, in place.

    After surgery they still are those of the wider network. Batches of one example have no
    variance and are left out; without others, for frozen norms and for those that keep no
    statistics, nothing changes. `keep` names modules whose norms stay as they are. Returns
    the model, in the mode it had.
    """
    inside = tuple(f"{name}." for name in keep)
    norms = [
        m
        for name, m in model.named_modules()
        if not f"{name}.".startswith(inside)
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        if m.weight is None or m.weight.requires_grad
    ]
    batches = [inputs for inputs in batches if len(tensors(inputs)[0]) > 1]
    if not norms or not batches:
        return model
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch then takes the plain mean over all batches
            norm.train()
        for inputs in batches:
            call(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def equalize(model: nn.Module, trace: Trace, inputs: Inputs) -> nn.Module:
    """A model that computes the same with BatchNorm scales of ±1, where that can be had.

    Stage 1 leaves small scales, and with them large weights in the layers that follow, which
    do not train well at the learning rates of a fresh network. Where ReLU-like operations
    lie between (f(sx) = s f(x) for s > 0) a channel's γ and β can be divided by |γ| and the
    weights that consume it multiplied by it (Nagel et al., Data-Free Quantization Through
    Weight Equalization and Bias Correction, ICCV 2019). A group for which the outputs on
    `inputs` then differ is left as it is, and so are scales of 0.
    """
    equal = copy.deepcopy(model)
    expected = _outputs(lambda: _run_masked(model, trace, Plan({}), inputs, {}))
    for group in trace.groups.values():
        norms = [m for m in group.side("out") if _scaled_norm(equal.get_submodule(m.layer))]
        consumers = [(m, equal.get_submodule(m.layer)) for m in group.side("in")]
        if len(norms) != 1 or any(parts(layer) > 1 for _, layer in consumers):
            continue
        if len(norms[0].index) != layer_width(equal.get_submodule(norms[0].layer), "out"):
            continue  # a norm over several groups
        before = {
            m.layer: copy.deepcopy(equal.get_submodule(m.layer)) for m in group.members if m.side != "self"
        }
        norm: Any = equal.get_submodule(norms[0].layer)
        with torch.no_grad():
            size = norm.weight.abs()
            size = torch.where(size > 1e-4 * size.max(), size, torch.ones_like(size))
            by_channel = torch.ones(group.channels).to(size)
            by_channel[norms[0].channel] = size[norms[0].index]
            norm.weight.div_(size)
            norm.bias.div_(size)
            for member, layer in consumers:
                factors = torch.ones(layer_width(layer, "in")).to(size)
                factors[member.index] = by_channel[member.channel]
                dim = 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
                weight = layer.get_parameter("weight")
                weight.mul_(factors.view([-1 if d == dim else 1 for d in range(weight.ndim)]))
        with eval_mode(equal):
            got = _outputs(lambda: call(equal, inputs))
        if _compare(expected, got)[0]:
            for name, layer in before.items():
                replace_module(equal, name, layer)
    return equal


def _scaled_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a submodule's place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
