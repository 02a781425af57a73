"""Measure a model with one group narrowed at a time: each point applies surgery and evaluates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Trace
from pruning.graph.plan import Plan
from pruning.planning.bootstrap import Bootstrap
from pruning.planning.cost import CostModel
from pruning.planning.curves import Reading, Sensitivity, SensitivityPoint
from pruning.planning.prefix_cache import PrefixCache
from pruning.surgery.apply import apply, channel_constants
from pruning.surgery.batchnorm import recalibrate
from pruning.tracing.trace import require_groups
from pruning.training.config import TrainConfig
from pruning.training.loop import fit
from pruning.training.losses import IGNORED, class_logits, logits_for
from pruning.utils.cluster import in_order
from pruning.utils.compare import cuda_devices
from pruning.utils.modules import call, eval_mode
from pruning.utils.tree import Inputs

#: (inputs, targets)
Batch = tuple[Inputs, object]

#: A batch of a classifier: its targets are classes.
LabeledBatch = tuple[Inputs, Tensor]

#: Seed of the training of every point.
SEED = 0


class WidthSweep:
    """Narrow one group of a model at a time to its most important channels, and measure.

    Args:
        model: a classifier with logits along dimension 1; it is not changed.
        trace: of this model.
        validation: batches on which to measure, on the model's device.
        calibration: batches for the channel constants and BatchNorm statistics, on the same device.

    Raises:
        PruningError: if the model has no prunable group, or the validation split is empty or lacks a
            class.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        validation: Sequence[LabeledBatch],
        calibration: Sequence[Batch],
    ):
        require_groups(model, trace)
        self.model, self.trace, self.calibration = model, trace, calibration
        self.evaluator = Evaluator(model, validation)
        self.cost_model = CostModel(model, trace)

    def dense_result(self, order: dict[str, list[int]]) -> Sensitivity:
        """Measure the dense model, and return a result without points.

        Args:
            order: by group, its channels in ascending order of importance.
        """
        return Sensitivity(
            channels=self.trace.widths,
            dense=self.evaluator.read(self.model),
            dense_cost=self.cost_model(self.cost_model.full),
            order=order,
            skipped=dict(self.trace.skipped),
        )

    def measure(
        self,
        order: Mapping[str, Sequence[int]],
        points: Iterable[tuple[str, int]],
        finetune: TrainConfig | None = None,
        cluster: str | None = None,
    ) -> Iterator[SensitivityPoint]:
        """Measure the model at each point, a pair (group, width).

        Args:
            order: by group, its channels in ascending order of importance.
            points: the pairs to measure.
            finetune: if given, also train each small model on the calibration batches.
            cluster: where to measure the groups, see `in_order`.
        """
        inputs = [batch[0] for batch in self.calibration]
        constants = calibrated_constants(self.model, self.trace, inputs)
        by_group: dict[str, list[int]] = {}
        for group, width in points:
            by_group.setdefault(group, []).append(width)
        if cluster is None:
            for item in by_group.items():
                yield from self._group(order, constants, finetune, item)
            return
        work = partial(self._listed, order, constants, finetune)
        for found in in_order(work, list(by_group.items()), cluster):
            yield from found

    def _listed(
        self,
        order: Mapping[str, Sequence[int]],
        constants: dict[str, Tensor],
        finetune: TrainConfig | None,
        item: tuple[str, list[int]],
    ) -> list[SensitivityPoint]:
        """Measure one group, and return the points together."""
        return list(self._group(order, constants, finetune, item))

    def _group(
        self,
        order: Mapping[str, Sequence[int]],
        constants: dict[str, Tensor],
        finetune: TrainConfig | None,
        item: tuple[str, list[int]],
    ) -> Iterator[SensitivityPoint]:
        """Measure one group at some widths."""
        group, widths = item
        inputs = [batch[0] for batch in self.calibration]
        layers = {member.layer for member in self.trace.groups[group].members}
        cache = PrefixCache(self.model, layers, [*self.evaluator.inputs, *inputs])
        for width in widths:
            plan = Plan({group: tuple(order[group][-width:])})
            small = apply(self.model, self.trace, plan, constants)
            readings = {}
            with cache.applied(small):
                readings["pruned"] = self.evaluator.read(small)
                if inputs:
                    recalibrate(small, inputs, keep=cache.unchanged)
                    readings["recalibrated"] = self.evaluator.read(small)
            if not inputs:
                readings["recalibrated"] = readings["pruned"]
            if finetune is not None:
                with torch.random.fork_rng(cuda_devices()):  # a point does not depend on those before it
                    torch.manual_seed(SEED)
                    fit(small, self.calibration, finetune)
                readings["finetuned"] = self.evaluator.read(small)
            cost = self.cost_model(plan.widths)
            yield SensitivityPoint(group, width, cost.params, cost.macs, readings)


class Evaluator:
    """Measure loss and accuracy on a validation split, with the same bootstrap samples each time."""

    def __init__(self, model: nn.Module, validation: Sequence[LabeledBatch]):
        count = sum(int((targets != IGNORED).sum()) for _, targets in validation)
        if not count:
            raise PruningError("the validation split is empty: give at least one example to measure on")
        self.validation = validation
        self.inputs = [inputs for inputs, _ in validation]
        self._require_every_class(model, count)
        self.bootstrap = Bootstrap(count)

    def _require_every_class(self, model: nn.Module, count: int) -> None:
        with torch.no_grad(), eval_mode(model):
            targets = self.validation[0][1]
            outputs = class_logits(call(model, self.inputs[0]), targets)
            classes = logits_for(targets, outputs).shape[1]
        present = set(torch.cat([targets.flatten().cpu() for _, targets in self.validation]).tolist())
        missing = [c for c in range(classes) if c not in present]
        if missing and count >= (10 * classes if len(present) > 1 else 10):
            raise PruningError(
                f"the validation split has {count:,} examples, and none of class "
                f"{', '.join(map(str, missing))}: channels that matter only to these classes would seem "
                "unimportant. Give a split with all classes"
            )

    def read(self, model: nn.Module) -> Reading:
        """Return the loss and accuracy of a model, with their intervals."""
        losses, hits = [], []
        with torch.inference_mode(), eval_mode(model):
            for inputs, targets in self.validation:
                counted = targets != IGNORED
                logits = cast(Tensor, class_logits(call(model, inputs), targets))
                losses.append(F.cross_entropy(logits, targets, reduction="none")[counted].float().cpu())
                hits.append((logits.argmax(1) == targets)[counted].float().cpu())
        values = torch.stack([torch.cat(losses), torch.cat(hits)], 1)
        low, high = self.bootstrap.interval(self.bootstrap.means(values))
        loss, accuracy = values.mean(0).tolist()
        return Reading(loss, low[0].item(), high[0].item(), accuracy, low[1].item(), high[1].item())


def channel_order(scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the channels of each group in ascending order of their scores."""
    return {name: torch.sort(values, stable=True).indices.tolist() for name, values in scores.items()}


def points_to_measure(trace: Trace, count: int | None) -> list[tuple[str, int]]:
    """Return (group, width) for evenly spaced widths of every group, from the widest to 1.

    Args:
        count: number of widths per group, without the full one; None means every width.
    """
    return [(name, width) for name, group in trace.groups.items() for width in _widths(group, count)]


def _widths(group: Group, count: int | None) -> list[int]:
    full, multiple = group.channels, group.multiple
    allowed = range(multiple, full, multiple)
    if count is None or count >= len(allowed):
        return list(reversed(allowed))
    spaced = np.linspace(1, full / multiple, count + 1).round().astype(int) * multiple
    return sorted({int(width) for width in spaced if width < full}, reverse=True)


def calibrated_constants(model: nn.Module, trace: Trace, inputs: Sequence[Inputs]) -> dict[str, Tensor]:
    """Return the channel constants on calibration inputs; if there are none, only the exact constants."""
    if inputs:
        return channel_constants(model, trace, inputs)
    return channel_constants(model, trace, [trace.inputs], exact_only=True)
