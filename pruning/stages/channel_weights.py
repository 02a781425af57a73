"""Read and shrink the weights that make each channel of a group, as group lasso does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.graph.groups import Group
from pruning.graph.layer_tensors import output_rows, output_tensors, scale_rows
from pruning.graph.layers import makes_channels
from pruning.utils.modules import submodule


class Rows(NamedTuple):
    """The rows of a parameter that make channels: row `positions[i]` belongs to channel `channels[i]`.

    Attributes:
        layer, name: the layer, and the name of its parameter.
        positions, channels: (positions,), on the parameter's device.
    """

    layer: nn.Module
    name: str
    positions: Tensor
    channels: Tensor

    @property
    def parameter(self) -> Tensor:
        return getattr(self.layer, self.name)

    def spread(self, factors: Tensor) -> Tensor:
        """Return a factor for each row of the parameter, given those of the channels; 1 for other rows."""
        tensor = self.parameter
        count = len(output_rows(self.layer, self.name, tensor.detach()))
        return factors.new_ones(count).index_copy_(0, self.positions, factors[self.channels])


class ChannelWeights:
    """The weights and biases that make the channels of a group, θ_c for channel c.

    Args:
        model: the traced model.
        group: a group of its trace.

    Attributes:
        rows: by layer and parameter; empty if a parameter is computed from others, or frozen: the channels
            cannot become 0 then.
        reference: mean of ‖θ_c‖ over the channels when this object was made.

    >>> from pruning.tracing.trace import trace
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> weights = ChannelWeights(net, trace(net, torch.zeros(1, 2)).groups["0"])
    >>> weights.scale(torch.tensor([0.0, 1.0, 1.0]))
    >>> weights.norms() == 0
    tensor([ True, False, False])
    """

    def __init__(self, model: nn.Module, group: Group):
        self.channels = group.channels
        self.rows: list[Rows] = []
        seen: set[int] = set()
        for member in group.side("out"):
            layer = submodule(model, member.layer)
            if not makes_channels(layer):
                continue
            for name in output_tensors(layer):
                tensor = getattr(layer, name, None)
                if tensor is None or id(tensor) in seen:  # layers may share a parameter
                    continue
                seen.add(id(tensor))
                places = (x.to(tensor.device) for x in (member.index, member.channel))
                self.rows.append(Rows(layer, name, *places))
        parameters = [rows.parameter for rows in self.rows]
        if not all(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters):
            self.rows = []
        self.reference = float(self.norms().mean()) if self.rows else 0.0

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return ‖θ_c‖, (channels,), on the device of the first parameter."""
        total = torch.zeros(0)
        for rows in self.rows:
            parameter = rows.parameter.detach()
            squares = output_rows(rows.layer, rows.name, parameter).float().square().sum(1)
            if not len(total):
                total = squares.new_zeros(self.channels)
            own = squares[rows.positions].to(total.device)
            total.index_add_(0, rows.channels.to(total.device), own)
        return total.sqrt()

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply θ_c by a factor for each channel, (channels,); 0 gives exact zeros."""
        for rows in self.rows:
            parameter = rows.parameter
            spread = rows.spread(factors.to(parameter.device, parameter.dtype))
            scale_rows(rows.layer, rows.name, parameter, spread)

    @torch.no_grad()
    def shrink(self, threshold: Tensor) -> None:
        """Take the proximal step of group lasso: θ_c ← θ_c max(0, 1 − threshold_c / ‖θ_c‖).

        Args:
            threshold: (channels,), in units of `reference`.
        """
        norms = self.norms()
        by = threshold.to(norms.device) * self.reference
        # A channel at 0 stays there under any threshold, and without one nothing changes.
        factors = torch.where(norms > by, 1 - by / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0)
        self.scale(torch.where(by > 0, factors, 1))

    def first_order_change(self) -> Tensor | None:
        """Return Σ θ_c ∂L/∂θ_c, (channels,), on the CPU; None without gradients."""
        change = torch.zeros(self.channels)
        for rows in self.rows:
            parameter = rows.parameter
            if parameter.grad is None:
                return None
            product = parameter.detach() * parameter.grad
            each = output_rows(rows.layer, rows.name, product).float().sum(1)
            change.index_add_(0, rows.channels.cpu(), each[rows.positions].cpu())
        return change
