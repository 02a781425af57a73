"""Stage 2: trace, score, plan, apply, check. One step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruning import importance
from pruning.budget import Budget
from pruning.cost import Cost, CostModel
from pruning.errors import PruningError
from pruning.graph import Ignored, Inputs, Trace, trace
from pruning.importance import Groups, Scores
from pruning.plan import Plan, plan_within
from pruning.surgery import apply, channel_constants, verify
from pruning.training import Loss, cross_entropy, to_device

#: A score by name, or a function (model, groups) -> one tensor (channels,) per group.
Score = str | Callable[[nn.Module, Groups], Scores]


@dataclass(frozen=True)
class Step:
    """What one pruning step did.

    Attributes:
        model: the smaller model. plan: what each group kept. trace: of the model before.
        asked: the budget, in counts. before, after: the costs, BatchNorm folded.
        difference: largest relative difference found by the equivalence check.
    """

    model: nn.Module
    plan: Plan
    trace: Trace
    asked: Budget
    before: Cost
    after: Cost
    difference: float


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    *,
    score: Score = "taylor",
    calibration: Sequence[tuple[Any, Any]] = (),
    loss: Loss = cross_entropy,
    ignored: Iterable[Ignored] = (),
    **limits: Any,
) -> Step:
    """Remove channels until the budget is met; the given model is left as it is.

    Args:
        example_inputs: to trace and to check with; a batch dimension first.
        budget: limits on the result; percentages are of this model.
        score: importance of a channel, by name or as a function.
        calibration: (inputs, targets) batches for `taylor`, and for the mean of every
            channel that goes: it is folded into the layer behind it. Without them only
            what is constant on the example inputs is folded.
        ignored: layers whose channels all stay, by name pattern, type or instance.
        limits: `per_cost`, `floor`, `most` and `multiple` of `plan_within`.

    Raises `PruningError` when the model cannot be traced, has no prunable group, the budget
    cannot be reached, or the check fails.
    """
    traced = trace(model, example_inputs, ignored)
    if not traced.groups:
        reasons = "; ".join(
            f"{layer or type(model).__name__}: {why}" for layer, why in traced.skipped.items()
        )
        raise PruningError(
            f"{type(model).__name__} has no prunable group ({reasons or 'no layer was found'})"
        )
    cost_model = CostModel(model, traced)
    before = cost_model(cost_model.full)
    asked = budget.resolve(before)

    scores = _scores(model, traced, score, calibration, loss)
    plan = plan_within(asked, traced, cost_model, scores, **limits)

    device = next(model.parameters()).device
    if calibration:
        batches = (to_device(batch, device)[0] for batch in calibration)
        constants = channel_constants(model, traced, batches)
    else:
        constants = channel_constants(model, traced, [example_inputs], exact_only=True)
    small = apply(model, traced, plan, constants)
    difference = verify(model, small, traced, plan, example_inputs, constants)
    return Step(small, plan, traced, asked, before, cost_model(plan.widths), difference)


def _scores(
    model: nn.Module, traced: Trace, score: Score, calibration: Sequence[tuple[Any, Any]], loss: Loss
) -> Scores:
    if callable(score):
        return score(model, traced.groups)
    if score == "taylor":
        return importance.taylor(model, traced.groups, calibration, loss)
    if score not in importance.BY_NAME:
        raise PruningError(f"score {score!r} is unknown; there are: {', '.join(importance.NAMES)}")
    with torch.no_grad():
        return importance.BY_NAME[score](model, traced.groups)
