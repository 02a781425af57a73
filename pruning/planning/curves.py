"""Sensitivity curves: what a group's width costs in loss, as data, and as scores for a plan."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning.errors import PruningError
from pruning.planning.cost import Cost
from pruning.planning.scores import Groups, Scores

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
    `readings` go by stage (see `STAGES`). `milliseconds` are what its layers take together, per
    example, each measured alone; None where that was not asked for.
    """

    group: str
    width: int
    params: int
    macs: int
    readings: dict[str, Reading]
    milliseconds: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What an analysis found.

    Attributes:
        channels: full width of every group. dense: the model before, and its cost.
        order: for every group its channels from the least important on.
        skipped: layers whose channels cannot be removed, with the reason and the cure.
        points: one per group and width, the full width left out.
        dense_milliseconds: what the layers of the model take, as those of the points, in `runtime`.
    """

    channels: dict[str, int]
    dense: Reading
    dense_cost: Cost
    order: dict[str, list[int]]
    skipped: dict[str, str]
    points: list[SensitivityPoint] = field(default_factory=list)
    dense_milliseconds: float | None = None
    runtime: str | None = None

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
        freed = ["params_freed", "macs_freed", "milliseconds_freed"]
        writer.writerow(["group", "channels", "width", *freed, "stage", *readings])
        for point in self.points:
            less: list[Any] = [self.dense_cost.params - point.params, self.dense_cost.macs - point.macs]
            if self.dense_milliseconds is None or point.milliseconds is None:
                less.append("")
            else:
                less.append(f"{self.dense_milliseconds - point.milliseconds:.6f}")
            for stage, reading in point.readings.items():
                place = [point.group, self.channels[point.group], point.width]
                writer.writerow([*place, *less, stage, *asdict(reading).values()])
        return text.getvalue()


def _slope(x: np.ndarray, y: np.ndarray, i: int, j: int) -> float:
    return float((y[j] - y[i]) / (x[j] - x[i]))
