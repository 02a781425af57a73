"""Cut channels within a budget and check the cut; groups with which the check fails are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.latency import LatencyFound, plan_latency
from pruning.planning.options import PlanOptions
from pruning.planning.scores import Scores
from pruning.planning.search import plan_within
from pruning.surgery.apply import apply, channel_constants, may_leave_constants
from pruning.surgery.verify import compare_with_masked, with_random_weights
from pruning.tracing.left_out import groups_at_fault, without_groups
from pruning.tracing.trace import require_groups
from pruning.utils import distributed
from pruning.utils.tree import Inputs


class Task(NamedTuple):
    """What a step has to do with a traced and scored model; see `prune` and `PlanOptions` for the fields.

    `constants` are those of the batches, where several steps share them (see `channel_constants`).
    """

    model: nn.Module
    example_inputs: Inputs
    batches: Sequence[Inputs]
    scores: Scores
    asked: Budget | LatencyBudget | Plan
    towards: Budget | None
    dense: nn.Module | None
    remove: tuple[str, ...]
    options: PlanOptions
    check: bool
    constants: dict[str, Tensor] | None = None


class Narrowed(NamedTuple):
    """A model that was pruned and checked, and the groups that were left out for that; as in `Step`."""

    model: nn.Module
    plan: Plan
    trace: Trace
    cost_model: CostModel
    latency: LatencyFound | None
    difference: float
    left_out: dict[str, str]


def narrow_within(task: Task, traced: Trace, cost_model: CostModel) -> Narrowed:
    """Plan, apply and check; leave out the groups with which the check fails, and plan again."""
    model, inputs, left_out = task.model, task.example_inputs, dict[str, str]()
    while True:
        plan, latency = _planned(task, traced, cost_model, left_out)
        plan = Plan.from_json(distributed.broadcast(replace(plan, removed=task.remove).to_json()))
        constants = task.constants
        if constants is None:
            constants = _constants(model, traced, plan, inputs, task.batches)
        small = apply(model, traced, plan, constants)
        checked = _Check("", float("nan"), model)
        if task.check:
            checked = _checked(model, small, traced, plan, inputs, constants)
        if not checked.problem:
            return Narrowed(small, plan, traced, cost_model, latency, checked.difference, left_out)
        at_fault = groups_at_fault(checked.model, traced, plan, inputs)
        if not at_fault:
            raise PruningError(
                f"surgery is not equivalent to the plan: {checked.problem}; nothing was changed. Ignore the "
                "layers whose widths the code depends on, or let this code take a constant, not the width "
                '(see "Read a refusal" in the documentation)'
            )
        left_out |= at_fault
        traced = without_groups(traced, at_fault)
        require_groups(model, traced)
        cost_model = CostModel(model, traced)


def _planned(
    task: Task, traced: Trace, cost_model: CostModel, left_out: Mapping[str, str]
) -> tuple[Plan, LatencyFound | None]:
    """Return the plan for a budget, and the measured times under a latency budget.

    Of a given plan, groups that were left out keep all channels.
    """
    if isinstance(task.asked, Plan):
        keep = task.asked.keep
        return Plan({name: channels for name, channels in keep.items() if name not in left_out}), None
    options = task.options
    if left_out and options.widths:
        kept = {name: width for name, width in options.widths.items() if name not in left_out}
        options = replace(options, widths=kept)
    try:
        if isinstance(task.asked, LatencyBudget):
            return plan_latency(
                task.model, task.example_inputs, traced, cost_model, task.scores, task.asked, options,
                dense=task.dense,
            )  # fmt: skip
        if task.towards is not None:  # keep what a plan for the last budget keeps
            last = plan_within(task.towards, traced, cost_model, task.scores, replace(options, most=1.0))
            options = replace(options, floor=last.widths)
        return plan_within(task.asked, traced, cost_model, task.scores, options), None
    except PruningError as error:
        if not left_out:
            raise
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise PruningError(f"{error}. Groups were left out ({reasons})") from error


def _constants(
    model: nn.Module, traced: Trace, plan: Plan, example_inputs: Inputs, batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """Return the constants that replace the removed channels, by the layer that consumes them."""
    if batches:
        return channel_constants(model, traced, batches)
    if may_leave_constants(model, traced, plan):
        return channel_constants(model, traced, [example_inputs], exact_only=True)
    return {}


class _Check(NamedTuple):
    """The result of a check: a description of the difference if there is one, its size, and the model."""

    problem: str
    difference: float
    model: nn.Module


def _checked(
    model: nn.Module,
    small: nn.Module,
    traced: Trace,
    plan: Plan,
    example_inputs: Inputs,
    constants: Mapping[str, Tensor],
) -> _Check:
    """Compare the small model with the masked one.

    If the outputs are identical, compare with random weights too: the outputs may not depend on the
    removed channels at all, for example in a residual branch that is scaled by 0.
    """
    problem, difference = compare_with_masked(model, small, traced, plan, example_inputs, constants)
    if not problem and difference == 0:
        model = with_random_weights(model, example_inputs)
        small = apply(model, traced, plan)
        problem, difference = compare_with_masked(model, small, traced, plan, example_inputs)
    return _Check(problem, difference, model)
