"""BatchNorm beside surgery: folded into layers, its statistics taken anew, its channels of one size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.layers import layer_width, parts, readers
from pruning.surgery.apply import replace_module
from pruning.utils.compare import compare, doubled, outputs_of
from pruning.utils.modules import call, copied, device_of, eval_mode
from pruning.utils.tree import Inputs, tensors


def fold_batchnorm(model: nn.Module, trace: Trace, inputs: Inputs | None = None) -> nn.Module:
    """A copy in eval mode in which every BatchNorm that directly follows a layer is part of it.

    The norm's place is taken by `nn.Identity`. γ, β and the running statistics go into the
    layer's weight and a bias, which changes nothing in eval mode. That is checked: norms for
    which the outputs differ (of modules whose code does more than their type says) are left
    as they are, with a warning that names them.

    Args:
        inputs: example inputs to check with; by default those of the trace.

    Raises `PruningError` when the model does not run on them.
    """
    given = copied(model).eval()
    pairs = {name: norm for name, norm in trace.foldable.items() if can_fold(given, name, norm)}
    if not pairs:
        return given
    inputs = _on_device_of(given, trace.inputs if inputs is None else inputs)
    expected = outputs_of(copied(given), inputs)  # a pass may leave something in the model
    if isinstance(expected, Exception):
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs of its trace "
            f"({type(expected).__name__}: {expected}); give those that it takes as `inputs`"
        ) from expected
    precise: list[Any] = []  # the inputs and outputs in double precision, once they are needed

    def differs(folded: nn.Module) -> bool:
        if not compare(expected, outputs_of(copied(folded), inputs))[0]:
            return False
        # A deep network may amplify rounding; in double precision that is told from an error.
        if not precise:
            wide, finer = doubled(given, inputs)
            precise.extend([finer, outputs_of(wide, finer)])
        return bool(compare(precise[1], outputs_of(doubled(folded, ())[0], precise[0]))[0])

    folded = _folded(given, pairs)
    if not differs(folded):
        return folded
    right: dict[str, str] = {}
    waiting = [list(pairs)]
    while waiting:  # halves, until those at fault are found
        names = waiting.pop()
        tried = {name: pairs[name] for name in (*right, *names)}
        if tried.keys() != pairs.keys() and not differs(_folded(given, tried)):
            right = tried
        elif len(names) > 1:
            waiting += [names[len(names) // 2 :], names[: len(names) // 2]]
    left = [norm for name, norm in pairs.items() if name not in right]
    warnings.warn(
        f"{', '.join(left)} cannot be folded: the outputs would change. Their parameters and MACs "
        "come on top of what a plan counts",
        stacklevel=2,
    )
    return _folded(given, right)


def _folded(model: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """A copy with these norms (layer name to norm name) folded."""
    folded = copied(model)
    for name, norm_name in pairs.items():
        layer: Any = folded.get_submodule(name)
        norm: Any = folded.get_submodule(norm_name)
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        replace_module(folded, name, fuse(layer, norm))
        replace_module(folded, norm_name, nn.Identity())
    return folded


def _on_device_of(model: nn.Module, inputs: Any) -> Any:
    """Inputs where the model is now; it may have been moved since it was traced."""
    device = device_of(model)
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)


def recalibrate(model: nn.Module, batches: Iterable[Inputs], keep: Iterable[str] = ()) -> nn.Module:
    """Take the running statistics of every BatchNorm anew, as means over the batches, in place.

    After surgery they still are those of the wider network. Batches of one example have no
    variance and are left out; without others, for frozen norms, for those that do not run and
    for those that keep no statistics, nothing changes. `keep` names modules whose norms stay
    as they are. Returns the model, in the mode it had.
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
        with torch.no_grad(), eval_mode(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch then takes the plain mean over all batches
                norm.train()
            for inputs in batches:
                if len(tensors(inputs)[0]) > 1:
                    call(model, inputs)
        finished = True
    finally:
        for norm, momentum, statistics in before:
            norm.momentum = momentum
            if not finished or not norm.num_batches_tracked:  # it did not run
                for tensor, values in zip(_statistics(norm), statistics, strict=True):
                    tensor.copy_(values)
    return model


def _statistics(norm: Any) -> list[Tensor]:
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]


def equalize(model: nn.Module, trace: Trace, inputs: Inputs) -> nn.Module:
    """A model that computes the same with γ² + β² = 1 in every BatchNorm channel, where that can be had.

    Stage 1 leaves small scales, and with them large weights in the layers that follow, which
    do not train well at the learning rates of a fresh network. Where ReLU-like operations
    lie between (f(sx) = s f(x) for s > 0) a channel's γ and β can be divided by a number
    and the weights that consume it multiplied by it (Nagel et al., Data-Free Quantization
    Through Weight Equalization and Bias Correction, ICCV 2019). A norm's output has mean β and
    variance γ², so √(γ² + β²) brings every channel to the mean square 1. (|γ| alone would make
    a nearly constant channel, with a small γ and a larger β, a huge one, and training diverge.)

    A layer that consumes small scales is left with small weights. With a BatchNorm of its own
    behind it the size of its weights means nothing, but a step of training changes small ones by a
    larger share (van Laarhoven, arXiv 1706.05350): so they get the norm back that they had, and the
    statistics of that BatchNorm go with it.

    A group for which the outputs on `inputs` then differ is left as it is, and so are channels
    without γ and β.
    """
    equal = copied(model)
    expected = outputs_of(model, inputs)
    for group in trace.groups.values():
        norms = [m for m in group.side("out") if _scaled_norm(equal.get_submodule(m.layer))]
        consumers = [(m, equal.get_submodule(m.layer)) for m in group.side("in")]
        if len(norms) != 1 or any(parts(layer) > 1 for _, layer in consumers):
            continue
        if len(norms[0].index) != layer_width(equal.get_submodule(norms[0].layer), "out"):
            continue  # a norm over several groups
        behind = {m.layer: trace.foldable[m.layer] for m, _ in consumers if m.layer in trace.foldable}
        touched = {*(m.layer for m in group.members if m.side != "self"), *behind.values()}
        before = {name: copy.deepcopy(equal.get_submodule(name)) for name in touched}
        norm: Any = equal.get_submodule(norms[0].layer)
        with torch.no_grad():
            size = torch.hypot(norm.weight, norm.bias)
            size = torch.where(size > 1e-4 * size.max(), size, torch.ones_like(size))
            by_channel = torch.ones(group.channels).to(size)
            by_channel[norms[0].channel] = size[norms[0].index]
            norm.weight.div_(size)
            norm.bias.div_(size)
            for member, layer in consumers:
                factors = torch.ones(layer_width(layer, "in")).to(size)
                factors[member.index] = by_channel[member.channel]
                dim = 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
                for weight, _ in readers(layer):
                    weight.mul_(factors.view([-1 if d == dim else 1 for d in range(weight.ndim)]))
            for name, norm_name in behind.items():
                _restore_size(equal.get_submodule(name), before[name], equal.get_submodule(norm_name))
        if compare(expected, outputs_of(equal, inputs))[0]:
            for name, layer in before.items():
                replace_module(equal, name, layer)
    return equal


def _restore_size(layer: Any, before: Any, norm: Any) -> None:
    """Give the weights of a layer the norm they had, in place; the BatchNorm behind it takes it out again."""
    ratio = before.weight.norm() / layer.weight.norm()
    if ratio.isfinite():  # else all of them are 0
        layer.weight.mul_(ratio)
        if layer.bias is not None:
            layer.bias.mul_(ratio)
        norm.running_mean.mul_(ratio)
        # So that variance + ε grows by the square, and what it divides by the ratio.
        norm.running_var.add_(norm.eps).mul_(ratio.square()).sub_(norm.eps)


def _scaled_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None


#: Layers that BatchNorm can be folded into, and kinds of it that can be folded.
_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def can_fold(model: nn.Module, name: str, norm_name: str) -> bool:
    """Whether a layer and the norm behind it, of a model in eval mode, do what their types say."""
    layer: Any = model.get_submodule(name)
    norm: Any = model.get_submodule(norm_name)
    return (
        _as_torch_made_it(layer, _INTO)
        and _as_torch_made_it(norm, _NORMS)
        and isinstance(norm.running_mean, torch.Tensor)
        and not norm.training  # some keep to the statistics of the batch
        and norm.num_features == layer_width(layer, "out")
    )


def _as_torch_made_it(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer computes what one of these types does: without code of its own, or hooks."""
    base = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if base is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    own = ("__call__", "forward", "_conv_forward", "weight", "bias")  # a parametrization is a property
    return all(getattr(type(layer), name, None) is getattr(base, name, None) for name in own)
