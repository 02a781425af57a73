"""Diagnose what can be pruned in a model, without changing the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from pruning.graph.groups import Group, Ignored, Trace
from pruning.graph.layers import makes_channels
from pruning.graph.plan import Plan
from pruning.planning.cost import Cost, CostModel, uncounted
from pruning.planning.options import MOST
from pruning.surgery.apply import apply
from pruning.surgery.verify import compare_with_masked, with_random_weights
from pruning.tracing.left_out import groups_at_fault, without_groups
from pruning.tracing.trace import trace
from pruning.utils.entries import Also
from pruning.utils.modules import buffers_unchanged, submodule
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs
from pruning.utils.wording import number_of


@dataclass(frozen=True)
class GroupFacts:
    """A group that can be narrowed.

    Attributes:
        name: name of the group.
        channels: its width.
        makes: names of the layers that produce its channels.
        reads: names of the layers that consume its channels.
        params: share of the network's parameters that removing one channel frees, 0 to 1.
        macs: share of the network's MACs that removing one channel frees, 0 to 1.
        scales: names of the BatchNorm layers with a scale γ; stage 1 shrinks γ and `bn_scale` scores by γ.
    """

    name: str
    channels: int
    makes: list[str]
    reads: list[str]
    params: float
    macs: float
    scales: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor` as plain data; `str` formats it as text.

    Attributes:
        model: class name of the model.
        cost: cost of the network, BatchNorm folded.
        least: cost with one channel left in every group.
        least_step: least cost after a step that drops at most nine tenths of each group, as by default.
        groups: groups that can be narrowed.
        skipped: layers that keep all their channels, each with the reason and the cure.
        sizes: names of attributes that hold a number of channels; pruning updates them.
        stale: attributes that equal a width, but that the traced passes do not read; pruning leaves them.
        uncounted: layers with weights whose MACs are not counted, name to type.
        trial: empty if the network passes the equivalence check with every second channel removed;
            otherwise the error message.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pruning import doctor
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(str(doctor(net, torch.zeros(1, 4))).splitlines()[0])
        Sequential: 58 params, 48 MACs
    """

    model: str
    cost: Cost
    least: Cost
    least_step: Cost
    groups: list[GroupFacts]
    skipped: dict[str, str]
    sizes: list[str]
    stale: list[str]
    uncounted: dict[str, str]
    trial: str

    def to_json(self) -> dict[str, object]:
        """Return everything as dicts, lists, numbers and strings."""
        return asdict(self)

    def _share(self, cost: Cost) -> str:
        """Format a cost with its share of the network's."""
        return (
            f"{cost.params:,} params ({cost.params / max(1, self.cost.params):.1%}), "
            f"{cost.macs:,} MACs ({cost.macs / max(1, self.cost.macs):.1%})"
        )

    @property
    def without_scale(self) -> list[str]:
        """Return the names of the groups without a BatchNorm scale."""
        return [group.name for group in self.groups if not group.scales]

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.cost}",
            f"least cost, with one channel per group: {self._share(self.least)}",
            f"after one step of `prune`, with a tenth of each group: {self._share(self.least_step)}",
            "",
            f"{number_of(len(self.groups), 'group')} can be narrowed; removing one channel frees (params, "
            "MACs):"
            if self.groups
            else "no group can be narrowed",
        ]
        width = max([len(group.name) for group in self.groups], default=0)
        for group in self.groups:
            others = [name for name in group.makes if name != group.name]
            coupled = f"; coupled with {_listed(others)}" if others else ""
            noun = "channel" if group.channels == 1 else "channels"
            lines.append(
                f"  {group.name:<{width}}  {group.channels:>5} {noun:<8}  {group.params:7.3%}  "
                f"{group.macs:7.3%}  read by {_listed(group.reads)}{coupled}"
            )
        if self.without_scale and self.groups:
            lines += [
                "",
                f"{number_of(len(self.without_scale), 'group', ('has', 'have'))} no BatchNorm scale "
                f"({_listed(self.without_scale)}): "
                "stage 1 pulls other norms or their weights instead; score by taylor, l1 or l2",
            ]
        if self.skipped:
            lines += [
                "",
                f"{number_of(len(self.skipped), 'layer', ('keeps all its', 'keep all their'))} channels:",
            ]
            lines += [f"  {layer}: {reason}" for layer, reason in self.skipped.items()]
        if self.sizes:
            lines += ["", f"attributes that pruning updates to the new widths: {_listed(self.sizes)}"]
        if self.stale:
            lines += ["", f"attributes that equal a width, and that pruning leaves: {len(self.stale)}"]
            lines += [f"  {held}" for held in self.stale]
        if self.uncounted:
            listed = _listed([f"{name} ({kind})" for name, kind in self.uncounted.items()])
            lines += ["", f"layers with weights whose MACs are not counted: {listed}"]
        passed = "passed: with half of every group removed, the outputs are those that the plan implies"
        if self.groups:
            lines += ["", f"trial {passed if not self.trial else 'failed: ' + self.trial}"]
        return "\n".join(lines)


@buffers_unchanged
def doctor(
    model: nn.Module,
    inputs: Inputs,
    ignored: Iterable[Ignored] = (),
    *,
    outputs: Outputs = None,
    also: Iterable[Also] = (),
) -> Diagnosis:
    """Diagnose what can be pruned in a model; the model is not changed.

    Args:
        model: the model.
        inputs: example inputs with a batch dimension: a tensor, a sequence of arguments, or a mapping of
            keyword arguments.
        ignored: layers that must keep all their channels: name patterns, types or instances.
        outputs, also: which outputs count, and other ways to call the model, as in `trace`.

    Returns:
        The groups and the cost of their channels, the layers that keep all their channels with the
        reason, and whether the outputs stay correct with half of the channels removed.

    Raises:
        PruningError: If the model does not run on the inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pruning import doctor
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
        >>> found = doctor(net, torch.zeros(1, 1, 4, 4))
        >>> [(group.name, group.channels, group.reads) for group in found.groups]
        [('0', 6, ['3'])]
        >>> list(found.skipped), found.trial
        (['3'], '')
    """
    traced, trial = _tried(model, trace(model, inputs, ignored, outputs=outputs, also=also), inputs)
    cost_model = CostModel(model, traced)
    full = cost_model.full
    cost = cost_model(full)
    freed = cost_model.freed(full)
    groups = [
        _facts(model, group, *(freed[what][i] / max(1, getattr(cost, what)) for what in ("params", "macs")))
        for i, group in enumerate(traced.groups.values())
    ]
    return Diagnosis(
        type(model).__name__,
        cost,
        cost_model(np.ones_like(full)),
        cost_model(np.ceil((1 - MOST) * full - 1e-9)),
        groups,
        traced.skipped,
        [size.name for size in traced.sizes],
        [str(held) for held in traced.stale],
        uncounted(model, traced),
        trial,
    )


def _tried(model: nn.Module, traced: Trace, inputs: Inputs) -> tuple[Trace, str]:
    """Remove every second channel; return the trace without groups at fault, and what else is wrong."""
    with torch.random.fork_rng(devices=[]):
        # A weight of 0 would hide errors in the channels that it reads; random weights do not.
        randomized = with_random_weights(model, inputs)
    while traced.groups:
        plan = Plan({name: tuple(range(0, group.channels, 2)) for name, group in traced.groups.items()})
        small = apply(randomized, traced, plan)
        problem = compare_with_masked(randomized, small, traced, plan, inputs)[0]
        if not problem:
            break
        at_fault = groups_at_fault(randomized, traced, plan, inputs)
        if not at_fault:
            return traced, f"surgery is not equivalent to the plan: {problem}"
        traced = without_groups(traced, at_fault)
    return traced, ""


def _facts(model: nn.Module, group: Group, params: float, macs: float) -> GroupFacts:
    out = [(m.layer, submodule(model, m.layer)) for m in group.side("out")]
    return GroupFacts(
        group.name,
        group.channels,
        [name for name, layer in out if makes_channels(layer)],
        [m.layer for m in group.side("in")],
        float(params),
        float(macs),
        [
            n
            for n, layer in out
            if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.weight is not None
        ],
    )


def _listed(names: list[str]) -> str:
    """Join up to four names; of more names, join three and give the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more
