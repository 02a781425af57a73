"""Build the rows of the closed form of the cost: one row per layer or parameter."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from pruning.graph.computed import sources
from pruning.graph.groups import Trace
from pruning.graph.inferred import reinstate
from pruning.graph.layer_tensors import readers, weight_size
from pruning.graph.layers import (
    has_more_parameters,
    is_depthwise,
    is_inferred,
    is_of_layer,
    is_registered,
    layer_width,
    rule_for,
    rule_of,
)
from pruning.graph.owned import Terms
from pruning.graph.recurrent import (
    RECURRENT,
    gate_tensors,
    gates,
    hidden_readers,
    is_recurrent,
)
from pruning.graph.rule import Rule, dimensions
from pruning.utils.held_weight import HeldWeight
from pruning.utils.modules import eval_mode, submodule


class Row(NamedTuple):
    """One row of the closed form.

    The output width is `out @ terms + out_fixed`, the input width `into @ terms + in_fixed`. `params`
    and `macs` are multiplied by both widths, `bias` and `bias_macs` by the output width.
    """

    layer: str
    out: np.ndarray
    out_fixed: float
    into: np.ndarray
    in_fixed: float
    params: float
    macs: float = 0.0
    bias: float = 0.0
    bias_macs: float = 0.0


class RowTable:
    """The rows of the closed form, and the costs that do not depend on the widths."""

    def __init__(self, model: nn.Module, trace: Trace):
        reinstate(trace.inferred)
        self.trace, self.terms = trace, Terms(trace)
        self.full, self.owned = self.terms.full, self.terms.sides
        self.folded = set(trace.foldable.values())
        self.none = np.zeros(len(self.full))
        #: Parameters that no row has counted yet, by name; a shared parameter is listed once.
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.rows: list[Row] = []
        self.fixed_params, self.fixed_macs = 0.0, trace.other_macs
        self._add_parameters()
        modules = dict(model.named_modules())
        for name in trace.uses.keys() - modules.keys():
            self._add_held(name, submodule(model, name))
        for name, layer in model.named_modules():
            self._add_layer(name, layer)
        for use, ((rows, rows_fixed), (columns, columns_fixed)) in zip(
            trace.products, self.terms.counted, strict=True
        ):
            self.rows.append(Row("", rows, rows_fixed, columns, columns_fixed, 0.0, use.macs))

    def _add_parameters(self) -> None:
        """Add a row for each parameter outside the layers of the table that belongs to a group."""
        dims = {m.layer: m.dim for group in self.trace.groups.values() for m in group.members}
        for (name, side), owned in self.owned.items():
            if side == "self" and name in self.parameters:
                parameter = self.parameters.pop(name)
                size = math.prod(parameter.shape[d] for d in dimensions(parameter, dims[name]))
                per_position = parameter.numel() / size
                fixed = float(size - owned @ self.full)
                self.rows.append(Row("", owned, fixed, self.none, 1.0, per_position))

    def _add_layer(self, name: str, layer: nn.Module) -> None:
        own = [f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False)]
        params = sum(self.parameters[key].numel() for key in own if key in self.parameters)
        rule, use = rule_for(layer), self.trace.uses.get(name)
        if name in self.folded:  # its cost is that of the layer it is folded into
            return
        if rule is None:
            self.fixed_params += params
            return
        if isinstance(layer, RECURRENT):
            self._add_recurrent(name, layer, rule, params)
            return
        if is_registered(layer) or is_inferred(layer) or has_more_parameters(layer):
            params -= self._add_other_tensors(name, layer, rule)
        if use is None:  # a norm, a PReLU, a layer that does not run: no MACs
            row = self._sides(name, layer, rule)
            self.rows.append(
                row._replace(layer="", params=params / max(1.0, self._full_product(layer, rule, row)))
            )
        else:
            row = self._sides(name, layer, rule)
            with eval_mode(layer):  # reading a parametrized weight in training mode may change it
                kernel = weight_size(layer) / self._full_product(layer, rule, row)
            # A weight shared with another row, or computed from other parameters, adds no parameters.
            own_weight = kernel if f"{name}.{rule.weight}".lstrip(".") in self.parameters else 0.0
            own_weight += self._add_sources(name, layer, rule, row) * kernel
            bias = float(use.bias)
            macs, bias_macs = kernel * use.uses, use.positions * bias
            self.rows.append(row._replace(params=own_weight, macs=macs, bias=bias, bias_macs=bias_macs))

    def _add_held(self, name: str, layer: nn.Module) -> None:
        """Add a row for a parameter that code multiplies by; one of a layer is counted with that layer."""
        assert isinstance(layer, HeldWeight)
        row = self._sides(name, layer, rule_of(layer))
        kernel = layer.get_parameter("weight").numel() / self._full_product(layer, rule_of(layer), row)
        owner, counted = name.rpartition(".")[0], False
        if (owner, "in") in self.owned or (owner, "out") in self.owned or owner in self.trace.uses:
            counted = is_of_layer(layer.owner, layer.attribute)
        counted = counted or self.parameters.pop(name, None) is None
        macs = kernel * self.trace.uses[name].uses
        self.rows.append(row._replace(params=0.0 if counted else kernel, macs=macs))

    def _add_sources(self, name: str, layer: nn.Module, rule: Rule, row: Row) -> int:
        """Add rows for scales from which a layer computes its weight; return the number of full weights."""
        weights = 0
        for key, parameter in sources(layer, rule.weight).items():
            full = f"{name}.{key}".lstrip(".")
            if self.parameters.pop(full, None) is None:
                continue
            wide = [d for d, size in enumerate(parameter.shape) if size > 1]
            if parameter.numel() == weight_size(layer):
                weights += 1
            elif wide == [rule.out[rule.weight]]:
                each = len(parameter.flatten()) / rule.width(layer, "out")
                self.rows.append(row._replace(layer="", into=self.none, in_fixed=1.0, params=each))
            elif wide == [rule.into.get(rule.weight)] and not is_depthwise(layer):
                each = len(parameter.flatten()) / rule.width(layer, "in")
                self.rows.append(row._replace(layer="", out=self.none, out_fixed=1.0, params=each))
            else:
                self.fixed_params += parameter.numel()
        return weights

    def _add_recurrent(self, name: str, layer: nn.Module, rule: Rule, params: int) -> None:
        """Add a row for the weights that read the input, and count the others as fixed."""
        into, in_fixed = self._input(name, layer, rule)
        use = self.trace.uses.get(name)
        steps = use.uses if use is not None else 0.0
        if is_recurrent(layer):
            self._add_gates(name, layer, into, in_fixed, steps)
            return
        reading = sum(reader.weight.numel() for reader in readers(layer))
        weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
        per_channel = reading / rule.width(layer, "in")
        self.rows.append(Row("", self.none, 1.0, into, in_fixed, per_channel, per_channel * steps))
        self.fixed_params += params - reading
        self.fixed_macs += steps * (weights - reading)

    def _add_gates(
        self, name: str, layer: nn.Module, into: np.ndarray, in_fixed: float, steps: float
    ) -> None:
        """Add a row for each tensor of a recurrent layer."""
        units, made = float(layer_width(layer, "out")), gate_tensors(layer)
        times, reading = dict(hidden_readers(layer)), rule_of(layer).into
        out = self.owned.get((name, "out"), self.none)
        fixed = units - float(out @ self.full)
        for key, parameter in layer.named_parameters(recurse=False):
            each = float(gates(layer)) if key in made else float(len(parameter))
            row = Row("", out, fixed, self.none, 1.0, each)
            if key not in made:
                row = row._replace(out=self.none, out_fixed=1.0)
            if key in times:
                row = row._replace(into=out * times[key], in_fixed=fixed * times[key])
            elif key in reading:
                row = row._replace(into=into, in_fixed=in_fixed)
            elif parameter.ndim > 1:
                row = row._replace(in_fixed=float(parameter.shape[1]))
            self.rows.append(row._replace(macs=each * steps if parameter.ndim > 1 else 0.0))

    def _add_other_tensors(self, name: str, layer: nn.Module, rule: Rule) -> int:
        """Add a layer's parameters besides weight and bias; return their number of elements."""
        sides, total = self._sides(name, layer, rule), 0
        for key, parameter in layer.named_parameters(recurse=False):
            if key == rule.bias or (key in rule.out and key in rule.into):
                continue
            if f"{name}.{key}".lstrip(".") not in self.parameters:
                continue  # it has a row of its own
            total += parameter.numel()
            if key in rule.out or key in rule.into:
                side, fixed = (
                    (sides.out, sides.out_fixed) if key in rule.out else (sides.into, sides.in_fixed)
                )
                each = parameter.numel() / float(fixed + side @ self.full)
                self.rows.append(Row("", side, fixed, self.none, 1.0, each))
            else:
                self.fixed_params += parameter.numel()
        return total

    def _sides(self, name: str, layer: nn.Module, rule: Rule) -> Row:
        """Return a row with the widths of a layer, without costs."""
        out = self.owned.get((name, "out"), self.none)
        into, in_fixed = self._input(name, layer, rule)
        return Row(name, out, float(rule.width(layer, "out") - out @ self.full), into, in_fixed, params=0.0)

    def _input(self, name: str, layer: nn.Module, rule: Rule) -> tuple[np.ndarray, float]:
        """Return a layer's input width as a function of the group widths: coefficients and constant."""
        if not rule.into or is_depthwise(layer):
            return self.none, 1.0
        into = self.owned.get((name, "in"), self.none)
        return into, float(rule.width(layer, "in") - into @ self.full)

    def _full_product(self, layer: nn.Module, rule: Rule, row: Row) -> float:
        """Return output width times input width at full width."""
        return float(rule.width(layer, "out") * (row.in_fixed + row.into @ self.full))
