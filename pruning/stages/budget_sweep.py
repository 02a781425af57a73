"""The frontier of a model: how much it can be pruned, and what each budget loses before any training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.planning.budget import LABELS, LatencyBudget
from pruning.planning.judge import Metric
from pruning.planning.options import MOST, PlanOptions
from pruning.planning.scores import Score
from pruning.planning.width_sweep import Batch
from pruning.stages.frontier_folder import FrontierFolder
from pruning.stages.frontier_networks import Asked, FrontierNetworks
from pruning.stages.frontier_result import Frontier
from pruning.stages.prune import StepSettings, default_score
from pruning.training.losses import Loss, cross_entropy
from pruning.training.output_comparison import Comparison
from pruning.utils.entries import Also
from pruning.utils.modules import buffers_unchanged
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs
from pruning.utils.wrappers import unwrapped

#: Options of plans, by default: as those of `prune`.
_OPTIONS = PlanOptions(most=MOST)


def frontier(
    model: nn.Module,
    example_inputs: Inputs,
    validation: Iterable[Batch],
    *,
    limit: str = "macs",
    points: int = 12,
    budgets: Sequence[str | int] = (),
    score: Score | None = None,
    calibration: Iterable[Batch] = (),
    loss: Loss = cross_entropy,
    refit: bool = False,
    options: PlanOptions = _OPTIONS,
    ignored: Iterable[Ignored] = (),
    check: bool = True,
    timing: LatencyBudget | None = None,
    compare: Comparison = "auto",
    metric: Metric | None = None,
    outputs: Outputs = None,
    also: Iterable[Also] = (),
    folder: str | Path | None = None,
    label: str = "frontier",
) -> Frontier:
    """Prune a model to several budgets, and judge each network on validation inputs before any training.

    The model is traced and its channels are scored once. At each budget the network is the one that `prune`
    makes; `prune(model, example_inputs, point.plan, ...)` with the same calibration makes it again.

    Args:
        model: the model; it is not changed.
        example_inputs: inputs to trace and verify the model with.
        validation: batches (inputs, targets) to judge on: accuracy if the targets are classes of the
            outputs, otherwise agreement with the dense network, or the relative error of values.
        limit: what budgets limit: `params`, `macs`, `channels` or `latency`.
        points: number of budgets, evenly spaced from the least that can be reached to the dense cost.
        budgets: the budgets, in their place: `60%`, a count, or `0.5x` and `2ms` of latency.
        score, calibration, loss, refit, ignored, check, outputs, also: as in `prune`.
        options: options of the plans; by default at most nine tenths of each group are dropped.
        timing: where given, each network is timed beside the dense one as it says; its own limit is not
            used. Budgets of latency are measured so; the default is eager on one thread.
        compare: whether outputs are logits or values. metric: a metric of your own (see `Judge`).
        folder: where points are stored as they come; those of the same model and settings are kept.
        label: text before the progress bar.

    Raises:
        PruningError: if a budget is above the dense cost, there are fewer than two, there are no validation
            inputs, outputs are not finite, or the folder holds points of other settings.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = frontier(net, torch.zeros(1, 3), [(torch.randn(64, 3), None)], points=4, score="l2")
    >>> found.metric, [(point.budget, point.plan.widths["0"]) for point in found.points]
    ('agreement', [('78.2%', 6), ('56.3%', 4), ('34.4%', 2), ('12.5%', 1)])
    """
    batches, judged_on = list(calibration), list(validation)
    asked = Asked(limit, points, tuple(map(str, budgets)), timing, compare, metric)
    score = default_score(batches, refit) if score is None else score
    settings = StepSettings(score, batches, loss, tuple(ignored), options, check, refit, outputs, tuple(also))
    return _sweep(unwrapped(model), example_inputs, judged_on, settings, asked, folder, label)


@buffers_unchanged
def _sweep(
    model: nn.Module,
    example_inputs: Inputs,
    validation: Sequence[Batch],
    settings: StepSettings,
    asked: Asked,
    folder: str | Path | None,
    label: str,
) -> Frontier:
    """Trace, judge the dense network, score, and add the points that are missing, one by one."""
    if settings.refit and not settings.calibration:
        raise PruningError("refit=True needs calibration batches, and there are none; give a few")
    traced = settings.traced(model, example_inputs)
    networks = FrontierNetworks(model, example_inputs, traced, settings, asked)
    judge = networks.judge(validation)
    store = FrontierFolder(folder, networks.identity(validation))
    for point in store.points:
        networks.leave_out(point.left_out)
    networks.prepare(store)
    with networks.timed():
        result = networks.empty(judge)
        for point in store.points:
            result = result.with_point(point)
        known = {networks.key(point.budget) for point in store.points}
        todo = [budget for budget in networks.budgets() if networks.key(budget) not in known]
        done, total = len(known), len(known) + len(todo)
        with tqdm(total=total, initial=done, desc=label, disable=None, leave=False) as bar:
            for budget in todo:
                found = networks.point(budget, judge, result.points)
                if found is None:
                    result = replace(result, unreachable=(*result.unreachable, budget))
                else:
                    result = replace(result.with_point(found), least=networks.least())
                store.write(result.to_json())
                bar.update()
    if len(result.points) < 2:
        raise PruningError(
            f"fewer than two of the budgets can be reached: the least is {result.least:.1%} of the dense "
            f"network's {LABELS.get(asked.limit, asked.limit)}; give larger budgets"
        )
    return result
