"""Stage 2, one step: trace, remove layers, score, plan, apply, verify, recalibrate."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from pruning.errors import GroupsLeftOut, PruningError
from pruning.graph.computed import refresh_computed
from pruning.graph.groups import ByGroup, Ignored, Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget, require_budget
from pruning.planning.cost import Cost, CostModel
from pruning.planning.latency import LatencyFound
from pruning.planning.module_keys import with_group_names
from pruning.planning.options import MOST, PlanOptions
from pruning.planning.scores import Score, Scores, score_channels
from pruning.planning.search import DEFAULT_OPTIONS
from pruning.planning.width_sweep import Batch
from pruning.stages.checked_cut import Task, narrow_within
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.layer_removal import removable, without_layer
from pruning.surgery.refit import LayerFit, refit
from pruning.tracing.trace import require_groups, trace
from pruning.training.batches import like_examples
from pruning.training.losses import Loss, cross_entropy
from pruning.utils import distributed
from pruning.utils.entries import Also
from pruning.utils.form import form_of
from pruning.utils.modules import buffers_unchanged, device_of
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs, fresh

#: How many traces the steps of a run keep.
KEPT_TRACES = 4


@dataclass(frozen=True)
class Step:
    """The result of one pruning step.

    Attributes:
        model: the pruned model.
        plan: the whole layers that were removed, and the channels that each group keeps.
        trace: trace that the plan refers to: of the model before pruning, without the removed layers.
        asked: the budget, as counts or as a `LatencyBudget`; or the plan that was given.
        before: cost before pruning, BatchNorm folded.
        after: cost after pruning, BatchNorm folded.
        difference: largest relative difference of the outputs found by `verify`; NaN if not checked.
        latency: the measured times under a `LatencyBudget`, else None.
        refits: what the refit did to each layer (see `pruning.surgery.refit.refit`).
        left_out: groups that keep all channels because the check failed with them, with the reason.
    """

    model: nn.Module
    plan: Plan
    trace: Trace
    asked: Budget | LatencyBudget | Plan
    before: Cost
    after: Cost
    difference: float
    latency: LatencyFound | None = None
    refits: tuple[LayerFit, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def stale(self) -> list[str]:
        """Attributes that equaled a width which changed, and that code which was not traced may read."""
        widths = self.trace.widths
        narrowed = {name for name, width in self.plan.widths.items() if width < widths[name]}
        return [str(held) for held in self.trace.stale if held.groups & narrowed]

    @property
    def thin(self) -> dict[str, str]:
        """The groups that keep less than a tenth of their channels, and how many: `3 of 64`."""
        before = self.trace.widths
        return {
            name: f"{width} of {before[name]}"
            for name, width in self.plan.widths.items()
            if 10 * width < before[name]
        }


@dataclass(frozen=True)
class StepSettings:
    """Settings that all pruning steps of a run share; see `prune` for the fields.

    `traces` holds the latest traces.
    """

    score: Score = "taylor"
    calibration: Sequence[Batch] = ()
    loss: Loss = cross_entropy
    ignored: tuple[Ignored, ...] = ()
    options: PlanOptions = DEFAULT_OPTIONS
    check: bool = True
    refit: bool = False
    outputs: Outputs = None
    also: tuple[Also, ...] = ()
    traces: dict[Hashable, Trace] = field(default_factory=dict, repr=False, compare=False)

    def traced(self, model: nn.Module, example_inputs: Inputs) -> Trace:
        """Trace a model with these settings, once for all models of the same layers and sizes.

        Training and `equalize` change values alone, and a trace depends on none.
        """
        key = (self.ignored, self.check, form_of(model))
        known = self.traces.pop(key, None)
        if known is None or known.inputs is not example_inputs:
            known = trace(
                model,
                example_inputs,
                self.ignored,
                compare=self.check,
                outputs=self.outputs,
                also=self.also,
            )
        else:
            refresh_computed(model)
        self.traces[key] = known  # the latest is the last
        for outdated in list(self.traces)[:-KEPT_TRACES]:
            del self.traces[outdated]
        return known


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget | Plan,
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
    floor: int | ByGroup[int] | None = None,
    most: float | ByGroup[float] = MOST,
    multiple: int = 1,
    widths: ByGroup[int | str] | None = None,
    alike: Sequence[str] = (),
    dense: nn.Module | None = None,
    outputs: Outputs = None,
    also: Iterable[Also] = (),
) -> Step:
    """Remove channels until a model meets a budget; the given model is not changed.

    Scores: `taylor` (Molchanov et al., arXiv 1906.10771), `l1` and `l2` (LAMP, arXiv 2010.07611), `fisher`
    (Martens, arXiv 1412.1193) and `reconstruction` (Frantar et al., arXiv 2208.11580).

    Args:
        model: the model to prune. example_inputs: inputs to trace and verify it with, batch first.
        budget: limits on the cost of the result; percentages refer to this model. Or the `Plan` to apply.
        score: importance of a channel, by name or as a function (see `score_channels`). By default it is
            `reconstruction` with `refit`, `fisher` if all targets are None, and `taylor` otherwise.
        calibration: batches (inputs, targets), to score channels, to recalibrate BatchNorm, and to measure
            the means of removed channels, which are folded into the layers that consume them.
        loss: loss of the calibration batches, for the score `taylor`.
        ignored: layers that keep their channels: name patterns, types or instances.
        remove: names of whole layers to remove first (see `removable`).
        towards: budget of the last of several steps, as counts; channels that its plan keeps are kept.
        check: compare the outputs with those that the plan implies (see `verify`).
        refit: afterwards fit each layer that lost inputs to its outputs in the given model, by least
            squares on the calibration inputs (see `pruning.surgery.refit.refit`). Targets may be None.
        ranking, per_cost, floor, most, multiple, widths, alike: see `PlanOptions`; modules may be keys, in
            place of their groups. By default at most nine tenths of each group are dropped.
        dense: network whose time a `LatencyBudget` is relative to (the model). outputs, also: as in `trace`.

    Raises:
        PruningError: if the model has no prunable group, the budget cannot be met, or an option is invalid.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, net[0].weight.new_zeros(2, 3), Budget(channels="50%"), score="l2").plan.widths
    {'0': 4}
    """
    batches, layers = list(calibration), tuple(remove)
    score = default_score(batches, refit) if score is None else score
    options = PlanOptions(ranking, per_cost, floor, most, multiple, widths, alike)
    settings = StepSettings(score, batches, loss, tuple(ignored), options, check, refit, outputs, tuple(also))
    step = prune_step(model, example_inputs, budget, settings, remove=layers, towards=towards, dense=dense)
    return _told(step)


def _told(step: Step) -> Step:
    """Warn of groups that keep all channels because the check failed with them."""
    if step.left_out:
        name, why = next(iter(step.left_out.items()))
        more = f" and {len(step.left_out) - 1} more" if len(step.left_out) > 1 else ""
        text = f"group {name!r}{more} keeps all channels, because the check failed with it: {why} (left_out)"
        warnings.warn(text, GroupsLeftOut, stacklevel=3)
    return step


def default_score(calibration: Sequence[Batch], refit: bool) -> str:
    """Return the name of the score that suits calibration batches, and a refit or none.

    >>> default_score([([], None)], refit=False)
    'fisher'
    """
    if refit:
        return "reconstruction"
    return "fisher" if calibration and all(targets is None for _, targets in calibration) else "taylor"


@buffers_unchanged
def prune_step(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget | Plan,
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
    if isinstance(budget, Plan):
        remove = _layers_of(budget, remove, towards)
    else:
        require_budget(budget)
    if settings.refit and not settings.calibration:
        raise PruningError("refit=True needs calibration batches, and there are none; give a few")
    if dense is not None and not isinstance(budget, LatencyBudget):
        raise PruningError("dense: only a LatencyBudget is relative to another network; leave dense out")
    traced = settings.traced(model, example_inputs)
    cost_model = CostModel(model, traced)
    before = cost_model(cost_model.full)
    asked = budget.resolve(before) if isinstance(budget, Budget) else budget
    calibration = like_examples(settings.calibration, example_inputs, device_of(model))
    batches = [inputs for inputs, _ in calibration]

    if remove:
        model, traced = _without_layers(model, traced, example_inputs, remove, batches, settings)
        cost_model = CostModel(model, traced)
    is_met = remove and isinstance(asked, Budget) and not asked.excess(cost_model(cost_model.full))
    if not is_met and asked != Plan({}, remove):
        require_groups(model, traced)

    scores: Scores = {}
    if not isinstance(asked, Plan):
        scores = score_channels(model, traced, settings.score, calibration, settings.loss)
    task = Task(
        model,
        example_inputs,
        batches,
        scores,
        asked,
        towards,
        dense,
        remove,
        with_group_names(settings.options, model, traced),
        settings.check,
    )
    return cut(task, traced, cost_model, before, refits=settings.refit)


def cut(task: Task, traced: Trace, cost_model: CostModel, before: Cost, *, refits: bool) -> Step:
    """Plan, fold constants, apply and verify; then refit, or recalibrate BatchNorm.

    Args:
        task: what to do. traced, cost_model: of its model. before: cost before layers were removed.
        refits: whether to refit.
    """
    done = narrow_within(task, traced, cost_model)
    fits: tuple[LayerFit, ...] = ()
    if refits:
        fits = refit(done.model, task.model, done.trace, done.plan, task.batches)
    else:
        recalibrate(done.model, map(fresh, task.batches))
    distributed.broadcast_weights(done.model)
    return Step(
        done.model,
        done.plan,
        done.trace,
        task.asked,
        before,
        done.cost_model(done.plan.widths),
        done.difference,
        done.latency,
        fits,
        done.left_out,
    )


def _layers_of(plan: Plan, remove: tuple[str, ...], towards: Budget | None) -> tuple[str, ...]:
    """Return the layers that a plan removes; check that the caller names no others."""
    if towards is not None:
        raise PruningError("towards: a plan already names the channels to keep; leave towards out")
    if remove not in ((), plan.removed):
        raise PruningError(
            f"remove={list(remove)}: the plan removes {list(plan.removed) or 'no layer'}; leave remove out"
        )
    return plan.removed


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
        traced = settings.traced(model, example_inputs)
    recalibrate(model, map(fresh, batches))
    return model, traced
