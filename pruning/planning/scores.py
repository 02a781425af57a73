"""Scores: functions that return the importance of each channel; channels with higher scores are kept.

Every score has the signature `(model, trace, batches, loss)` and returns, by group, a tensor
(channels,). `BY_NAME` lists the scores. Those that need no data ignore `batches` and `loss`. No score
changes the model.

>>> from pruning.tracing.trace import trace
>>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
>>> traced = trace(net, torch.zeros(1, 3))
>>> {group: score.shape for group, score in l2(net, traced, [], cross_entropy).items()}
{'0': torch.Size([4])}
>>> batches = [(torch.randn(8, 3), torch.arange(8) % 2)]
>>> bool((taylor(net, traced, batches, cross_entropy)["0"] >= 0).all())
True
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.graph.groups import Group, Member, Trace
from pruning.graph.inferred import reinstate
from pruning.graph.layer_tensors import output_rows, output_tensors, output_weights
from pruning.graph.layers import makes_channels, weight_of
from pruning.planning.options import SCORES
from pruning.planning.reconstruction import reconstruction_losses
from pruning.planning.sampled_loss import SampledLoss
from pruning.planning.width_sweep import Batch, LabeledBatch, WidthSweep, channel_order, points_to_measure
from pruning.training.batches import to_device
from pruning.training.losses import Loss, cross_entropy, loss_of
from pruning.utils.modules import device_of, eval_mode, submodule
from pruning.utils.tree import fresh
from pruning.utils.wrappers import unwrapped

Scores = dict[str, Tensor]

Groups = Mapping[str, Group]

ScoreFunction = Callable[[nn.Module, Trace, Sequence[Batch], Loss], Scores]

#: A name in `BY_NAME`, a function (model, trace, batches, loss), or a function (model, groups).
Score = str | ScoreFunction | Callable[[nn.Module, Groups], Scores]

#: Number of widths of each group that the score `sensitivity` measures.
SENSITIVITY_WIDTHS = 12

#: A parameter of a layer: layer name, parameter name.
_Key = tuple[str, str]

_NORM = nn.modules.batchnorm._NormBase


@torch.no_grad()
def bn_scale(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score a channel by |γ| of its BatchNorm (Liu et al., Network Slimming, ICCV 2017).

    In a group with several norms, as at a residual sum, the score is their mean.

    Raises:
        PruningError: if a group has no norm with scales.
    """
    scores = {}
    for name, group in trace.groups.items():
        norms = [m for m in group.side("out") if _has_scale(submodule(model, m.layer))]
        if not norms:
            raise PruningError(
                f"group {name!r} has no BatchNorm with a scale, which bn_scale needs; "
                "score it by taylor, l1 or l2"
            )
        scales = [_per_channel(group, m, _weight(model, m).abs()) / _positions(group, m) for m in norms]
        scores[name] = torch.stack(scales).mean(0)
    return scores


@torch.no_grad()
def l1(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score a channel by the L1 norm of the weights that make it (Li et al., ICLR 2017), as a share.

    It is the share of the norms of this channel and all more important ones of its group, as in LAMP (Lee et
    al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv 2010.07611). So the scores
    of groups whose weights differ in size compare. Where several layers make the channels, as at a residual
    sum, the share is multiplied by their number: each of them loses it.
    """
    return _weight_norm(model, trace.groups, 1)


@torch.no_grad()
def l2(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score a channel by the squared L2 norm of the weights that make it, as a share like `l1`."""
    return _weight_norm(model, trace.groups, 2)


@torch.no_grad()
def random(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Draw scores uniformly from torch's global generator: a baseline for comparisons."""
    return {name: torch.rand(group.channels) for name, group in trace.groups.items()}


def taylor(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score a channel by the squared first-order change of the loss when it is removed.

    The score is (γ ∂L/∂γ + β ∂L/∂β)² if the group has a BatchNorm, else (Σ w ∂L/∂w)² over the weights
    and bias that make the channel, averaged over the batches (Molchanov et al., Importance Estimation
    for Neural Network Pruning, CVPR 2019). The terms of several layers that lose the channel together
    are added before squaring.

    Raises:
        PruningError: if there is no batch, or the loss is not finite.
    """
    groups = trace.groups
    scores = {name: torch.zeros(group.channels, dtype=torch.float32) for name, group in groups.items()}
    if not scores:
        return scores
    members = {name: _scored_members(model, group) for name, group in groups.items()}
    count = 0
    loss, device = loss_of(loss), device_of(model)
    with eval_mode(model), torch.enable_grad(), _differentiable(model):
        for batch in batches:
            with parametrize.cached():  # the weights that parametrizations compute are those of the pass
                inputs, targets = to_device(batch, device)
                value = loss(model, fresh(inputs), targets)
                if not torch.isfinite(value):
                    raise PruningError(
                        f"the loss on calibration batch {count} is {value.item()}; taylor needs a finite "
                        "one: check the weights and this batch"
                    )
                parameters = _output_parameters(model, members.values())
                found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                gradients = dict(zip(parameters, found, strict=True))
                count += 1
                for name, group in groups.items():
                    change = _first_order_change(model, group, members[name], parameters, gradients)
                    scores[name] += change.square()
    if not count:
        raise PruningError("taylor needs at least one calibration batch; the given data has none")
    return {name: score / count for name, score in scores.items()}


def sensitivity(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score channels by measuring the loss of each group at several widths, on the given batches.

    Within a group, `taylor` orders the channels. The model must be a classifier: `loss` is ignored, and
    cross entropy is measured.

    Raises:
        PruningError: if there is no group or no batch, or a class is missing.
    """
    device = device_of(model)
    labeled: list[LabeledBatch] = [to_device(batch, device) for batch in batches]
    sweep = WidthSweep(model, trace, labeled, labeled)
    curves = sweep.dense_result(channel_order(taylor(model, trace, labeled, cross_entropy)))
    points = points_to_measure(trace, SENSITIVITY_WIDTHS)
    measured = sweep.measure(curves.order, points)
    curves.points.extend(tqdm(measured, "sensitivity", total=len(points), disable=None, leave=False))
    return curves.scores(model, trace.groups)


def fisher(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score a channel by the divergence from the dense network if it is removed, to second order.

    It is `taylor` with targets that are drawn from the network's own predictions (`SampledLoss`), so it needs
    no targets. If `loss` is another than cross entropy, outputs are taken for values instead of logits.
    """
    sampled = SampledLoss(loss is cross_entropy)
    return {name: score / 2 for name, score in taylor(model, trace, batches, sampled).items()}


def reconstruction(model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: Loss) -> Scores:
    """Score a channel by the loss it adds if the layers that read it are refitted, for `prune(refit=True)`.

    See `pruning.planning.reconstruction`. Groups that no refittable layer reads are scored by `fisher`. No
    targets are needed; `loss` is used as in `fisher`.
    """
    scores: Scores = dict(reconstruction_losses(model, trace, batches, SampledLoss(loss is cross_entropy)))
    if missing := {name: group for name, group in trace.groups.items() if name not in scores}:
        scores |= fisher(model, replace(trace, groups=missing), batches, loss)
    return {name: scores[name] for name in trace.groups}


BY_NAME: dict[str, ScoreFunction] = {
    "taylor": taylor,
    "bn_scale": bn_scale,
    "l1": l1,
    "l2": l2,
    "random": random,
    "sensitivity": sensitivity,
    "fisher": fisher,
    "reconstruction": reconstruction,
}

NAMES = SCORES


def score_channels(
    model: nn.Module, trace: Trace, score: Score, batches: Sequence[Batch], loss: Loss
) -> Scores:
    """Score every channel of a model.

    Args:
        score: a name in `BY_NAME`, or a function. A function with four required positional arguments
            is called as (model, trace, batches, loss), any other as (model, groups).
        batches: pairs (inputs, targets), for scores that need data. loss: loss on these batches.

    Returns:
        By group, the score of each channel, (channels,).

    Raises:
        PruningError: if the name is unknown.

    >>> from pruning.tracing.trace import trace
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> def first_channels(model, groups):
    ...     return {name: -torch.arange(group.channels) for name, group in groups.items()}
    >>> score_channels(net, trace(net, torch.zeros(1, 3)), first_channels, [], cross_entropy)
    {'0': tensor([ 0, -1, -2, -3])}
    """
    model = unwrapped(model)
    reinstate(trace.inferred)
    if not callable(score):
        if score not in BY_NAME:
            raise PruningError(
                f"score {score!r} is unknown; choose one of: {', '.join(NAMES)}; or give a function of "
                "(model, trace, batches, loss)"
            )
        return BY_NAME[score](model, trace, batches, loss)
    if _required_arguments(score) == 4:
        return cast(ScoreFunction, score)(model, trace, batches, loss)
    return cast(Callable[[nn.Module, Groups], Scores], score)(model, trace.groups)


def _required_arguments(function: Callable[..., object]) -> int:
    """Return the number of positional arguments without a default; 0 if it is unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some functions written in C
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _differentiable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Allow gradients through recurrent layers in eval mode, which cuDNN does not support."""
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()


def _output_parameters(model: nn.Module, members: Iterable[list[Member]]) -> dict[_Key, Tensor]:
    """Return the tensors that make the channels of members, after a forward pass that computed them."""
    layers = {member.layer: submodule(model, member.layer) for scored in members for member in scored}
    return {
        (name, kind): tensor
        for name, layer in layers.items()
        for kind in output_tensors(layer)
        if isinstance(tensor := getattr(layer, kind, None), Tensor) and tensor.requires_grad
    }


def _first_order_change(
    model: nn.Module,
    group: Group,
    members: list[Member],
    parameters: Mapping[_Key, Tensor],
    gradients: Mapping[_Key, Tensor | None],
) -> Tensor:
    """Return the negative first-order change of the loss when each channel is removed, (channels,)."""
    change = torch.zeros(group.channels, dtype=torch.float32)
    for member in members:
        for kind in output_tensors(submodule(model, member.layer)):
            gradient = gradients.get((member.layer, kind))
            if gradient is not None:
                products = parameters[member.layer, kind].detach() * gradient.to_dense()
                rows = output_rows(submodule(model, member.layer), kind, products)
                change += _per_channel(group, member, rows.sum(1), scored=True)
    return change


def _has_scale(layer: nn.Module) -> bool:
    return isinstance(layer, _NORM) and layer.weight is not None


def _scored_members(model: nn.Module, group: Group) -> list[Member]:
    """Return the norms of a group that have scales, or else the layers that make its channels."""
    out = group.side("out")
    norms = [m for m in out if _has_scale(submodule(model, m.layer))]
    return norms or [m for m in out if makes_channels(submodule(model, m.layer))]


def _weight(model: nn.Module, member: Member) -> Tensor:
    weight = weight_of(submodule(model, member.layer))
    assert weight is not None
    return weight.detach()


def _per_channel(group: Group, member: Member, values: Tensor, *, scored: bool = False) -> Tensor:
    """Sum the values at a layer's positions to one value for each channel of the group.

    Args:
        scored: whether to leave out the positions that do not count for a change of the loss.
    """
    each = values.float().cpu()[member.index]
    if scored and member.scored is not None:
        each = torch.where(member.scored, each, 0)
    return torch.zeros(group.channels, dtype=torch.float32).index_add_(0, member.channel, each)


def _positions(group: Group, member: Member) -> Tensor:
    """Return the number of positions of a layer's side that each channel owns, at least 1."""
    return torch.bincount(member.channel, minlength=group.channels).clamp(min=1)


def _weight_norm(model: nn.Module, groups: Groups, order: int) -> Scores:
    scores = {}
    for name, group in groups.items():
        makers = [m for m in group.side("out") if makes_channels(submodule(model, m.layer))]
        each = [_norms(model, group, member, order) for member in makers]
        total = sum(each, torch.zeros(group.channels, dtype=torch.float32))
        scores[name] = _shares(total) * len(makers)
    return scores


def _norms(model: nn.Module, group: Group, member: Member, order: int) -> Tensor:
    """Return the norms of a layer's weights to a power, summed for each channel of the group, (channels,)."""
    layer, total = submodule(model, member.layer), torch.zeros(group.channels, dtype=torch.float32)
    for weight in output_weights(layer):
        rows = output_rows(layer, weight, getattr(layer, weight).detach())
        total += _per_channel(group, member, torch.linalg.vector_norm(rows, order, dim=1) ** order)
    return total


def _shares(values: Tensor) -> Tensor:
    """Divide each value by the sum of itself and all larger ones; of equal ones, the later count as smaller.

    >>> _shares(torch.tensor([4.0, 1.0, 0.0, 3.0]))
    tensor([1.0000, 0.1250, 0.0000, 0.4286])
    """
    order = len(values) - 1 - values.flip(0).sort(stable=True).indices
    rest = values[order].double().flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.double).tiny)
    shares = torch.empty_like(values)
    shares[order] = (values[order] / rest).to(values)
    return shares
