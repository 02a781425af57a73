"""Stage 2, one step: trace, remove layers, score, plan, apply, verify, recalibrate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored, Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget, require_budget
from pruning.planning.cost import Cost, CostModel
from pruning.planning.latency import LatencyFound, plan_latency
from pruning.planning.options import PlanOptions
from pruning.planning.scores import Score, Scores, score_channels
from pruning.planning.search import DEFAULT_OPTIONS, plan_within
from pruning.planning.width_sweep import Batch
from pruning.surgery.apply import apply, channel_constants, may_leave_constants
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.layer_removal import removable, without_layer
from pruning.surgery.refit import LayerFit, refit
from pruning.surgery.verify import verify, with_random_weights
from pruning.tracing.trace import require_groups, trace
from pruning.training.batches import to_device
from pruning.training.losses import Loss, cross_entropy
from pruning.utils import distributed
from pruning.utils.modules import buffers_unchanged, device_of
from pruning.utils.tree import Inputs, fresh


@dataclass(frozen=True)
class Step:
    """The result of one pruning step.

    Attributes:
        model: the pruned model.
        plan: the whole layers that were removed, and the channels that each group keeps.
        trace: trace that the plan refers to: of the model before pruning, without the removed layers.
        asked: the budget, as counts or as a `LatencyBudget`.
        before: cost before pruning, BatchNorm folded.
        after: cost after pruning, BatchNorm folded.
        difference: largest relative difference of the outputs found by `verify`; NaN if not checked.
        latency: the measured times under a `LatencyBudget`, else None.
        refits: what the refit did to each layer (see `pruning.surgery.refit.refit`).
    """

    model: nn.Module
    plan: Plan
    trace: Trace
    asked: Budget | LatencyBudget
    before: Cost
    after: Cost
    difference: float
    latency: LatencyFound | None = None
    refits: tuple[LayerFit, ...] = ()


@dataclass(frozen=True)
class StepSettings:
    """Settings that all pruning steps of a run share; see `prune` for the fields."""

    score: Score = "taylor"
    calibration: Sequence[Batch] = ()
    loss: Loss = cross_entropy
    ignored: tuple[Ignored, ...] = ()
    options: PlanOptions = DEFAULT_OPTIONS
    check: bool = True
    refit: bool = False


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget,
    *,
    score: Score | None = None,
    calibration: Iterable[Batch] = (),
    loss: Loss = cross_entropy,
    ignored: Iterable[Ignored] = (),
    remove: Iterable[str] = (),
    towards: Budget | None = None,
    check: bool = True,
    refit: bool = False,
    ranking: str = "global",
    per_cost: bool = True,
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] | None = None,
    multiple: int = 1,
    widths: Mapping[str, int | str] | None = None,
    dense: nn.Module | None = None,
) -> Step:
    """Remove channels until a model meets a budget; the given model is not changed.

    Args:
        model: the model to prune.
        example_inputs: inputs to trace and verify the model with, batch dimension first.
        budget: limits on the cost of the result; percentages refer to this model.
        score: importance of a channel, by name or as a function; by default see `default_score`.
        calibration: batches (inputs, targets). They serve to score channels, to recalibrate BatchNorm,
            and to measure the mean of each removed channel, which is folded into the layers that
            consume it. Without them, only channels that are constant on the example inputs are folded.
        loss: loss of the calibration batches, for the score `taylor`.
        ignored: layers that keep their channels: name patterns, types or instances.
        remove: names of whole layers to remove first (see `removable`).
        towards: budget of the last of several steps, as counts. The step then keeps every channel
            that a plan for this budget keeps; otherwise it might remove channels to meet one limit
            that the final budget has room for.
        check: compare the outputs with those that the plan implies (see `verify`).
        refit: afterwards fit each layer that lost inputs to its outputs in the given model, by least
            squares on the calibration inputs (see `pruning.surgery.refit.refit`), instead of
            recalibrating BatchNorm. Targets may be None.
        ranking, per_cost, floor, most, multiple, widths: see `PlanOptions`; `most` is 0.9 with `refit`.
        dense: the network whose time a `LatencyBudget` is relative to; by default the model.

    Raises:
        PruningError: if the model cannot be traced or has no prunable group, if the budget cannot be
            met, if an option is invalid, or if the outputs are not equivalent.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, net[0].weight.new_zeros(2, 3), Budget(channels="50%"), score="l2").plan.widths
    {'0': 4}
    """
    most = default_most(refit) if most is None else most
    options = PlanOptions(ranking, per_cost, floor, most, multiple, widths)
    batches = list(calibration)
    score = score or default_score(batches, refit)
    settings = StepSettings(score, batches, loss, tuple(ignored), options, check, refit)
    return prune_step(
        model, example_inputs, budget, settings, remove=tuple(remove), towards=towards, dense=dense
    )


def default_score(calibration: Sequence[Batch], refit: bool) -> str:
    """Return the score that suits calibration batches, with a refit or without.

    It is `reconstruction` with a refit, `fisher` if all targets are None, and `taylor` otherwise.

    >>> default_score([([], None)], refit=False)
    'fisher'
    """
    if refit:
        return "reconstruction"
    return "fisher" if calibration and all(targets is None for _, targets in calibration) else "taylor"


def default_most(refit: bool) -> float:
    """Return the largest share of a group that a step drops by default.

    With a refit a tenth is kept, because no training wins back a group that has almost gone.
    """
    return 0.9 if refit else 1.0


@buffers_unchanged
def prune_step(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget,
    settings: StepSettings,
    *,
    remove: tuple[str, ...] = (),
    towards: Budget | None = None,
    dense: nn.Module | None = None,
) -> Step:
    """Prune as `prune` does, with settings that all steps of a run share.

    The order is: trace, remove whole layers, score, plan, fold constants, apply, verify, recalibrate or
    refit.
    """
    require_budget(budget)
    if settings.refit and not settings.calibration:
        raise PruningError("refit=True needs calibration batches, and there are none; give a few")
    if dense is not None and isinstance(budget, Budget):
        raise PruningError("dense: only a LatencyBudget is relative to another network; leave dense out")
    traced = trace(model, example_inputs, settings.ignored, compare=settings.check)
    cost_model = CostModel(model, traced)
    before = cost_model(cost_model.full)
    asked = budget if isinstance(budget, LatencyBudget) else budget.resolve(before)
    device = device_of(model)
    batches = [to_device(batch, device)[0] for batch in settings.calibration]

    if remove:
        model, traced = _without_layers(model, traced, example_inputs, remove, batches, settings)
        cost_model = CostModel(model, traced)
    is_met = remove and isinstance(asked, Budget) and not asked.excess(cost_model(cost_model.full))
    if not is_met:
        require_groups(model, traced)

    scores = score_channels(model, traced, settings.score, settings.calibration, settings.loss)
    latency: LatencyFound | None = None
    if isinstance(asked, LatencyBudget):
        plan, latency = plan_latency(
            model, example_inputs, traced, cost_model, scores, asked, settings.options, dense=dense
        )
    else:
        plan = _plan(asked, towards, traced, cost_model, scores, settings.options)
    plan = Plan.from_json(distributed.broadcast(replace(plan, removed=remove).to_json()))

    constants = _constants(model, traced, plan, example_inputs, batches)
    small = apply(model, traced, plan, constants)
    difference = float("nan")
    if settings.check:
        difference = _verified(model, small, traced, plan, example_inputs, constants)
    refits: tuple[LayerFit, ...] = ()
    if settings.refit:
        refits = refit(small, model, traced, plan, batches)
    else:
        recalibrate(small, map(fresh, batches))
    distributed.broadcast_weights(small)
    return Step(small, plan, traced, asked, before, cost_model(plan.widths), difference, latency, refits)


def _without_layers(
    model: nn.Module,
    traced: Trace,
    example_inputs: Inputs,
    names: tuple[str, ...],
    batches: Sequence[Inputs],
    settings: StepSettings,
) -> tuple[nn.Module, Trace]:
    """Return the model without some whole layers, BatchNorm recalibrated, and its trace."""
    for name in names:
        candidates = removable(model, traced, example_inputs)
        if name not in candidates:
            raise PruningError(
                f"layer {name!r} cannot be removed from {type(model).__name__}; removable layers: "
                f"{', '.join(candidates) or 'none'}"
            )
        model = without_layer(model, traced, candidates[name], batches)
        traced = trace(model, example_inputs, settings.ignored, compare=settings.check)
    recalibrate(model, map(fresh, batches))
    return model, traced


def _plan(
    asked: Budget,
    towards: Budget | None,
    traced: Trace,
    cost_model: CostModel,
    scores: Scores,
    options: PlanOptions,
) -> Plan:
    """Return a plan for a budget of counts that keeps what a plan for the budget `towards` keeps."""
    if towards is not None:
        last = plan_within(towards, traced, cost_model, scores, replace(options, most=1.0))
        options = replace(options, floor=last.widths)
    return plan_within(asked, traced, cost_model, scores, options)


def _constants(
    model: nn.Module, traced: Trace, plan: Plan, example_inputs: Inputs, batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """Return the constants that replace the removed channels, by the layer that consumes them."""
    if batches:
        return channel_constants(model, traced, batches)
    if may_leave_constants(model, traced, plan):
        return channel_constants(model, traced, [example_inputs], exact_only=True)
    return {}


def _verified(
    model: nn.Module,
    small: nn.Module,
    traced: Trace,
    plan: Plan,
    example_inputs: Inputs,
    constants: Mapping[str, Tensor],
) -> float:
    """Verify the small model and return the largest relative difference of the outputs.

    If the outputs are identical, verify with random weights too: the outputs may not depend on the
    removed channels at all, for example in a residual branch that is scaled by 0.
    """
    difference = verify(model, small, traced, plan, example_inputs, constants)
    if difference == 0:
        randomized = with_random_weights(model, example_inputs)
        difference = verify(randomized, apply(randomized, traced, plan), traced, plan, example_inputs)
    return difference
