"""Stage 1: train with a penalty that drives the scales or weights of superfluous channels to 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from pruning.graph.groups import Ignored, Trace
from pruning.planning.budget import Budget
from pruning.planning.cost import CostModel
from pruning.stages.paced_pull import PacedPull
from pruning.stages.scale_pull import ScalePull
from pruning.tracing.trace import trace
from pruning.training.batches import Batch, BatchSource, length
from pruning.training.config import TrainConfig
from pruning.training.loop import Epoch, fit
from pruning.training.losses import Loss, Validate, cross_entropy
from pruning.training.state import TrainingState
from pruning.utils.entries import Also
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs


def sparsify(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    example_inputs: Inputs,
    *,
    strength: float | None = None,
    budget: Budget | None = None,
    pace: int | None = None,
    ignored: Iterable[Ignored] = (),
    outputs: Outputs = None,
    also: Iterable[Also] = (),
    loss: Loss = cross_entropy,
    validate: Validate | None = None,
    keep_best: bool = False,
    keep_start: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    statistics: Sequence[Batch] = (),
    label: str = "",
    resume: TrainingState | None = None,
    traced: Trace | None = None,
) -> nn.Module:
    """Train a model in place so that the scales of superfluous channels, or their weights, become 0.

    Args:
        example_inputs, ignored, outputs, also: see `trace`, whose result may be given as `traced`.
        strength: λ of `ScalePull`; None finds it in every epoch, such that stage 1 reaches the geometric
            mean of dense cost and budget. Scales of ignored layers are not shrunk.
        budget: limits on the cost of the result; percentages refer to this model.
        pace: of a trained model, the fewest channels of a group: `PacedPull` replaces `ScalePull`.
        batches, config, loss, validate, keep_best, keep_start, on_epoch, statistics, label, resume: as `fit`.

    Returns the model in eval mode. Raises `PruningError` as `ScalePull` and `fit` do.

    >>> from torch import arange, randn
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> batches = [(randn(8, 3), arange(8) % 2)]
    >>> net = sparsify(net, batches, TrainConfig(1), batches[0][0], strength=1000.0)
    >>> int((net[1].weight == 0).sum())
    3
    """
    traced = traced or trace(model, example_inputs, ignored, outputs=outputs, also=also)
    steps = config.steps(length(batches) or 0)
    pull = _pull(budget, model, traced, strength, config.epochs * steps, pace)
    return fit(
        model,
        batches,
        config,
        loss=loss,
        validate=validate,
        keep_best=keep_best,
        keep_start=keep_start,
        before_epoch=partial(_refresh, pull, config, steps),
        after_step=partial(_step, pull),
        on_epoch=on_epoch,
        extra=pull,
        statistics=statistics,
        label=label,
        resume=resume,
    )


def _refresh(pull: ScalePull | PacedPull, config: TrainConfig, steps: int, epoch: int) -> None:
    """Let a pull that has a strength find it for the learning rates to come."""
    if isinstance(pull, ScalePull):
        pull.refresh(_rates_to_come(config, steps, epoch))


def _step(pull: ScalePull | PacedPull, lr: float) -> None:
    """Shrink the scales after an optimizer step."""
    if isinstance(pull, ScalePull):
        pull.step(lr)
    else:
        pull.after_step()


def _pull(
    budget: Budget | None,
    model: nn.Module,
    traced: Trace,
    strength: float | None,
    steps: int,
    pace: int | None,
) -> ScalePull | PacedPull:
    """Return the pull of stage 1: paced, if that is asked and there is a budget and a step."""
    if pace is not None and budget is not None and steps:
        return _paced(budget, model, traced, steps, pace)
    return _pull_towards(budget, model, traced, strength)


def _paced(budget: Budget, model: nn.Module, traced: Trace, steps: int, floor: int) -> PacedPull:
    """Return the pull of stage 1 of a trained network; its budget is half of the way, in ratios."""
    cost_model = CostModel(model, traced)
    half = _half_way(budget, cost_model)
    return PacedPull(model, traced, half, steps, floor=floor, cost_model=cost_model)


def _pull_towards(
    budget: Budget | None, model: nn.Module, traced: Trace, strength: float | None
) -> ScalePull:
    """Return the penalty of stage 1; if it has to find λ, its budget is half of the way, in ratios."""
    cost_model = CostModel(model, traced)
    if budget is not None:
        budget = budget.resolve(cost_model(cost_model.full))
        if strength is None:
            budget = _half_way(budget, cost_model)
    return ScalePull(model, traced, strength, budget, cost_model)


def _half_way(budget: Budget, cost_model: CostModel) -> Budget:
    """Return the budget half of the way from the dense network to a budget, in ratios."""
    dense = cost_model(cost_model.full)
    return budget.resolve(dense).share(dense, 1, 2)


def _rates_to_come(config: TrainConfig, steps: int, epoch: int) -> float:
    """Return the sum of the learning rates from this epoch on, at least 1/20 of the sum of all epochs.

    Without this lower bound λ would grow without limit in the last steps.
    """
    total = config.epochs * steps
    way = sum(config.rate(step / total) for step in range((epoch - 1) * steps, total))
    whole = sum(config.rate(step / total) for step in range(total))
    return config.peak * max(way, whole / 20)
