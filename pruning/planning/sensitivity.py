"""Sensitivity: what accuracy is lost as one group alone is narrowed, and what that buys.

Every point is real surgery: the group keeps its most important channels, everything else is
whole, and the small model is evaluated. `pruning.curves` is what comes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.graph.groups import Ignored, Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.cost import Cost, CostModel
from pruning.planning.curves import Reading, Sensitivity, SensitivityPoint
from pruning.planning.layer_times import LatencyTable
from pruning.planning.prefix_cache import Shortcut
from pruning.planning.scores import Score, score_channels
from pruning.planning.search import plan_within
from pruning.surgery.apply import apply, channel_constants
from pruning.surgery.batchnorm import recalibrate
from pruning.tracing.trace import trace
from pruning.training.batches import to_device
from pruning.training.config import TrainConfig
from pruning.training.loop import fit
from pruning.training.losses import IGNORED, cross_entropy, logits_for
from pruning.utils.files import replace_file
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.tree import Inputs

#: From logits and targets to one value per example.
PerExample = Callable[[Tensor, Tensor], Tensor]

Batch = tuple[Any, Any]

#: Bootstrap samples, and the share of them inside an interval.
RESAMPLES, INTERVAL = 400, 0.95


@dataclass(frozen=True)
class Joint:
    """A whole plan, and its loss as the curves predict it and as it is measured."""

    plan: Plan
    cost: Cost
    predicted_loss: float
    measured: dict[str, Reading]


def sensitivity(
    model: nn.Module,
    example_inputs: Inputs,
    validation: Sequence[Batch],
    *,
    calibration: Sequence[Batch] = (),
    widths: int | None = None,
    score: Score = "l2",
    finetune: TrainConfig | None = None,
    ignored: Iterable[Ignored] = (),
    runtime: str | None = None,
    path: str | Path | None = None,
    label: str = "sensitivity",
) -> Sensitivity:
    """Narrow each group alone, to several widths, and see what is lost.

    Args:
        model: left as it is. example_inputs: to trace with.
        validation: (inputs, targets) batches of a classifier: logits along dimension 1.
        calibration: batches for the score, the constants and the statistics of BatchNorm.
        widths: so many of each group, evenly spaced; None takes every one.
        score: which channels of a group go first, as `prune` takes it.
        finetune: also train each small model on the calibration batches.
        runtime: also measure what layers take in it (`eager`, `onnxruntime`) at several widths, for
            one example on one thread, and with that what each point takes.
        path: a JSON file that receives every point as it is there, and from which an
            interrupted analysis goes on.

    Raises `PruningError` for a model without a prunable group, an empty validation split or
    one in which a class is missing, and for a file of another analysis.
    """
    if score == "sensitivity":
        raise PruningError("the channels of a group cannot be ordered by sensitivity; choose another score")
    traced = trace(model, example_inputs, ignored)
    if not traced.groups:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in traced.skipped.items())
        raise PruningError(
            f"{type(model).__name__} has no group to narrow ({reasons or 'no layer was found'})"
        )
    device = device_of(model)
    validation = [to_device(batch, device) for batch in validation]
    calibration = [to_device(batch, device) for batch in calibration]
    judge = _Judge(model, validation)
    cost_model = CostModel(model, traced)
    order = {
        name: torch.sort(scores, stable=True).indices.tolist()
        for name, scores in score_channels(model, traced, score, calibration, cross_entropy).items()
    }
    result = Sensitivity(
        channels=traced.widths,
        dense=judge.read(model),
        dense_cost=cost_model(cost_model.full),
        order=order,
        skipped=dict(traced.skipped),
    )
    settings = [widths, str(score), finetune and asdict(finetune), sorted(traced.ignored)]
    file = _File(path, _fingerprint(model, settings, validation))
    if file.found is not None:
        known = file.found
        result = replace(
            result,
            points=known.points,
            runtime=known.runtime,
            dense_milliseconds=known.dense_milliseconds,
        )
    done = {(point.group, point.width) for point in result.points}

    inputs = [batch[0] for batch in calibration]
    constants = _constants(model, traced, example_inputs, inputs)
    todo = [(g, w) for g, full in traced.widths.items() for w in _widths(full, widths) if (g, w) not in done]
    with tqdm(total=len(todo) + len(done), initial=len(done), desc=label, disable=None, leave=False) as bar:
        for name in dict.fromkeys(group for group, _ in todo):
            shortcut = Shortcut(model, traced, name, [*judge.inputs, *inputs])
            for width in (w for group, w in todo if group == name):
                plan = Plan({name: tuple(order[name][-width:])})
                small = apply(model, traced, plan, constants)
                readings = {}
                with shortcut.applied(small):
                    readings["pruned"] = judge.read(small)
                    if inputs:
                        recalibrate(small, inputs, keep=shortcut.before)
                        readings["recalibrated"] = judge.read(small)
                if not inputs:
                    readings["recalibrated"] = readings["pruned"]
                if finetune is not None:
                    fit(small, calibration, finetune)
                    readings["finetuned"] = judge.read(small)
                cost = cost_model(plan.widths)
                result.points.append(SensitivityPoint(name, width, cost.params, cost.macs, readings))
                file.write(result)
                bar.update()
    if runtime is not None and (todo or runtime != result.runtime):
        result = _timed(result, model, example_inputs, traced, LatencyBudget("1x", runtime, batch_size=1))
        file.write(result)
    return result


def _timed(
    result: Sensitivity, model: nn.Module, inputs: Inputs, traced: Trace, place: LatencyBudget
) -> Sensitivity:
    """The same with the time of every point, from one table of layers."""
    table = LatencyTable(model, place.batch_of(inputs), traced, place, np.ones(len(traced.groups)))
    full = traced.widths

    def milliseconds(widths: dict[str, int]) -> float:
        return float(table.milliseconds(np.array(list(widths.values()), dtype=np.float64)))

    points = [replace(p, milliseconds=milliseconds({**full, p.group: p.width})) for p in result.points]
    return replace(result, points=points, runtime=place.runtime, dense_milliseconds=milliseconds(full))


def joint(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    curves: Sensitivity,
    validation: Sequence[Batch],
    *,
    calibration: Sequence[Batch] = (),
    ignored: Iterable[Ignored] = (),
) -> Joint:
    """The plan that the curves suggest for a budget, applied whole, and how well they foretold it."""
    device = device_of(model)
    traced = trace(model, example_inputs, ignored)
    cost_model = CostModel(model, traced)
    target = budget.resolve(cost_model(cost_model.full))
    plan = plan_within(target, traced, cost_model, curves.scores(model, traced.groups))
    judge = _Judge(model, [to_device(batch, device) for batch in validation])
    inputs = [to_device(batch, device)[0] for batch in calibration]
    small = apply(model, traced, plan, _constants(model, traced, example_inputs, inputs))
    measured = {"pruned": judge.read(small)}
    measured["recalibrated"] = judge.read(recalibrate(small, inputs)) if inputs else measured["pruned"]
    return Joint(plan, cost_model(plan.widths), curves.predicted_loss(plan.widths), measured)


def _widths(full: int, count: int | None) -> list[int]:
    """Widths below the full one, from the widest on."""
    if count is None or count >= full - 1:
        return list(range(full - 1, 0, -1))
    spaced = np.linspace(1, full, count + 1).round().astype(int)
    return sorted({int(width) for width in spaced if width < full}, reverse=True)


def _constants(
    model: nn.Module, traced: Trace, example_inputs: Inputs, inputs: list[Any]
) -> dict[str, Tensor]:
    if inputs:
        return channel_constants(model, traced, inputs)
    return channel_constants(model, traced, [example_inputs], exact_only=True)


class _Judge:
    """Reads loss and accuracy off a validation split, on the same bootstrap samples each time."""

    def __init__(self, model: nn.Module, validation: Sequence[Batch]):
        count = sum(int((targets != IGNORED).sum()) for _, targets in validation)
        if not count:
            raise PruningError("the validation split is empty: there is nothing to measure sensitivity on")
        self.validation = validation
        self.inputs = [batch[0] for batch in validation]
        self._require_every_class(model, count)
        draws = np.random.default_rng(0)
        weights = draws.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
        self.weights = torch.from_numpy(weights).float()

    def _require_every_class(self, model: nn.Module, count: int) -> None:
        with torch.no_grad(), eval_mode(model):
            classes = logits_for(self.validation[0][1], call(model, self.inputs[0])).shape[1]
        present = set(torch.cat([targets.flatten().cpu() for _, targets in self.validation]).tolist())
        missing = [c for c in range(classes) if c not in present]
        if missing and count >= (10 * classes if len(present) > 1 else 10):
            raise PruningError(
                f"the validation split has {count:,} examples, and none of class "
                f"{', '.join(map(str, missing))}: channels that only these need would look useless. "
                "Give a split with all classes"
            )

    def read(self, model: nn.Module) -> Reading:
        losses, hits = [], []
        with torch.inference_mode(), eval_mode(model):
            for inputs, targets in self.validation:
                logits, counted = call(model, inputs), targets != IGNORED
                losses.append(F.cross_entropy(logits, targets, reduction="none")[counted].float().cpu())
                hits.append((logits.argmax(1) == targets)[counted].float().cpu())
        values = torch.stack([torch.cat(losses), torch.cat(hits)], 1)
        means = self.weights @ values
        tail = (1 - INTERVAL) / 2
        low, high = torch.quantile(means, tail, dim=0), torch.quantile(means, 1 - tail, dim=0)
        loss, accuracy = values.mean(0).tolist()
        return Reading(loss, low[0].item(), high[0].item(), accuracy, low[1].item(), high[1].item())


class _File:
    """The points of an analysis on disk, whole after each; nothing where no path is given."""

    def __init__(self, path: str | Path | None, fingerprint: str):
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self.found: Sensitivity | None = None
        if self.path is None or not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            known, found = content["fingerprint"], Sensitivity.from_json(content["sensitivity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PruningError(f"{self.path} holds no sensitivity analysis: {error}") from error
        if known != fingerprint:
            raise PruningError(
                f"{self.path} is the analysis of another model, data or settings: choose another file"
            )
        self.found = found

    def write(self, result: Sensitivity) -> None:
        if self.path is not None:
            content = {"fingerprint": self.fingerprint, "sensitivity": result.to_json()}
            replace_file(self.path, (json.dumps(content) + "\n").encode())


def _fingerprint(model: nn.Module, settings: list[Any], validation: Sequence[Batch]) -> str:
    """Tells analyses apart: weights, settings, and the targets they are measured on."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    for _, targets in validation:
        digest.update(targets.cpu().numpy().tobytes())
    return digest.hexdigest()
