"""Sensitivity: what accuracy is lost as one group alone is narrowed, and what that buys.

Every point is real surgery: the group keeps its most important channels, everything else is
whole, and the small model is evaluated. The curves can then score channels, so that a plan
narrows each group to where it hurts least.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruning.budget import Budget
from pruning.checkpoint import replace_file
from pruning.config import TrainConfig
from pruning.cost import Cost, CostModel
from pruning.errors import PruningError
from pruning.graph import Ignored, Inputs, Trace, call, tensors
from pruning.grouping import trace
from pruning.importance import Groups, Scores
from pruning.modes import eval_mode
from pruning.norms import recalibrate
from pruning.plan import Plan, plan_within
from pruning.prune import Score, score_channels
from pruning.surgery import apply, channel_constants
from pruning.training import fit, to_device

#: From logits and targets to one value per example.
PerExample = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Any, Any]

#: Bootstrap samples, and the share of them inside an interval.
RESAMPLES, INTERVAL = 400, 0.95
#: How a small model is measured: as surgery left it, with the statistics of its BatchNorm
#: taken anew, and after a short fine-tuning.
STAGES = ("pruned", "recalibrated", "finetuned")


@dataclass(frozen=True)
class Reading:
    """Loss and accuracy on the validation split, each with its bootstrap interval."""

    loss: float
    loss_low: float
    loss_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class SensitivityPoint:
    """One group at one width, all others whole.

    `params` and `macs` are those of the whole network at this point, BatchNorm folded;
    `readings` go by stage (see `STAGES`).
    """

    group: str
    width: int
    params: int
    macs: int
    readings: dict[str, Reading]


@dataclass(frozen=True)
class Sensitivity:
    """What an analysis found.

    Attributes:
        channels: full width of every group. dense: the model before, and its cost.
        order: for every group its channels from the least important on.
        skipped: layers whose channels cannot be removed, with the reason and the cure.
        points: one per group and width, the full width left out.
    """

    channels: dict[str, int]
    dense: Reading
    dense_cost: Cost
    order: dict[str, list[int]]
    skipped: dict[str, str]
    points: list[SensitivityPoint] = field(default_factory=list)

    def curve(self, group: str, stage: str = "recalibrated") -> list[tuple[int, Reading]]:
        """(width, reading) of a group from its narrowest to its full width."""
        found = [(p.width, p.readings[stage]) for p in self.points if p.group == group if stage in p.readings]
        return [*sorted(found, key=lambda pair: pair[0]), (self.channels[group], self.dense)]

    def increases(self, group: str, stage: str = "recalibrated") -> np.ndarray:
        """How much each further channel raises the loss when channels go in their order.

        Entry k is the rise from k to k + 1 channels removed, (channels,); the last is
        infinite, a group is never emptied. Between measured widths the loss is
        interpolated. A curve that is not monotone, or falls more steeply later than
        earlier, is replaced by the greatest convex curve below its running maximum: the
        plan then never stops on a step of the curve that noise has made.
        """
        curve = self.curve(group, stage)
        total = self.channels[group]
        removed = np.array([total - width for width, _ in reversed(curve)])
        losses = np.maximum.accumulate([reading.loss for _, reading in reversed(curve)])
        hull: list[int] = []
        for i in range(len(removed)):
            while len(hull) > 1 and _slope(removed, losses, hull[-1], i) <= _slope(
                removed, losses, hull[-2], hull[-1]
            ):
                hull.pop()
            hull.append(i)
        smooth = np.interp(np.arange(total), removed[hull], losses[hull])
        beyond = removed[-1] + 1  # narrower than what was measured: as steep as its last part
        if beyond < total and len(hull) > 1:
            steep = _slope(removed, losses, hull[-2], hull[-1])
            smooth[beyond:] = losses[hull[-1]] + steep * (np.arange(beyond, total) - removed[-1])
        return np.append(np.diff(smooth), np.inf)

    def scores(self, model: nn.Module, groups: Groups) -> Scores:
        """Importance from the curves, to be given to `prune` as its score.

        Raises `PruningError` when the model is not as wide as the one that was analysed.
        """
        found = {}
        for name, group in groups.items():
            if self.channels.get(name) != group.channels:
                raise PruningError(
                    f"group {name!r} has {group.channels} channels, the sensitivity analysis is of a model "
                    f"with {self.channels.get(name, 'no such group')}: analyse this model"
                )
            increases = self.increases(name)
            increases[-1] = increases[:-1].max(initial=0.0)  # the last channel stays in any case
            score = torch.zeros(group.channels, dtype=torch.float64)
            # Where the curve is flat the order still tells the channels apart.
            score[self.order[name]] = torch.from_numpy(increases + 1e-12 * np.arange(group.channels))
            found[name] = score
        return found

    def predicted_loss(self, widths: dict[str, int], stage: str = "recalibrated") -> float:
        """The loss of a plan if what its groups lose simply added up."""
        loss = self.dense.loss
        for group, width in widths.items():
            curve = self.curve(group, stage)
            at = np.interp(width, [w for w, _ in curve], [reading.loss for _, reading in curve])
            loss += float(at) - self.dense.loss
        return loss

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sensitivity:
        points = [
            SensitivityPoint(**{**p, "readings": {k: Reading(**r) for k, r in p["readings"].items()}})
            for p in content["points"]
        ]
        dense, cost = Reading(**content["dense"]), Cost(**content["dense_cost"])
        return cls(**{**content, "dense": dense, "dense_cost": cost, "points": points})

    def to_csv(self) -> str:
        """One line per group, width and stage."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        readings = list(asdict(self.dense))
        freed = ["params_freed", "macs_freed"]
        writer.writerow(["group", "channels", "width", *freed, "stage", *readings])
        for point in self.points:
            less = [self.dense_cost.params - point.params, self.dense_cost.macs - point.macs]
            for stage, reading in point.readings.items():
                place = [point.group, self.channels[point.group], point.width]
                writer.writerow([*place, *less, stage, *asdict(reading).values()])
        return text.getvalue()


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
    device = next(model.parameters()).device
    validation = [to_device(batch, device) for batch in validation]
    calibration = [to_device(batch, device) for batch in calibration]
    judge = _Judge(model, validation)
    cost_model = CostModel(model, traced)
    order = {
        name: torch.sort(scores, stable=True).indices.tolist()
        for name, scores in score_channels(model, traced, score, calibration, _loss).items()
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
    result.points.extend(file.points)
    done = {(point.group, point.width) for point in result.points}

    inputs = [batch[0] for batch in calibration]
    constants = _constants(model, traced, example_inputs, inputs)
    todo = [(g, w) for g, full in traced.widths.items() for w in _widths(full, widths) if (g, w) not in done]
    with tqdm(total=len(todo) + len(done), initial=len(done), desc=label, disable=None, leave=False) as bar:
        for name in dict.fromkeys(group for group, _ in todo):
            shortcut = _Shortcut(model, traced, name, [*judge.inputs, *inputs])
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
    return result


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
    device = next(model.parameters()).device
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


def _loss(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
    return F.cross_entropy(call(model, inputs), targets)


def _slope(x: np.ndarray, y: np.ndarray, i: int, j: int) -> float:
    return float((y[j] - y[i]) / (x[j] - x[i]))


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
        count = sum(targets.numel() for _, targets in validation)
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
            classes = call(model, self.inputs[0]).shape[1]
        present = set(torch.cat([targets.flatten().cpu() for _, targets in self.validation]).tolist())
        missing = [c for c in range(classes) if c not in present]
        if missing and count >= 10 * classes:
            raise PruningError(
                f"the validation split has {count:,} examples, and none of class "
                f"{', '.join(map(str, missing))}: channels that only these need would look useless. "
                "Give a split with all classes"
            )

    def read(self, model: nn.Module) -> Reading:
        losses, hits = [], []
        with torch.inference_mode(), eval_mode(model):
            for inputs, targets in self.validation:
                logits = call(model, inputs)
                losses.append(F.cross_entropy(logits, targets, reduction="none").flatten().float().cpu())
                hits.append((logits.argmax(1) == targets).flatten().float().cpu())
        values = torch.stack([torch.cat(losses), torch.cat(hits)], 1)
        means = self.weights @ values
        tail = (1 - INTERVAL) / 2
        low, high = torch.quantile(means, tail, dim=0), torch.quantile(means, 1 - tail, dim=0)
        loss, accuracy = values.mean(0).tolist()
        return Reading(loss, low[0].item(), high[0].item(), accuracy, low[1].item(), high[1].item())


class _Shortcut:
    """Skips what a model computes before the layers of a group: for every point it is the same.

    The modules that have finished before the group's first layer begins let their input
    pass, and the last of them returns what it returned in the whole model. Whether that is
    all that the rest needs is tried out; where it is not, an earlier module is taken, and
    in the end none.
    """

    TRIES = 6

    def __init__(self, model: nn.Module, traced: Trace, group: str, batches: Sequence[Any]):
        self.batches = {id(tensors(batch)[0]): number for number, batch in enumerate(batches)}
        self.cached: list[Any] = []
        self.passing: list[str] = []
        self.returning = ""
        #: Modules before the group: what they compute, statistics included, does not change.
        self.before = _finished_before(model, {m.layer for m in traced.groups[group].members}, batches[0])
        finished = self.before
        for last in range(len(finished), max(0, len(finished) - self.TRIES), -1):
            *self.passing, self.returning = finished[:last]
            self.cached = [self._output(model, batches[0])]
            if self._is_enough(model, batches[0]):
                self.cached += [self._output(model, batch) for batch in batches[1:]]
                return
        self.passing, self.returning, self.cached = [], "", []

    def _output(self, model: nn.Module, batch: Any) -> Any:
        """What the last module returns for a batch, the forward pass ending there."""
        found: list[Any] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        handle = model.get_submodule(self.returning).register_forward_hook(hook)
        try:
            with torch.inference_mode(), eval_mode(model):
                call(model, batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def _is_enough(self, model: nn.Module, batch: Any) -> bool:
        with torch.inference_mode(), eval_mode(model):
            expected = call(model, batch)
            try:
                with self.applied(model):
                    return torch.equal(call(model, batch), expected)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                return False

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The shortcut in a model of the same modules, which must be given the known batches."""
        if not self.returning:
            yield
            return
        current = 0

        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal current
            current = self.batches.get(id(tensors((args, kwargs))[0]), -1)
            if current < 0:
                raise AssertionError("a shortcut knows only the batches that it was made with")

        def give(*_: Any, **__: Any) -> Any:
            cached = self.cached[current]
            return cached.clone() if isinstance(cached, Tensor) else cached

        handle = model.register_forward_pre_hook(see, with_kwargs=True)
        modules = {name: model.get_submodule(name) for name in (*self.passing, self.returning)}
        try:
            for name, module in modules.items():
                module.forward = give if name == self.returning else _pass_on
            yield
        finally:
            handle.remove()
            for module in modules.values():
                del module.forward


class _Reached(Exception):
    """Ends a forward pass where its result is known."""


def _pass_on(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _finished_before(model: nn.Module, layers: set[str], batch: Any) -> list[str]:
    """The outermost modules that finish before the first of these layers begins, in order."""
    finished: list[str] = []
    reached = False

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal reached
            reached = reached or name in layers

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not reached:
                finished[:] = [other for other in finished if not other.startswith(f"{name}.")]
                finished.append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(begin(name)))
            handles.append(module.register_forward_hook(end(name)))
    try:
        with torch.inference_mode(), eval_mode(model):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return finished if len(set(finished)) == len(finished) else []


class _File:
    """The points of an analysis on disk, whole after each; nothing where no path is given."""

    def __init__(self, path: str | Path | None, fingerprint: str):
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self.points: list[SensitivityPoint] = []
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
        self.points = found.points

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
