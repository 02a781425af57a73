"""The one place that counts params and MACs.

Convention: one multiply-add is one MAC; convolutions and linear layers count, for one
example; biases, norms (folded when shipped), activations and pooling do not. The count
with biases is given beside it, because some published figures include them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruning.graph.deformable import count_deformable
from pruning.graph.groups import Trace
from pruning.graph.layer_tensors import readers, weight_size
from pruning.graph.layers import (
    RECURRENT,
    WEIGHTED,
    Rule,
    bias_of,
    is_depthwise,
    is_registered,
    is_weighted,
    rule_for,
)
from pruning.utils.meta import Shapes, without_computing
from pruning.utils.modules import call, eval_mode
from pruning.utils.tree import Inputs, tensors

_COUNTED = (*WEIGHTED, *RECURRENT)


@dataclass(frozen=True)
class Cost:
    """What a network costs: parameters, MACs for one example, channels of its prunable groups.

    `channels` is known where the groups are, from a `CostModel`; elsewhere it is 0, and
    comparisons leave it out.
    """

    params: int
    macs: int
    macs_with_bias: int
    channels: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.params:,} params, {self.macs:,} MACs"


def count(model: nn.Module, inputs: Inputs) -> Cost:
    """Count a model by thop, as it stands (fold its BatchNorm first to count what ships).

    Args:
        inputs: example inputs with a batch dimension; the MACs are divided by its size.

    thop sees layers, not functional calls such as attention, for which PyTorch's flop counter
    is asked besides, and the larger count is given; a layer type that neither knows counts 0
    (`uncounted` lists them). Nothing is computed where the model runs on the meta device.
    """
    return without_computing(_counted, model, inputs)


def _counted(probe: nn.Module, inputs: Inputs) -> Cost:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop imports distutils
        from thop import profile

    count_deformable()
    params = sum(p.numel() for p in probe.parameters())
    probe = getattr(probe, "_orig_mod", probe)  # of a compiled model, whose attributes are its own twice
    probe.eval()
    rules: dict[type[nn.Module], Callable[..., None]] = {}
    for layer in probe.modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            rules[type(layer)] = _transposed
        elif isinstance(layer, RECURRENT):
            rules[type(layer)] = _recurrent
        elif not isinstance(layer, _COUNTED) and not list(layer.children()):
            rules[type(layer)] = _zero  # of a layer: thop skips whatever is inside one with a rule
    whole = _Called(probe, inputs)
    with torch.no_grad():
        with Shapes(), FlopCounterMode(display=False) as flops, _BiasCounter(probe) as biases:
            call(probe, inputs)
        try:
            with Shapes():
                macs, _ = profile(whole, inputs=(), custom_ops=rules, verbose=False)
        except IndexError:  # a layer called by keyword, of which thop's rules do not see the input
            macs = 0
    macs = max(macs, flops.get_total_flops() / 2)
    batch = tensors(inputs)[0].shape[0]
    return Cost(params, round(macs / batch), round((macs + biases.total) / batch))


class _Called(nn.Module):
    """A model and its inputs, for thop, which knows inputs by position alone."""

    def __init__(self, model: nn.Module, inputs: Inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self) -> Any:
        return call(self.model, self.inputs)


def _zero(layer: nn.Module, args: Any, output: Any) -> None:
    """thop's rule for a layer that costs no MACs."""


def _transposed(layer: Any, args: Any, output: Any) -> None:
    """thop's own rule takes the output's positions; each weight meets every input position."""
    layer.total_ops += args[0].numel() * layer.weight[0].numel()


def _recurrent(layer: Any, args: Any, output: Any) -> None:
    """thop's own rules count biases and gates, too; each weight is used once at every time step."""
    steps = tensors(args)[0].numel() / layer.input_size
    layer.total_ops += round(steps * sum(p.numel() for p in layer.parameters() if p.ndim > 1))


class _BiasCounter:
    """Counts, while open, the additions of biases in convolutions and linear layers."""

    def __init__(self, model: nn.Module):
        self.total = 0
        layers = (m for m in model.modules() if is_weighted(m))
        self.handles = [m.register_forward_hook(self._add) for m in layers if bias_of(m) is not None]

    def _add(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.total += output.numel()

    def __enter__(self) -> _BiasCounter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def uncounted(model: nn.Module) -> dict[str, str]:
    """Layers with weights that the count of MACs leaves out: name to type."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
        and ((rule := rule_for(module)) is None or rule.kind == "embedding")
    }


class _Row(NamedTuple):
    """A layer in the closed form: the widths of its sides, and what their product costs."""

    out: np.ndarray
    out_fixed: float
    into: np.ndarray
    in_fixed: float
    params: float
    macs: float
    bias: float
    bias_macs: float


class CostModel:
    """The cost of a traced model in closed form, at any widths of its groups.

    Widths are given per group as a vector in the order of `groups`. Every weight's size is
    a product of (input width) and (output width), each a fixed part plus what the groups
    contribute, so the cost of a plan needs no surgery. BatchNorm counts as folded wherever
    it can be.
    """

    def __init__(self, model: nn.Module, trace: Trace):
        self.groups = list(trace.groups)
        self.full = np.array([trace.groups[g].channels for g in self.groups], dtype=np.float64)
        position = {name: i for i, name in enumerate(self.groups)}
        folded = set(trace.foldable.values())

        # For every side of every layer: how many of its positions one channel of each group owns.
        share: dict[tuple[str, str], np.ndarray] = {}
        lies: dict[str, int] = {}
        for name, group in trace.groups.items():
            for member in group.members:
                lies[member.layer] = member.dim
                owns = share.setdefault((member.layer, member.side), np.zeros(len(self.groups)))
                owns[position[name]] += len(member.index) / group.channels

        rows: list[_Row] = []
        #: The layer of each row of the closed form; empty for what no pass runs on its own.
        self.layers: list[str] = []
        nothing = np.zeros(len(self.groups))
        self.fixed_params, self.fixed_macs = 0.0, trace.other_macs
        loose: dict[str, Tensor] = dict(model.named_parameters())
        for (name, side), owns in share.items():
            if side == "self" and name in loose:  # a parameter outside the layers of the table
                size = loose[name].shape[lies[name]]
                per_position = loose.pop(name).numel() / size
                fixed = float(size - owns @ self.full)
                rows.append(_Row(owns, fixed, nothing, 1.0, per_position, 0.0, 0.0, 0.0))
                self.layers.append("")
        for name, layer in model.named_modules():
            own = [f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False)]
            numel = sum(loose[key].numel() for key in own if key in loose)  # shared ones count once
            rule = rule_for(layer)
            if rule is None or name in folded:
                self.fixed_params += 0 if name in folded else numel
                continue
            out, into, in_fixed = share.get((name, "out"), nothing), nothing, 1.0
            out_width = rule.width(layer, "out")
            out_fixed = float(out_width - out @ self.full)
            if rule.into and not is_depthwise(layer):
                into = share.get((name, "in"), nothing)
                in_fixed = float(rule.width(layer, "in") - into @ self.full)
            use = trace.uses.get(name)
            if isinstance(layer, RECURRENT):  # what it reads with; the rest stays as it is
                taken = sum(reader.weight.numel() for reader in readers(layer))
                weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
                steps = use.uses if use is not None else 0.0
                per_channel = taken / rule.width(layer, "in")
                rows.append(_Row(nothing, 1.0, into, in_fixed, per_channel, per_channel * steps, 0.0, 0.0))
                self.layers.append("")
                self.fixed_params += numel - taken
                self.fixed_macs += steps * (weights - taken)
                continue
            if is_registered(layer):
                numel -= self._add_other_tensors(layer, rule, rows, (out, out_fixed), (into, in_fixed))
            self.layers.append(name if use is not None else "")
            if use is None:  # a norm, a PReLU, a layer that is not run: so much per channel
                per_product = numel / max(1.0, float(out_width * (in_fixed + into @ self.full)))
                rows.append(_Row(out, out_fixed, into, in_fixed, per_product, 0.0, 0.0, 0.0))
            else:
                with eval_mode(layer):  # in training a parametrized weight may change as it is read
                    kernel = weight_size(layer) / float(out_width * (in_fixed + into @ self.full))
                # A weight that another layer has already counted, or that is computed from others.
                own_weight = kernel if f"{name}.{rule.weight}".lstrip(".") in loose else 0.0
                bias = float(use.bias)
                macs, bias_macs = kernel * use.uses, use.positions * bias
                rows.append(_Row(out, out_fixed, into, in_fixed, own_weight, macs, bias, bias_macs))

        def column(name: str, *shape: int) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], dtype=np.float64).reshape(len(rows), *shape)

        groups = len(self.groups)
        self._out, self._in = column("out", groups), column("into", groups)
        self._out_fixed, self._in_fixed = column("out_fixed"), column("in_fixed")
        self._params, self._macs = column("params"), column("macs")
        self._bias, self._bias_macs = column("bias"), column("bias_macs")

    def _add_other_tensors(
        self,
        layer: nn.Module,
        rule: Rule,
        rows: list[_Row],
        out: tuple[np.ndarray, float],
        into: tuple[np.ndarray, float],
    ) -> int:
        """Count what a registered layer has beside its weight and bias; returns how many parameters."""
        nothing, total = np.zeros(len(self.groups)), 0
        for name, parameter in layer.named_parameters(recurse=False):
            if name == rule.bias or (name in rule.out and name in rule.into):
                continue
            total += parameter.numel()
            if name in rule.out or name in rule.into:
                side, fixed = out if name in rule.out else into
                each = parameter.numel() / float(fixed + side @ self.full)
                rows.append(_Row(side, fixed, nothing, 1.0, each, 0.0, 0.0, 0.0))
                self.layers.append("")
            else:
                self.fixed_params += parameter.numel()
        return total

    def _widths(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._out @ widths + self._out_fixed, self._in @ widths + self._in_fixed

    def sides(self, widths: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Output and input channels of every convolution and linear layer that runs.

        Args:
            widths: of the groups, (groups,) or (groups, plans); the result has a value per plan.
                The input channels of a depthwise convolution count as 1.
        """
        fixed = (self._out_fixed, self._in_fixed)
        out, into = (
            side @ widths + (offset if widths.ndim == 1 else offset[:, None])
            for side, offset in zip((self._out, self._in), fixed, strict=True)
        )
        return {name: (out[i], into[i]) for i, name in enumerate(self.layers) if name}

    def __call__(self, widths: np.ndarray | Mapping[str, int]) -> Cost:
        """The cost at the given widths; groups that a mapping does not name stay full."""
        if isinstance(widths, Mapping):
            widths = np.array([widths.get(g, n) for g, n in zip(self.groups, self.full, strict=True)], float)
        out, into = self._widths(widths)
        weights = out * into
        macs = self.fixed_macs + weights @ self._macs
        params = self.fixed_params + weights @ self._params + out @ self._bias
        with_bias = macs + out @ self._bias_macs
        return Cost(round(params), round(macs), round(with_bias), round(widths.sum()))

    def freed(self, widths: np.ndarray, channels: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
        """What narrowing each group alone by `channels` frees of each cost, (groups,) each.

        Exact: a weight that loses on both sides at once is counted once.
        """
        out, into = self._widths(widths)
        lost_out, lost_in = self._out * channels, self._in * channels
        weights = out[:, None] * lost_in + into[:, None] * lost_out - lost_out * lost_in
        return {
            "params": self._params @ weights + self._bias @ lost_out,
            "macs": self._macs @ weights,
            "channels": np.broadcast_to(channels, widths.shape),
        }
