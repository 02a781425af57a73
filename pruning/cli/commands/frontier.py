"""`python -m pruning frontier`: prune to many budgets, and show what each loses before any training."""

from __future__ import annotations

import argparse

from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.frontier_flags import FrontierFlags
from pruning.errors import PruningError
from pruning.planning.budget import LABELS, PLACES, LatencyBudget
from pruning.planning.options import PlanOptions
from pruning.report.frontier_html import frontier_page
from pruning.stages.budget_sweep import frontier
from pruning.stages.frontier_result import Frontier, FrontierPoint
from pruning.training.batches import spread_examples


def execute(args: argparse.Namespace) -> None:
    flags = read_flags(FrontierFlags, args)
    model, data = build.network(args), build.required_data(args)
    example = build.examples(args, model, data)
    calibration = data.calibration(args.calibration)  # before any other use of random numbers, as in `prune`
    found = frontier(
        model,
        example,
        spread_examples(data.validation, flags.examples),
        limit=flags.limit,
        points=flags.points,
        budgets=flags.budgets,
        score=args.score,
        calibration=calibration,
        refit=args.refit,
        options=PlanOptions(
            args.ranking, floor=args.floor, most=args.most, multiple=args.multiple, alike=args.alike
        ),
        ignored=args.ignore,
        timing=_timing(args, flags),
        compare=flags.compare,  # type: ignore[arg-type]  # one of the choices
        outputs=args.outputs or None,
        folder=flags.output,
    )
    chosen = found.smallest(flags.drop)
    page = frontier_page(
        found, flags.output / "frontier.html", type(model).__name__, classes=data.classes, chosen=chosen
    )
    print(f"dense: {found.dense_cost}; {_judged(found)}")
    print(*(_line(found, point) for point in found.points), sep="\n")
    for budget in found.unreachable:
        print(f"{budget} cannot be reached; the least is {found.least:.1%} of the dense network")
    print(_answer(found, chosen, flags.drop))
    print(f"{page}: open it in a browser; {flags.output / 'frontier.json'} holds the same as data")


def _timing(args: argparse.Namespace, flags: FrontierFlags) -> LatencyBudget | None:
    """Return how networks are timed, if they are."""
    if flags.timed or flags.limit == "latency":
        return read_flags(LatencyBudget, args, limit="1x")
    if (args.runtime, args.runtime_batch, args.runtime_threads) != (PLACES[0], 1, 1):
        raise PruningError(
            "--runtime, --runtime-batch and --runtime-threads are for networks that are timed: add --timed, "
            "or --limit latency"
        )
    return None


def _judged(found: Frontier) -> str:
    """Describe what networks are judged by."""
    on = f"on {found.examples:,} validation examples, 95 % intervals"
    if found.metric == "accuracy":
        return f"accuracy {found.dense.metrics['accuracy'].value:.4f} {on}"
    named = {"agreement": "agreement with the dense network", "error": "relative error of the outputs"}
    return f"{named[found.metric]} {on}"


def _line(found: Frontier, point: FrontierPoint) -> str:
    """Describe a point."""
    metric = point.judgement.metrics.get(found.metric)
    reached = "outputs are not finite"
    if metric is not None:
        reached = f"{found.metric} {metric.value:.4f} ({metric.low:.4f} to {metric.high:.4f})"
    time = "" if point.latency is None else f", {point.latency}"
    return f"{point.budget:>8}: {point.cost}{time}, {reached}"


def _answer(found: Frontier, chosen: FrontierPoint | None, drop: float) -> str:
    """Return the line that says how much can be pruned."""
    loses = f"a relative error of at most {drop:g}" if found.metric == "error" else ""
    loses = loses or f"a drop of {found.metric} of at most {drop:g}"
    if chosen is None:
        return f"no point has {loses} with its whole interval; refit with --refit, or train after pruning"
    what = LABELS.get(found.limit, found.limit)
    return f"the smallest point with {loses}: {chosen.budget} ({found.share(chosen):.1%} of the {what})"
