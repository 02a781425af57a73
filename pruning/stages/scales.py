"""Read the BatchNorm scales of a model, by group and channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.graph.groups import Trace
from pruning.planning.cost import Cost, CostModel
from pruning.utils.wrappers import unwrapped


class ScaledNorm(NamedTuple):
    """The scales γ of one BatchNorm in a group: `weight[positions[i]]` scales channel `channels[i]`."""

    weight: Tensor
    positions: Tensor
    channels: Tensor


class ChannelScales:
    """The BatchNorm scales γ of every channel, and the channels that are alive: those with γ ≠ 0.

    Args:
        model: the traced model. Every method call reads its current scales.
        traced: trace of the model.
        cost_model: cost model of the model; built here if not given.

    Attributes:
        norms: by group, the norms that scale its channels; a group without any has no entry.
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
        for name, group in traced.groups.items():
            for member in group.side("out"):
                layer = model.get_submodule(member.layer)
                if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.weight is not None:
                    device = layer.weight.device
                    norm = ScaledNorm(layer.weight, member.index.to(device), member.channel.to(device))
                    self.norms.setdefault(name, []).append(norm)

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the largest |γ| of each channel by group, (channels,), on the CPU."""
        found = {}
        for name, norms in self.norms.items():
            largest = torch.zeros(self.trace.groups[name].channels, dtype=torch.float32)
            for weight, positions, channels in norms:
                values = weight.detach().abs()[positions].float().cpu()
                largest.scatter_reduce_(0, channels.cpu(), values, "amax")
            found[name] = largest
        return found

    def alive(self) -> dict[str, int]:
        """Return by group the number of channels with a scale other than 0; all of a group without norms."""
        living = {name: int((largest > 0).sum()) for name, largest in self.magnitudes().items()}
        return {name: living.get(name, group.channels) for name, group in self.trace.groups.items()}

    def left(self) -> Cost:
        """Return the cost of the network without the channels whose scales are 0."""
        return self.cost_model({group: max(1, width) for group, width in self.alive().items()})


def joined(widths: Mapping[str, int]) -> str:
    """Return widths as text, `3-7-8-12` in the order of the groups; above 12 groups only their sum."""
    if len(widths) <= 12:
        return "-".join(str(w) for w in widths.values())
    return f"{sum(widths.values()):,} channels in {len(widths)} groups"
