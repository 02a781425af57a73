"""Leave out groups with which the check of a pruned model fails: code may use a width as a number."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from torch import nn

from pruning.graph.groups import Positions, ProductUse, Trace
from pruning.graph.plan import Plan
from pruning.surgery.apply import apply
from pruning.surgery.verify import compare_with_masked
from pruning.tracing.bisection import faulty_groups, structure_of
from pruning.tracing.operators import registered_operators
from pruning.utils.tree import Inputs


def groups_at_fault(model: nn.Module, trace: Trace, plan: Plan, inputs: Inputs) -> dict[str, str]:
    """Return the groups whose surgery alone is not equivalent to the plan, with the reason to keep them.

    Groups are narrowed together, and by bisection where the outputs differ.

    Args:
        model: the traced model; it is not changed.
        plan: the channels that each group keeps.
        inputs: example inputs.
    """
    narrowed = [name for name, kept in plan.keep.items() if len(kept) < trace.groups[name].channels]

    def problem(some: list[str]) -> str:
        part = Plan({name: plan.keep[name] for name in some})
        return compare_with_masked(model, apply(model, trace, part), trace, part, inputs)[0]

    structures = {name: structure_of(model, trace, trace.groups[name]) for name in narrowed}
    cause = "its code may use the width as a number. Use a constant in its place to let it be pruned"
    if registered := registered_operators():
        cause = (
            f"the rule that was registered for {' or '.join(registered)} may be wrong (each position of the "
            f"output needs the label of the channel that it is computed from), or {cause}"
        )
    return {
        name: f"with fewer channels, the model does not compute what the masked one does ({why}): {cause}"
        for name, why in faulty_groups(problem, narrowed, structures).items()
    }


def without_groups(trace: Trace, reasons: dict[str, str]) -> Trace:
    """Return a trace without some groups, whose layers are skipped with the reason.

    >>> import torch
    >>> from pruning.tracing.trace import trace
    >>> traced = trace(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.zeros(1, 2))
    >>> without_groups(traced, {"0": "as an example"}).skipped["0"]
    'as an example'
    """
    left = {name: group for name, group in trace.groups.items() if name not in reasons}
    skipped = {
        member.layer: why for name, why in reasons.items() for member in trace.groups[name].side("out")
    }
    products = tuple(
        ProductUse(use.macs, *(_owned_by(left, positions) for positions in (use.rows, use.columns)))
        for use in trace.products
    )
    return replace(trace, groups=left, skipped=trace.skipped | skipped, products=products)


def _owned_by(groups: Container[str], positions: Positions) -> Positions:
    """Return positions without the owners that are not among some groups."""
    return replace(positions, owners={g: owned for g, owned in positions.owners.items() if g in groups})
