"""Importance: functions from a model and its groups to one score per channel.

A score says how much a channel matters; the higher is kept. Each function returns, by
group name, a float32 tensor of shape (channels,). The model is left as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Member, Trace
from pruning.graph.layer_tensors import output_rows
from pruning.graph.layers import makes_channels, rule_of, weight_of
from pruning.planning import scores
from pruning.training.batches import to_device
from pruning.training.losses import Loss, cross_entropy, loss_of
from pruning.utils.modules import device_of, eval_mode
from pruning.utils.tree import fresh

Scores = dict[str, Tensor]

Groups = Mapping[str, Group]

_NORM = nn.modules.batchnorm._NormBase


def bn_scale(model: nn.Module, groups: Groups) -> Scores:
    """|γ| of the BatchNorm behind the channel (Liu et al., Network Slimming, ICCV 2017).

    Where several norms belong to a group, as across a residual sum, their mean.

    Raises `PruningError` for a group without a norm that has scales.
    """
    scores = {}
    for name, group in groups.items():
        norms = [m for m in group.side("out") if _has_scale(model.get_submodule(m.layer))]
        if not norms:
            raise PruningError(
                f"group {name!r} has no BatchNorm with a scale, which bn_scale needs; "
                "score it by taylor, l1 or l2"
            )
        scales = [_per_channel(group, m, _weight(model, m).abs()) / _positions(group, m) for m in norms]
        scores[name] = torch.stack(scales).mean(0)
    return scores


def l1(model: nn.Module, groups: Groups) -> Scores:
    """Sum of the absolute weights that make the channel (Li et al., ICLR 2017)."""
    return _weight_norm(model, groups, 1)


def l2(model: nn.Module, groups: Groups) -> Scores:
    """Euclidean norm of the weights that make the channel."""
    return _weight_norm(model, groups, 2)


def random(model: nn.Module, groups: Groups) -> Scores:
    """Uniform draws from torch's global generator: the baseline of every comparison."""
    return {name: torch.rand(group.channels) for name, group in groups.items()}


def taylor(
    model: nn.Module,
    groups: Groups,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss = cross_entropy,
) -> Scores:
    """How much the loss changes, to first order, when the channel is removed, squared.

    With a BatchNorm behind the channel (γ ∂L/∂γ + β ∂L/∂β)², else (Σ w ∂L/∂w)² over the
    weights and bias that make it, averaged over calibration batches (Molchanov et al.,
    Importance Estimation for Neural Network Pruning, CVPR 2019). Terms of layers that lose
    the channel together are added before squaring.

    Raises `PruningError` when there is no batch, or the loss is not finite.
    """
    members = {name: _scored_members(model, group) for name, group in groups.items()}
    parameters = {
        (member.layer, kind): parameter
        for chosen in members.values()
        for member in chosen
        for kind in rule_of(model.get_submodule(member.layer)).out
        if isinstance(parameter := getattr(model.get_submodule(member.layer), kind, None), nn.Parameter)
    }
    scores = {name: torch.zeros(group.channels, dtype=torch.float32) for name, group in groups.items()}
    if not scores:
        return scores
    count = 0
    loss, device = loss_of(loss), device_of(model)
    with eval_mode(model), torch.enable_grad(), _differentiable(model):
        for batch in batches:
            inputs, targets = to_device(batch, device)
            value = loss(model, fresh(inputs), targets)
            if not torch.isfinite(value):
                raise PruningError(
                    f"the loss on calibration batch {count} is {value.item()}: no gradient to score by"
                )
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            gradients = dict(zip(parameters, found, strict=True))
            count += 1
            for name, group in groups.items():
                change = torch.zeros(group.channels, dtype=torch.float32)
                for member in members[name]:
                    for kind in rule_of(model.get_submodule(member.layer)).out:
                        gradient = gradients.get((member.layer, kind))
                        if gradient is not None:
                            products = parameters[member.layer, kind].detach() * gradient.to_dense()
                            rows = output_rows(model.get_submodule(member.layer), kind, products)
                            change += _per_channel(group, member, rows.sum(1))
                scores[name] += change.square()
    if not count:
        raise PruningError("taylor needs at least one calibration batch; the given data has none")
    return {name: score / count for name, score in scores.items()}


def _differentiable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Lets gradients through recurrent layers in eval mode, which cuDNN's refuse."""
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()


#: The scores that need no data, by name.
BY_NAME: dict[str, Callable[[nn.Module, Groups], Scores]] = {
    "bn_scale": bn_scale,
    "l1": l1,
    "l2": l2,
    "random": random,
}

NAMES = ("taylor", *BY_NAME)


def _has_scale(layer: nn.Module) -> bool:
    return isinstance(layer, _NORM) and layer.weight is not None


def _scored_members(model: nn.Module, group: Group) -> list[Member]:
    """The norms of a group, or where it has none the layers that make its channels."""
    out = group.side("out")
    norms = [m for m in out if _has_scale(model.get_submodule(m.layer))]
    return norms or [m for m in out if makes_channels(model.get_submodule(m.layer))]


def _weight(model: nn.Module, member: Member) -> Tensor:
    weight = weight_of(model.get_submodule(member.layer))
    assert weight is not None
    return weight.detach()


def _per_channel(group: Group, member: Member, values: Tensor) -> Tensor:
    """Sum values per position of a layer's side into values per channel of the group."""
    return torch.zeros(group.channels, dtype=torch.float32).index_add_(
        0, member.channel, values.float().cpu()[member.index]
    )


def _positions(group: Group, member: Member) -> Tensor:
    """How many positions of a layer's side each channel owns, at least 1."""
    return torch.bincount(member.channel, minlength=group.channels).clamp(min=1)


def _weight_norm(model: nn.Module, groups: Groups, order: int) -> Scores:
    scores = {}
    for name, group in groups.items():
        total = torch.zeros(group.channels, dtype=torch.float32)
        for member in group.side("out"):
            layer = model.get_submodule(member.layer)
            if makes_channels(layer):
                rows = output_rows(layer, rule_of(layer).weight, _weight(model, member))
                norms = torch.linalg.vector_norm(rows, order, dim=1)
                total += _per_channel(group, member, norms**order)
        scores[name] = total ** (1 / order)
    return scores


#: A score by name, or a function (model, groups) -> one tensor (channels,) per group.
Score = str | Callable[[nn.Module, Groups], Scores]


#: The scores that have a name.
NAMES = (*scores.NAMES, "sensitivity")


def score_channels(
    model: nn.Module, traced: Trace, score: Score, calibration: Sequence[tuple[Any, Any]], loss: Loss
) -> Scores:
    """The importance of every channel, by a score's name or function, as `prune` takes it."""
    if callable(score):
        return score(model, traced.groups)
    if score == "taylor":
        return scores.taylor(model, traced.groups, calibration, loss)
    if not isinstance(score, str) or score not in scores.BY_NAME:
        raise PruningError(
            f"score {score!r} is unknown; there are: {', '.join(NAMES)}; or a function of (model, groups)"
        )
    with torch.no_grad():
        return scores.BY_NAME[score](model, traced.groups)
