"""Sensitivity analysis: the accuracy lost and the cost freed when one group alone is narrowed.

`width_sweep` measures, and `curves` defines the result. This file runs the analysis, stores it in a
file, and compares the predicted with the measured loss of a whole plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.cost import Cost, CostModel
from pruning.planning.curves import Reading, Sensitivity
from pruning.planning.layer_times import LatencyTable
from pruning.planning.scores import Score, score_channels
from pruning.planning.search import plan_within
from pruning.planning.width_sweep import (
    Batch,
    Evaluator,
    LabeledBatch,
    WidthSweep,
    calibrated_constants,
    channel_order,
    points_to_measure,
)
from pruning.surgery.apply import apply
from pruning.surgery.batchnorm import recalibrate
from pruning.tracing.trace import trace
from pruning.training.batches import to_device
from pruning.training.config import TrainConfig
from pruning.training.losses import cross_entropy
from pruning.utils.cluster import require_cluster
from pruning.utils.digests import add_state
from pruning.utils.files import replace_file
from pruning.utils.modules import device_of
from pruning.utils.tree import Inputs
from pruning.utils.wrappers import unwrapped


def sensitivity(
    model: nn.Module,
    example_inputs: Inputs,
    validation: Sequence[LabeledBatch],
    *,
    calibration: Sequence[Batch] = (),
    widths: int | None = None,
    score: Score = "l2",
    finetune: TrainConfig | None = None,
    ignored: Iterable[Ignored] = (),
    runtime: str | None = None,
    path: str | Path | None = None,
    label: str = "sensitivity",
    cluster: str | None = None,
) -> Sensitivity:
    """Narrow each group alone to several widths, and measure loss and accuracy.

    Args:
        model: a classifier with logits along dimension 1; it is not changed.
        example_inputs: inputs for `trace`. ignored: layers whose outputs are not pruned, as in `trace`.
        validation: batches (inputs, targets) on which to measure.
        calibration: batches for the score, the channel constants and the BatchNorm statistics.
        widths: number of widths per group, evenly spaced; None measures every width.
        score: determines the order in which channels of a group are removed, as in `prune`.
        finetune: if given, also train each small model on the calibration batches.
        runtime: if given, also time the layers in this runtime, for one example on one thread.
        path: a JSON file that is rewritten after every point; an interrupted analysis resumes from it.
        label: text before the progress bar.
        cluster: address of a Ray cluster that measures the groups, or `local` (see `in_order`).

    Raises:
        PruningError: if there is no group, no validation example of a class, or a file of another analysis.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> found = sensitivity(net, torch.zeros(1, 3), [(torch.randn(8, 3), torch.arange(8) % 2)])
    >>> [(point.group, point.width, point.params) for point in found.points]
    [('0', 3, 20), ('0', 2, 14), ('0', 1, 8)]
    """
    model = unwrapped(model)
    _require_settings(score, cluster)
    traced, device = trace(model, example_inputs, ignored), device_of(model)
    validation = [to_device(batch, device) for batch in validation]
    calibration = [to_device(batch, device) for batch in calibration]
    sweep = WidthSweep(model, traced, validation, calibration)
    order = channel_order(score_channels(model, traced, score, calibration, cross_entropy))
    settings: list[object] = [widths, str(score), finetune and asdict(finetune), sorted(traced.ignored)]
    file = _ResultFile(path, _fingerprint(model, settings, validation))
    result = file.resume(sweep.dense_result(order))
    points, done = points_to_measure(traced, widths), {(p.group, p.width) for p in result.points}
    todo = [point for point in points if point not in done]
    with tqdm(total=len(todo) + len(done), initial=len(done), desc=label, disable=None, leave=False) as bar:
        for point in sweep.measure(order, todo, finetune, cluster):
            result.points.append(point)
            file.write(result)
            bar.update()
    if runtime is not None and (todo or runtime != result.runtime):
        result = _with_times(result, sweep, LatencyBudget("1x", runtime, batch_size=1))
        file.write(result)
    return result


def _require_settings(score: object, cluster: str | None) -> None:
    if score == "sensitivity":
        raise PruningError("the channels of a group cannot be ordered by sensitivity; choose another score")
    require_cluster(cluster)


def _with_times(result: Sensitivity, sweep: WidthSweep, timing: LatencyBudget) -> Sensitivity:
    """Return the result with the time of every point, from one table of layer times."""
    full = sweep.trace.widths
    inputs = timing.batch_of(sweep.trace.inputs, sweep.trace.batch)
    table = LatencyTable(sweep.model, inputs, sweep.cost_model, timing, lowest=np.ones(len(full)))

    def milliseconds(widths: dict[str, int]) -> float:
        return float(table.milliseconds(np.array(list(widths.values()), dtype=np.float64)))

    points = [replace(p, milliseconds=milliseconds({**full, p.group: p.width})) for p in result.points]
    return replace(result, points=points, runtime=timing.runtime, dense_milliseconds=milliseconds(full))


@dataclass(frozen=True)
class Joint:
    """A plan for a budget, with its predicted and its measured loss.

    Attributes:
        predicted_loss: dense loss plus the increase of each group alone.
        measured: readings of the pruned model by stage (see `STAGES`).
    """

    plan: Plan
    cost: Cost
    predicted_loss: float
    measured: dict[str, Reading]


def joint(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    curves: Sensitivity,
    validation: Sequence[LabeledBatch],
    *,
    calibration: Sequence[Batch] = (),
    ignored: Iterable[Ignored] = (),
) -> Joint:
    """Apply the plan that the curves give for a budget, and compare its loss with the prediction.

    Args:
        curves: result of `sensitivity` for this model.
        model, example_inputs, validation, calibration, ignored: as in `sensitivity`.
        budget: as in `prune`.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> inputs, batches = torch.zeros(1, 3), [(torch.randn(8, 3), torch.arange(8) % 2)]
    >>> found = sensitivity(net, inputs, batches)
    >>> joint(net, inputs, Budget(channels=2), found, batches).plan.widths
    {'0': 2}
    """
    device = device_of(model)
    traced = trace(model, example_inputs, ignored)
    cost_model = CostModel(model, traced)
    target = budget.resolve(cost_model(cost_model.full))
    plan = plan_within(target, traced, cost_model, curves.scores(model, traced.groups))
    evaluator = Evaluator(model, [to_device(batch, device) for batch in validation])
    inputs = [to_device(batch, device)[0] for batch in calibration]
    small = apply(model, traced, plan, calibrated_constants(model, traced, inputs))
    measured = {"pruned": evaluator.read(small)}
    measured["recalibrated"] = evaluator.read(recalibrate(small, inputs)) if inputs else measured["pruned"]
    return Joint(plan, cost_model(plan.widths), curves.predicted_loss(plan.widths), measured)


class _ResultFile:
    """The file of an analysis, rewritten after every point; without a path, nothing is read or written."""

    def __init__(self, path: str | Path | None, fingerprint: str):
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint

    def resume(self, result: Sensitivity) -> Sensitivity:
        """Add the points and times stored in the file to a result without points."""
        if self.path is None or not self.path.exists():
            return result
        try:
            content = json.loads(self.path.read_text())
            known, found = content["fingerprint"], Sensitivity.from_json(content["sensitivity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PruningError(
                f"{self.path} holds no sensitivity analysis: {error}; choose another file"
            ) from error
        if known != self.fingerprint:
            raise PruningError(
                f"{self.path} is the analysis of another model, data or settings: choose another file"
            )
        return replace(
            result,
            points=found.points,
            runtime=found.runtime,
            dense_milliseconds=found.dense_milliseconds,
        )

    def write(self, result: Sensitivity) -> None:
        if self.path is not None:
            content = {"fingerprint": self.fingerprint, "sensitivity": result.to_json()}
            replace_file(self.path, (json.dumps(content) + "\n").encode())


def _fingerprint(model: nn.Module, settings: list[object], validation: Sequence[LabeledBatch]) -> str:
    """Return a hash of the model's weights, the settings and the validation targets."""
    digest = hashlib.sha256(repr(settings).encode())
    add_state(digest, model.state_dict())
    for _, targets in validation:
        digest.update(targets.cpu().numpy().tobytes())
    return digest.hexdigest()
