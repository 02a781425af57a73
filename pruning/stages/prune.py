"""Stage 2: trace, score, plan, apply, check. One step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored, Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget, require_budget
from pruning.planning.cost import Cost, CostModel
from pruning.planning.latency import LatencyFound, plan_latency
from pruning.planning.scores import Score, score_channels
from pruning.planning.search import plan_within
from pruning.planning.sensitivity import sensitivity
from pruning.surgery.apply import apply, channel_constants, may_leave_constants
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.layer_removal import removable, without_layer
from pruning.surgery.verify import verify, with_random_weights
from pruning.tracing.trace import require_groups, trace
from pruning.training.batches import to_device
from pruning.training.losses import Loss, cross_entropy
from pruning.utils import distributed
from pruning.utils.modules import buffers_unchanged, device_of
from pruning.utils.tree import Inputs, fresh

#: Widths of each group that a plan by sensitivity tries.
SENSITIVITY_WIDTHS = 12


@dataclass(frozen=True)
class Step:
    """What one pruning step did.

    Attributes:
        model: the smaller model. plan: the whole layers that went, and what each group kept.
        trace: of the model before, without those layers.
        asked: the budget, in counts. before, after: the costs, BatchNorm folded.
        difference: largest relative difference found by the equivalence check.
        latency: what was measured, under a budget of latency.
    """

    model: nn.Module
    plan: Plan
    trace: Trace
    asked: Budget | LatencyBudget
    before: Cost
    after: Cost
    difference: float
    latency: LatencyFound | None = None


@buffers_unchanged
def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget,
    *,
    score: Score = "taylor",
    calibration: Iterable[tuple[Any, Any]] = (),
    loss: Loss = cross_entropy,
    ignored: Iterable[Ignored] = (),
    remove: Iterable[str] = (),
    towards: Budget | None = None,
    check: bool = True,
    **limits: Any,
) -> Step:
    """Remove channels until the budget is met; the given model is left as it is.

    Before that, whole layers go where `remove` names them; the running statistics of
    BatchNorm are taken anew afterwards, where there is calibration data.

    Args:
        example_inputs: to trace and to check with; a batch dimension first.
        budget: limits on the result; percentages are of this model. A `LatencyBudget` is met by
            measuring, at the batch size of the example inputs.
        score: importance of a channel, by name or as a function; `sensitivity` measures on the
            calibration data, of a classifier, what each group loses at several widths.
        calibration: (inputs, targets) batches for `taylor`, and for the mean of every
            channel that goes: it is folded into the layer behind it. Without them only
            what is constant on the example inputs is folded.
        ignored: layers whose channels all stay, by name pattern, type or instance.
        remove: names of whole layers to remove first (see `pruning.removable`).
        towards: the budget of the last of several steps, in counts: no channel goes now that a plan
            within it keeps. Of several limits a step may else meet one by channels that the others
            leave room for in the end.
        check: compare the outputs with those that the plan asks for, which takes two forward
            passes; without it `difference` is NaN.
        limits: `ranking`, `per_cost`, `floor`, `most`, `multiple` and `widths` of `plan_within`; of
            latency `floor`, `most` and `multiple`, and `dense`, what the time is compared with.

    Raises `PruningError` when the model cannot be traced, has no prunable group, the budget
    cannot be reached, or the check fails.
    """
    require_budget(budget)
    ignored, calibration = tuple(ignored), list(calibration)
    traced = trace(model, example_inputs, ignored, compare=check)
    cost_model = CostModel(model, traced)
    before = cost_model(cost_model.full)
    asked = budget if isinstance(budget, LatencyBudget) else budget.resolve(before)

    device = device_of(model)
    batches = [to_device(batch, device)[0] for batch in calibration]
    removed = []
    for name in remove:
        candidates = removable(model, traced, example_inputs)
        if name not in candidates:
            raise PruningError(
                f"layer {name!r} cannot be removed from {type(model).__name__}; those that can: "
                f"{', '.join(candidates) or 'none'}"
            )
        model = without_layer(model, traced, candidates[name], batches)
        traced = trace(model, example_inputs, ignored, compare=check)
        removed.append(name)
    if removed:
        recalibrate(model, map(fresh, batches))
        cost_model = CostModel(model, traced)

    enough = isinstance(asked, Budget) and removed and not asked.excess(cost_model(cost_model.full))
    if not enough:
        require_groups(model, traced)
    if score == "sensitivity":
        curves = sensitivity(
            model,
            example_inputs,
            calibration,
            calibration=calibration,
            score="taylor",
            widths=SENSITIVITY_WIDTHS,
            ignored=ignored,
        )
        score = curves.scores
    scores = score_channels(model, traced, score, calibration, loss)
    latency: LatencyFound | None = None
    if isinstance(asked, LatencyBudget):
        plan, latency = plan_latency(model, example_inputs, traced, scores, asked, **limits)
    else:
        if towards is not None:
            last = plan_within(towards, traced, cost_model, scores, **{**limits, "most": 1.0})
            limits["floor"] = last.widths
        plan = plan_within(asked, traced, cost_model, scores, **limits)
    plan = Plan.from_json(distributed.broadcast(replace(plan, removed=tuple(removed)).to_json()))

    if batches:
        constants = channel_constants(model, traced, batches)
    elif may_leave_constants(model, traced, plan):
        constants = channel_constants(model, traced, [example_inputs], exact_only=True)
    else:
        constants = {}
    small = apply(model, traced, plan, constants)
    difference = verify(model, small, traced, plan, example_inputs, constants) if check else float("nan")
    if difference == 0:  # the outputs may not depend on what was cut: ask random weights
        lively = with_random_weights(model, example_inputs)
        difference = verify(lively, apply(lively, traced, plan), traced, plan, example_inputs)
    recalibrate(small, map(fresh, batches))
    distributed.broadcast_weights(small)
    return Step(small, plan, traced, asked, before, cost_model(plan.widths), difference, latency)
