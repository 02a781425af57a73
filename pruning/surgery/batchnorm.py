"""BatchNorm: fold it into layers, recalibrate its statistics, equalize its channels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.groups import Group, Member, Trace
from pruning.graph.layer_tensors import readers
from pruning.graph.layers import layer_width, parts
from pruning.surgery.apply import replace_module
from pruning.utils.compare import compare, doubled, outputs_of
from pruning.utils.modules import call, copied, device_of, eval_mode, hooked, on_input, submodule
from pruning.utils.tree import Inputs, map_tensors, tensors
from pruning.utils.wrappers import unwrapped

Layer = TypeVar("Layer", bound=nn.Module)


def fold_batchnorm(model: nn.Module, trace: Trace, inputs: Inputs | None = None) -> nn.Module:
    """Return a copy in eval mode in which each BatchNorm that directly follows a layer is folded into it.

    The layer's weight and bias absorb γ, β and the running statistics, and `nn.Identity` replaces the norm.
    This changes no output in eval mode. The outputs are compared: norms that change them when folded
    (because a module has code of its own) are not folded, and a warning names them.

    Args:
        model: the traced model; it is not changed.
        trace: of this model.
        inputs: example inputs to compare on; by default those of the trace.

    Returns a new model. Raises `PruningError` when the model does not run on the inputs.

    >>> from pruning import trace
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    >>> folded = fold_batchnorm(model, trace(model, torch.zeros(1, 3, 5, 5)))
    >>> folded[0].bias.shape, folded[1]
    (torch.Size([4]), Identity())
    """
    model = unwrapped(model)
    given = copied(model).eval()
    pairs = {name: norm for name, norm in trace.foldable.items() if can_fold(given, name, norm)}
    if not pairs:
        return given
    inputs = _to_device_of(given, trace.inputs if inputs is None else inputs)
    expected = outputs_of(copied(given), inputs)  # a pass may leave something in the model
    if isinstance(expected, Exception):
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs of its trace "
            f"({type(expected).__name__}: {expected}); give inputs that it runs on"
        ) from expected
    #: The inputs and expected outputs in double precision, computed when first needed.
    precise: list[tuple[Inputs, list[Tensor] | Exception]] = []

    def differs(folded: nn.Module) -> bool:
        if not compare(expected, outputs_of(copied(folded), inputs))[0]:
            return False
        # A deep network may amplify rounding errors; double precision distinguishes them from a fault.
        if not precise:
            wide, finer = doubled(given, inputs)
            precise.append((finer, outputs_of(wide, finer)))
        [(finer, wanted)] = precise
        return bool(compare(wanted, outputs_of(doubled(folded, ())[0], finer))[0])

    folded = _folded(given, pairs)
    if not differs(folded):
        return folded
    right = _without_faults(pairs, lambda tried: differs(_folded(given, tried)))
    left = [norm for name, norm in pairs.items() if name not in right]
    warnings.warn(
        f"{', '.join(left)} cannot be folded: the outputs would change. Their parameters and MACs "
        "are not included in the cost of a plan",
        stacklevel=2,
    )
    return _folded(given, right)


def _without_faults(pairs: dict[str, str], fails: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """Return the pairs with which a test passes, by bisection; with all pairs it fails."""
    right: dict[str, str] = {}
    waiting = [list(pairs)]
    while waiting:
        names = waiting.pop()
        tried = {name: pairs[name] for name in (*right, *names)}
        if tried.keys() != pairs.keys() and not fails(tried):
            right = tried
        elif len(names) > 1:
            waiting += [names[len(names) // 2 :], names[: len(names) // 2]]
    return right


def _folded(model: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """Return a copy with these norms (layer name to norm name) folded."""
    folded = copied(model)
    for name, norm_name in pairs.items():
        layer, norm = submodule(folded, name), _batchnorm(folded, norm_name)
        if isinstance(layer, nn.Linear):
            replace_module(folded, name, fuse_linear_bn_eval(layer, norm))
        else:
            assert isinstance(layer, nn.modules.conv._ConvNd)
            replace_module(folded, name, fuse_conv_bn_eval(layer, norm))
        replace_module(folded, norm_name, nn.Identity())
    return folded


def _batchnorm(model: nn.Module, name: str) -> nn.modules.batchnorm._BatchNorm:
    """Return the BatchNorm of this name."""
    norm = submodule(model, name)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return norm


def _to_device_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return inputs on the device of a model, which may have been moved since it was traced."""
    device = device_of(model)
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def recalibrate(
    model: nn.Module, batches: Iterable[Inputs], keep: Iterable[str] = (), *, one_example: bool = False
) -> nn.Module:
    """Recompute the running statistics of every BatchNorm, as means over the batches, in place.

    After surgery, the statistics still are those of the wider network. A norm skips inputs of one example,
    which do not vary between examples; a norm that skips all inputs, is frozen, does not run or has no
    running statistics is not changed.

    Args:
        model: its weights are not changed.
        batches: calibration inputs, in the form that `trace` takes.
        keep: names of modules whose norms keep their statistics.
        one_example: whether inputs of one example count too, where it has several positions.

    Returns the model, in the mode it had.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> recalibrate(model, [torch.randn(8, 3), torch.randn(8, 3)])[1].num_batches_tracked
    tensor(2)
    """
    inside = tuple(f"{name}." for name in keep)
    norms = [
        m
        for name, m in model.named_modules()
        if not f"{name}.".startswith(inside)
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        if m.weight is None or m.weight.requires_grad
    ]
    if not norms:
        return model
    before = [(norm, norm.momentum, [t.clone() for t in _statistics(norm)]) for norm in norms]
    finished = False
    try:
        handles = [_update_on_several_examples(norm, one_example) for norm in norms]
        with torch.no_grad(), eval_mode(model), hooked(handles):
            for inputs in batches:
                if one_example or any(x.ndim and len(x) > 1 for x in tensors(inputs)):
                    call(model, inputs)
        finished = True
    finally:
        for norm, momentum, statistics in before:
            norm.momentum = momentum
            if not finished:
                for tensor, values in zip(_statistics(norm), statistics, strict=True):
                    tensor.copy_(values)
    return model


def _update_on_several_examples(norm: nn.modules.batchnorm._BatchNorm, one_example: bool) -> RemovableHandle:
    """Let a norm recompute its statistics, from the first input that holds several examples on.

    Args:
        one_example: whether several positions of one example count as well.
    """
    norm.momentum = None  # torch then computes the plain mean over all batches
    started = False

    def choose_mode(x: Tensor) -> None:
        nonlocal started
        norm.train(x[:, 0].numel() > 1 if one_example else len(x) > 1)
        if norm.training and not started:
            norm.reset_running_stats()
            started = True

    return on_input(norm, choose_mode)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    return [norm.get_buffer(name) for name in ("running_mean", "running_var", "num_batches_tracked")]


def equalize(model: nn.Module, trace: Trace, inputs: Inputs) -> nn.Module:
    """Return a copy with the same outputs and γ² + β² = 1 in every BatchNorm channel, where possible.

    Sparsity training leaves small γ, and large weights in the layers that follow, which do not train well
    at the learning rates of a fresh network. If only positively homogeneous operations such as ReLU lie
    between a norm and the layers that read it (f(sx) = s f(x) for s > 0), a channel's γ and β can be
    divided by s and the weights that read it multiplied by s (Nagel et al., Data-Free Quantization
    Through Weight Equalization and Bias Correction, ICCV 2019, arXiv 1906.04721). A norm's output has
    mean β and variance γ², so s = √(γ² + β²) gives every channel the mean square 1. (s = |γ| would make
    β huge in a nearly constant channel, with small γ and larger β, and training would diverge.)

    A layer that reads channels of small scale gets small weights. If a BatchNorm follows it, the output
    does not depend on the norm of its weights, but a training step changes small weights by a larger
    share (van Laarhoven, arXiv 1706.05350). The weights are therefore rescaled to their previous norm,
    and the statistics of that BatchNorm with them.

    Args:
        model: the traced model; it is not changed.
        trace: of this model.
        inputs: on which the outputs are compared. Groups whose change alters the outputs, and channels
            without γ and β, are not changed.

    >>> from pruning import trace
    >>> images = torch.randn(2, 3, 9, 9)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    >>> _ = nn.init.constant_(model[1].weight, 0.01)
    >>> equal = equalize(model, trace(model, images), images)
    >>> equal[1].weight.round().tolist(), torch.allclose(equal(images), model(images), atol=1e-5)
    ([1.0, 1.0, 1.0, 1.0], True)
    """
    model = unwrapped(model)
    equal = copied(model)
    expected = outputs_of(model, inputs)
    for group in trace.groups.values():
        norms = [m for m in group.side("out") if _has_scale(submodule(equal, m.layer))]
        readers_of = [m.layer for m in group.side("in")]
        if len(norms) != 1 or any(parts(submodule(equal, name)) > 1 for name in readers_of):
            continue
        if len(norms[0].index) != layer_width(submodule(equal, norms[0].layer), "out"):
            continue  # a norm over several groups
        behind = {name: trace.foldable[name] for name in readers_of if name in trace.foldable}
        touched = {*(m.layer for m in group.members if m.side != "self"), *behind.values()}
        before = {name: copy.deepcopy(submodule(equal, name)) for name in touched}
        with torch.no_grad():
            _equalize_group(equal, group, norms[0])
            for name, norm_name in behind.items():
                _restore_size(submodule(equal, name), before[name], _batchnorm(equal, norm_name))
        if compare(expected, outputs_of(equal, inputs))[0]:
            for name, layer in before.items():
                replace_module(equal, name, layer)
    return equal


def _equalize_group(model: nn.Module, group: Group, norm_member: Member) -> None:
    """Divide γ and β of a group's norm by s = √(γ² + β²), and multiply the weights that read it by s."""
    norm = _batchnorm(model, norm_member.layer)
    size = torch.hypot(norm.weight, norm.bias)
    size = torch.where(size > 1e-4 * size.max(), size, torch.ones_like(size))
    by_channel = torch.ones(group.channels).to(size)
    by_channel[norm_member.channel] = size[norm_member.index]
    norm.weight.div_(size)
    norm.bias.div_(size)
    for member in group.side("in"):
        layer = submodule(model, member.layer)
        factors = torch.ones(layer_width(layer, "in")).to(size)
        factors[member.index] = by_channel[member.channel]
        for reader in readers(layer):
            shape = [1] * reader.weight.ndim
            shape[reader.in_dim] = -1
            reader.weight.mul_(factors.view(shape))


def _restore_size(layer: Layer, before: Layer, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Rescale a layer's weights to their previous norm, and the statistics of the BatchNorm behind it."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    ratio = before.get_parameter("weight").norm() / weight.norm()
    if ratio.isfinite():  # not finite if all weights are 0
        weight.mul_(ratio)
        if bias is not None:
            bias.mul_(ratio)
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        mean.mul_(ratio)
        # Multiply variance + ε by ratio², so that the norm divides by √(variance + ε) times the ratio.
        variance.add_(norm.eps).mul_(ratio.square()).sub_(norm.eps)


def _has_scale(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None


#: Layers that BatchNorm can be folded into, and types of BatchNorm that can be folded.
_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def can_fold(model: nn.Module, name: str, norm_name: str) -> bool:
    """Whether a norm can be folded into a layer: neither has code of its own; the model is in eval mode."""
    layer, norm = submodule(model, name), submodule(model, norm_name)
    return (
        _is_plain(layer, _INTO)
        and _is_plain(norm, _NORMS)
        and isinstance(norm.running_mean, Tensor)
        and not norm.training  # some use the statistics of the batch even in eval mode
        and bool(norm.num_features == layer_width(layer, "out"))
    )


def _is_plain(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer is of one of these types, without code of its own and without hooks."""
    base = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if base is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    own = ("__call__", "forward", "_conv_forward", "weight", "bias")  # a parametrization is a property
    return all(getattr(type(layer), name, None) is getattr(base, name, None) for name in own)
