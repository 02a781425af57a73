"""The result of a frontier: networks of one model at several budgets, each judged before any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pruning.graph.plan import Plan
from pruning.planning.bootstrap import INTERVAL
from pruning.planning.cost import Cost
from pruning.planning.judge import Estimate, Judgement
from pruning.planning.latency import LatencyFound

#: What a budget of a frontier can limit.
LIMITS = ("params", "macs", "channels", "latency")


@dataclass(frozen=True)
class FrontierPoint:
    """A network at one budget.

    Attributes:
        budget: the budget, as it is given to `prune`: `60%` of the dense network's cost, a count, or a time.
        plan: the channels that each group keeps.
        cost: cost of the network, BatchNorm folded.
        judgement: what it reaches on the validation inputs, without training.
        latency: its time and that of the dense network, measured together; None if not measured.
        left_out: groups that keep all channels because the check failed with them, with the reason.
    """

    budget: str
    plan: Plan
    cost: Cost
    judgement: Judgement
    latency: LatencyFound | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the point as plain data."""
        return {
            "budget": self.budget,
            "cost": asdict(self.cost),
            "latency": None if self.latency is None else asdict(self.latency),
            **_judgement_json(self.judgement),
            "widths": self.plan.widths,
            "plan": self.plan.to_json(),
            "left_out": dict(self.left_out),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FrontierPoint:
        """Build the point from what `to_json` returned."""
        return cls(
            data["budget"],
            Plan.from_json(data["plan"]),
            Cost(**data["cost"]),
            _judgement(data),
            None if data["latency"] is None else LatencyFound(**data["latency"]),
            dict(data["left_out"]),
        )


@dataclass(frozen=True)
class Frontier:
    """Networks of one model at several budgets (see `frontier`).

    Attributes:
        limit: what the budgets limit: `params`, `macs`, `channels` or `latency`.
        metric: the metric to compare networks by: `accuracy`, `agreement`, `error` or
            `score` (see `Judgement`).
        dense: what the dense network reaches. dense_cost: its cost. widths: its widths, by group.
        examples: number of validation examples. totals: by class, how often it occurs (see `Judgement`).
        least: the least that a plan can reach, as a share of the dense network's cost or time.
        unreachable: budgets that were asked for and are below it.
        points: the networks, from the widest to the narrowest.
        score: the score that channels were compared by. refit: whether layers were refitted.
    """

    limit: str
    metric: str
    dense: Judgement
    dense_cost: Cost
    widths: dict[str, int]
    examples: int
    totals: dict[int, int]
    least: float
    score: str
    refit: bool
    unreachable: tuple[str, ...] = ()
    points: tuple[FrontierPoint, ...] = ()

    def share(self, point: FrontierPoint) -> float:
        """Return the cost or time that a point reaches, as a share of the dense network's."""
        if self.limit == "latency":
            return 1.0 if point.latency is None else point.latency.pruned / point.latency.dense
        return getattr(point.cost, self.limit) / max(1, getattr(self.dense_cost, self.limit))

    def drop(self, point: FrontierPoint) -> Estimate | None:
        """Return what a point loses: accuracy, agreement, score, or the error itself; None if not finite.

        Of accuracy and score, the interval is that of the difference, on the same examples.
        """
        found = point.judgement.metrics.get(self.metric)
        if found is None or self.metric == "error":
            return found
        change = point.judgement.change or Estimate(*(value - 1 for value in found))
        return Estimate(-change.value, -change.high, -change.low)

    def smallest(self, drop: float) -> FrontierPoint | None:
        """Return the point of the least cost that, by its whole interval, loses at most `drop`.

        It is chosen on the validation inputs: report what it reaches on others.
        """
        found = [(point, self.drop(point)) for point in self.points]
        enough = [point for point, lost in found if lost is not None and lost.high <= drop]
        return min(enough, key=self.share, default=None)

    def forecast(self, share: float, metric: str | None = None) -> Estimate | None:
        """Forecast a metric of the plan for a budget between measured ones; nothing is computed.

        The figure is interpolated between the two nearest networks, of which the dense one counts as the
        widest; the interval reaches from the lowest to the highest end of theirs. On ten networks it held
        the metric of the plan that was then measured in the share of cases that `benchmarks/forecasts.md`
        reports.

        Args:
            share: of the dense network's cost or time. metric: by default `metric`.

        Returns:
            The forecast; None beyond the measured networks, or next to one whose metric is not finite.
        """
        name = self.metric if metric is None else metric
        known = [(1.0, self.dense), *((self.share(point), point.judgement) for point in self.points)]
        above = min((each for each in known if each[0] >= share), key=lambda each: each[0], default=None)
        below = max((each for each in known if each[0] <= share), key=lambda each: each[0], default=None)
        if above is None or below is None:
            return None
        wide, narrow = (judgement.metrics.get(name) for _, judgement in (above, below))
        if wide is None or narrow is None:
            return None
        span = above[0] - below[0]
        part = (above[0] - share) / span if span else 0.0
        value = wide.value + part * (narrow.value - wide.value)
        return Estimate(value, min(wide.low, narrow.low), max(wide.high, narrow.high))

    def with_point(self, point: FrontierPoint) -> Frontier:
        """Return the frontier with one point more, in its place."""
        points = sorted((*self.points, point), key=lambda each: -self.share(each))
        return replace(self, points=tuple(points))

    def to_json(self) -> dict[str, object]:
        """Return the frontier as plain data."""
        return {
            "limit": self.limit,
            "metric": self.metric,
            "dense": {"cost": asdict(self.dense_cost), "widths": self.widths, **_judgement_json(self.dense)},
            "examples": self.examples,
            "confidence": INTERVAL,
            "totals": {str(number): count for number, count in self.totals.items()},
            "least": self.least,
            "score": self.score,
            "refit": self.refit,
            "unreachable": list(self.unreachable),
            "points": [point.to_json() for point in self.points],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Frontier:
        """Build the frontier from what `to_json` returned."""
        dense = data["dense"]
        return cls(
            **{key: data[key] for key in ("limit", "metric", "examples", "least", "score", "refit")},
            dense=_judgement(dense),
            dense_cost=Cost(**dense["cost"]),
            widths=dict(dense["widths"]),
            totals=_by_class(data["totals"]),
            unreachable=tuple(data["unreachable"]),
            points=tuple(FrontierPoint.from_json(point) for point in data["points"]),
        )


def _judgement_json(found: Judgement) -> dict[str, object]:
    """Return a judgement as plain data: each estimate as [value, low, high]."""
    return {
        "metrics": {name: list(estimate) for name, estimate in found.metrics.items()},
        "change": None if found.change is None else list(found.change),
        "classes": {str(number): count for number, count in found.classes.items()},
    }


def _judgement(data: Mapping[str, Any]) -> Judgement:
    return Judgement(
        {name: Estimate(*values) for name, values in data["metrics"].items()},
        None if data["change"] is None else Estimate(*data["change"]),
        _by_class(data["classes"]),
    )


def _by_class(counts: Mapping[str, int]) -> dict[int, int]:
    return {int(number): count for number, count in counts.items()}
