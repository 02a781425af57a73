"""Read the scales of norms, or else the weights, that decide whether a channel is alive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.graph.groups import Member, Trace
from pruning.planning.cost import Cost, CostModel
from pruning.stages.channel_weights import ChannelWeights
from pruning.utils.modules import submodule
from pruning.utils.wording import number_of
from pruning.utils.wrappers import unwrapped

_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase,)
#: Norms over several channels at a time.
_OTHER_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class ScaledNorm(NamedTuple):
    """The scales γ of one BatchNorm in a group: `weight[positions[i]]` scales channel `channels[i]`."""

    weight: Tensor
    positions: Tensor
    channels: Tensor


class ChannelScales:
    """The scales γ of every channel, and the channels that are alive: those with γ ≠ 0.

    These are the scales of BatchNorm; in a group without, those of LayerNorm, RMSNorm and GroupNorm; in a
    group without any norm, the norms ‖θ‖ of the weights and biases that make each channel, relative to
    their mean.

    Args:
        model: the traced model. Every method call reads its current scales.
        traced: trace of the model.
        cost_model: cost model of the model; built here if not given.

    Attributes:
        norms: by group, the norms that scale its channels; a group without any has no entry.
        rows: by group without norms, the weights that make its channels; a group whose weights are
            frozen, or computed from others, has no entry.
        cost_model: cost model of the model.
        dense: cost of the model at full widths.

    >>> from pruning.tracing.trace import trace
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> scales = ChannelScales(net, trace(net, torch.zeros(2, 3)))
    >>> net[1].weight.data[:3] = 0
    >>> scales.alive(), scales.left().channels
    ({'0': 1}, 1)
    """

    def __init__(self, model: nn.Module, traced: Trace, cost_model: CostModel | None = None):
        model = unwrapped(model)
        self.trace = traced
        self.cost_model = cost_model or CostModel(model, traced)
        self.dense = self.cost_model(self.cost_model.full)
        self.norms: dict[str, list[ScaledNorm]] = {}
        self.rows: dict[str, ChannelWeights] = {}
        for name, group in traced.groups.items():
            for kinds in (_BATCH_NORMS, _OTHER_NORMS):
                norms = [_scaled(submodule(model, m.layer), m, kinds) for m in group.side("out")]
                found = [norm for norm in norms if norm is not None]
                if found:
                    self.norms[name] = found
                    break
            else:
                weights = ChannelWeights(model, group)
                if weights.rows:
                    self.rows[name] = weights

    @property
    def pulled_groups(self) -> list[str]:
        """Return the groups that have scales or weights, in the order of the trace."""
        return [name for name in self.trace.groups if name in self.norms or name in self.rows]

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the largest |γ| of each channel by group, or its relative ‖θ‖, (channels,), on the CPU."""
        found = {}
        for name in self.pulled_groups:
            if name in self.rows:
                weights = self.rows[name]
                found[name] = weights.norms().cpu() / (weights.reference or 1.0)
                continue
            largest = torch.zeros(self.trace.groups[name].channels, dtype=torch.float32)
            for weight, positions, channels in self.norms[name]:
                values = weight.detach().abs()[positions].float().cpu()
                largest.scatter_reduce_(0, channels.cpu(), values, "amax")
            found[name] = largest
        return found

    def alive(self) -> dict[str, int]:
        """Return by group the number of channels with a scale other than 0; all of a group without scales."""
        living = {name: int((largest > 0).sum()) for name, largest in self.magnitudes().items()}
        return {name: living.get(name, group.channels) for name, group in self.trace.groups.items()}

    def left(self) -> Cost:
        """Return the cost of the network without the channels whose scales are 0."""
        return self.cost_model({group: max(1, width) for group, width in self.alive().items()})

    def references(self) -> dict[str, float]:
        """Return by group the mean ‖θ‖ to which those of the group are relative."""
        return {group: weights.reference for group, weights in self.rows.items()}

    def set_references(self, references: Mapping[str, float]) -> None:
        """Restore what `references` returned, in a resumed training."""
        for group, reference in references.items():
            if group in self.rows:
                self.rows[group].reference = reference

    @property
    def sign(self) -> str:
        """Return what is 0 for a channel that is not alive, as text."""
        return "γ" if not self.rows else "γ or weights" if self.norms else "weights"


def _scaled(layer: nn.Module, member: Member, kinds: tuple[type[nn.Module], ...]) -> ScaledNorm | None:
    """Return the scales of a norm of some kinds; None of another layer, or without scales."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, kinds) or not isinstance(weight, Tensor):
        return None
    return ScaledNorm(weight, member.index.to(weight.device), member.channel.to(weight.device))


def joined(widths: Mapping[str, int]) -> str:
    """Return widths as text, `3-7-8-12` in the order of the groups; above 12 groups only their sum."""
    if len(widths) <= 12:
        return "-".join(str(w) for w in widths.values())
    return f"{number_of(sum(widths.values()), 'channel')} in {number_of(len(widths), 'group')}"
