"""What pruning would do to a model, before anything is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Ignored
from pruning.graph.layers import makes_channels
from pruning.graph.plan import Plan
from pruning.planning.cost import Cost, CostModel, uncounted
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify, with_random_weights
from pruning.tracing.trace import trace
from pruning.utils.modules import buffers_unchanged
from pruning.utils.tree import Inputs


@dataclass(frozen=True)
class GroupFacts:
    """A group that can be narrowed.

    Attributes:
        makes, reads: the layers that make its channels, and those that consume them.
        params, macs: what one of its channels frees, of the whole network, 0 to 1.
        scales: BatchNorm layers with scales, on which stage 1 pulls and `bn_scale` scores.
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
    """What was found, as plain data (`to_json`) and as text (`str`).

    Attributes:
        cost: of the network, BatchNorm folded. least: at one channel in every group.
        skipped: layers whose channels stay, each with the reason and the cure.
        sizes: attributes by which modules view or split channels, and which follow them.
        uncounted: layers with weights that the count of MACs leaves out: name to type.
        trial: empty when the network passes the check of equivalence with half of every group
            gone, else what went wrong.
    """

    model: str
    cost: Cost
    least: Cost
    groups: list[GroupFacts]
    skipped: dict[str, str]
    sizes: list[str]
    uncounted: dict[str, str]
    trial: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def without_scale(self) -> list[str]:
        return [group.name for group in self.groups if not group.scales]

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.cost}",
            f"least that channels can reach: {self.least.params:,} params "
            f"({self.least.params / max(1, self.cost.params):.1%}), {self.least.macs:,} MACs "
            f"({self.least.macs / max(1, self.cost.macs):.1%})",
            "",
            f"{len(self.groups)} groups can be narrowed; one channel of each frees, of all params and MACs:"
            if self.groups
            else "no group can be narrowed",
        ]
        width = max([len(group.name) for group in self.groups], default=0)
        for group in self.groups:
            others = [name for name in group.makes if name != group.name]
            coupled = f"; with {_some(others)}" if others else ""
            lines.append(
                f"  {group.name:<{width}}  {group.channels:>5} channels  {group.params:7.3%}  "
                f"{group.macs:7.3%}  read by {_some(group.reads)}{coupled}"
            )
        if self.without_scale and self.groups:
            lines += [
                "",
                f"{len(self.without_scale)} of them have no BatchNorm scale ({_some(self.without_scale)}): "
                "stage 1 pulls on none there; score by taylor, l1 or l2",
            ]
        if self.skipped:
            lines += ["", f"{len(self.skipped)} layers keep all their channels:"]
            lines += [f"  {layer}: {reason}" for layer, reason in self.skipped.items()]
        if self.sizes:
            lines += ["", f"sizes in attributes that follow the channels: {_some(self.sizes)}"]
        if self.uncounted:
            listed = _some([f"{name} ({kind})" for name, kind in self.uncounted.items()])
            lines += ["", f"weights that the count of MACs leaves out: {listed}"]
        passed = "passed: with half of every group gone it computes what it should"
        if self.groups:
            lines += ["", f"trial {passed if not self.trial else 'failed: ' + self.trial}"]
        return "\n".join(lines)


@buffers_unchanged
def doctor(model: nn.Module, inputs: Inputs, ignored: Iterable[Ignored] = ()) -> Diagnosis:
    """Look at a model as pruning would, and change nothing.

    Args:
        inputs: example inputs with a batch dimension, as `trace` takes them.
        ignored: layers whose channels all stay.

    Raises `PruningError` when the model does not run on the inputs.
    """
    traced = trace(model, inputs, ignored)
    cost_model = CostModel(model, traced)
    full = cost_model.full
    cost = cost_model(full)
    freed = cost_model.freed(full)
    groups = [
        _facts(model, group, *(freed[what][i] / max(1, getattr(cost, what)) for what in ("params", "macs")))
        for i, group in enumerate(traced.groups.values())
    ]
    plan = Plan({name: tuple(range(0, group.channels, 2)) for name, group in traced.groups.items()})
    trial = ""
    if groups:
        try:
            with torch.random.fork_rng(devices=[]):
                lively = with_random_weights(model, inputs)  # random weights hide nothing behind a 0
                verify(lively, apply(lively, traced, plan), traced, plan, inputs)
        except PruningError as error:
            trial = str(error)
    return Diagnosis(
        type(model).__name__,
        cost,
        cost_model(np.ones_like(full)),
        groups,
        traced.skipped,
        [size.name for size in traced.sizes],
        uncounted(model),
        trial,
    )


def _facts(model: nn.Module, group: Group, params: float, macs: float) -> GroupFacts:
    out = [(m.layer, model.get_submodule(m.layer)) for m in group.side("out")]
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


def _some(names: list[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more
