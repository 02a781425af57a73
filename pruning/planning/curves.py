"""Sensitivity curves: the loss as a function of the width of one group, and scores from these curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Group
from pruning.planning.cost import Cost
from pruning.utils.wording import number_of

#: The stages at which a small model is measured: after surgery, after recalibration of its BatchNorm
#: statistics, and after a short fine-tuning.
STAGES = ("pruned", "recalibrated", "finetuned")


@dataclass(frozen=True)
class Reading:
    """Loss and accuracy on the validation split, each with a 95 % bootstrap interval."""

    loss: float
    loss_low: float
    loss_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class SensitivityPoint:
    """One group at one width, all other groups at full width.

    Attributes:
        params, macs: cost of the whole network at this width, BatchNorm folded.
        readings: by stage (see `STAGES`), the measured loss and accuracy.
        milliseconds: sum of the times of the network's layers, each timed alone, per example; None
            if time was not measured.
    """

    group: str
    width: int
    params: int
    macs: int
    readings: dict[str, Reading]
    milliseconds: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """The result of a sensitivity analysis.

    Attributes:
        channels: full width of every group.
        dense: reading of the dense model. dense_cost: its cost.
        order: by group, its channels in ascending order of importance.
        skipped: layers whose channels cannot be removed, with the reason and the cure.
        points: one per group and width; the full width is not listed.
        dense_milliseconds: time of the dense model, measured like those of the points.
        runtime: runtime in which times were measured; None if they were not.

    >>> dense, narrow = Reading(0.1, 0, 1, 0.9, 0, 1), Reading(0.5, 0, 1, 0.8, 0, 1)
    >>> point = SensitivityPoint("conv", 1, 10, 90, {"recalibrated": narrow})
    >>> found = Sensitivity({"conv": 2}, dense, Cost(20, 180, 0), {"conv": [1, 0]}, {}, [point])
    >>> [width for width, _ in found.curve("conv")], found.predicted_loss({"conv": 1})
    ([1, 2], 0.5)
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
        """Return the pairs (width, reading) of a group, from the least measured width to the full width."""
        found = [(p.width, p.readings[stage]) for p in self.points if p.group == group if stage in p.readings]
        return [*sorted(found, key=lambda pair: pair[0]), (self.channels[group], self.dense)]

    def increases(self, group: str, stage: str = "recalibrated") -> np.ndarray:
        """Return the increase of the loss for each further channel removed, (channels,).

        Channels are removed in ascending order of importance; entry k is the increase from k to k + 1
        removed channels. The last entry is infinite, because a group is never emptied. The loss is
        interpolated between measured widths. The curve is replaced by the lower convex hull of its
        running maximum, so that a plan does not stop at a step that is noise.
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
        beyond = removed[-1] + 1  # below the least measured width: continue with the last slope
        if beyond < total and len(hull) > 1:
            steep = _slope(removed, losses, hull[-2], hull[-1])
            smooth[beyond:] = losses[hull[-1]] + steep * (np.arange(beyond, total) - removed[-1])
        return np.append(np.diff(smooth), np.inf)

    def scores(self, model: nn.Module, groups: Mapping[str, Group]) -> dict[str, Tensor]:
        """Score channels by the curves; pass this method to `prune` as its `score`.

        Returns:
            By group, the score of each channel, (channels,), float64.

        Raises:
            PruningError: if the groups differ from those of the analyzed model.
        """
        found = {}
        for name, group in groups.items():
            if self.channels.get(name) != group.channels:
                raise PruningError(
                    f"group {name!r} has {number_of(group.channels, 'channel')}, the sensitivity analysis "
                    f"is of a model with {self.channels.get(name, 'no such group')}: analyze this model"
                )
            increases = self.increases(name)
            increases[-1] = increases[:-1].max(initial=0.0)  # the last channel is never removed
            score = torch.zeros(group.channels, dtype=torch.float64)
            # A small slope breaks ties in the order of channels where the curve is flat.
            score[self.order[name]] = torch.from_numpy(increases + 1e-12 * np.arange(group.channels))
            found[name] = score
        return found

    def predicted_loss(self, widths: dict[str, int], stage: str = "recalibrated") -> float:
        """Add up the dense loss and the increase of each group alone at the given widths.

        Groups that are narrowed together lose more or less than this sum, and no interval is known for it
        (`benchmarks/forecasts.md` compares it with what is measured). `pruning.stages.frontier` measures
        whole plans, and forecasts those between them with an interval.
        """
        loss = self.dense.loss
        for group, width in widths.items():
            curve = self.curve(group, stage)
            at = np.interp(width, [w for w, _ in curve], [reading.loss for _, reading in curve])
            loss += float(at) - self.dense.loss
        return loss

    def to_json(self) -> dict[str, object]:
        """Return the result as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sensitivity:
        """Build the result from what `to_json` returned."""
        points = [
            SensitivityPoint(**{**p, "readings": {k: Reading(**r) for k, r in p["readings"].items()}})
            for p in content["points"]
        ]
        dense, cost = Reading(**content["dense"]), Cost(**content["dense_cost"])
        return cls(**{**content, "dense": dense, "dense_cost": cost, "points": points})

    def to_csv(self) -> str:
        """Return the points as CSV, one line per group, width and stage."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        readings = list(asdict(self.dense))
        freed = ["params_freed", "macs_freed", "milliseconds_freed"]
        writer.writerow(["group", "channels", "width", *freed, "stage", *readings])
        for point in self.points:
            less: list[int | str] = [self.dense_cost.params - point.params, self.dense_cost.macs - point.macs]
            if self.dense_milliseconds is None or point.milliseconds is None:
                less.append("")
            else:
                less.append(f"{self.dense_milliseconds - point.milliseconds:.6f}")
            for stage, reading in point.readings.items():
                place = [point.group, self.channels[point.group], point.width]
                writer.writerow([*place, *less, stage, *asdict(reading).values()])
        return text.getvalue()


def _slope(x: np.ndarray, y: np.ndarray, i: int, j: int) -> float:
    """Return the slope of the line through points i and j."""
    return float((y[j] - y[i]) / (x[j] - x[i]))
