"""Compare MACs and time at equal accuracy: slimming and torch-pruning's BNScalePruner at several budgets.

    python -m benchmarks.equal_accuracy                 # on the embedded digits
    MNIST_DIR=... python -m benchmarks.equal_accuracy --data mnist

Both prune the same LeNet-5 with equal epochs per stage on the same batches (sides `ours` and `memory` of
`benchmarks.pipeline`) and rank channels over all layers. Accuracy is the mean over seeds on the test
split. Each network of torch-pruning is compared with the point of equal accuracy on our curve, which is
interpolated between the two neighboring budgets, linearly in the logarithm of the cost. Times are of
forward passes in eager PyTorch with BatchNorm folded; all networks are timed in turns.

Writes benchmarks/equal_accuracy.json and benchmarks/equal_accuracy.md, and prints the latter.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import data
import models
from benchmarks import results, timing
from benchmarks.pipeline import MEMORY, OURS, SETTINGS, heading, in_process, settings_parser
from eval.cli import ROOT
from pruning import cli
from pruning.checkpoint import provenance
from pruning.deploy import time_forward
from pruning.report.pareto import Point, front

BATCHES = (1, 64)


def main() -> None:
    args = arguments()
    machine, runs = timing.machine(), []
    for seed in range(args.repeats):
        for budget in args.budgets:
            for side in (OURS, MEMORY):
                one = argparse.Namespace(**vars(args), max_macs=budget)
                runs.append({"side": side, "budget": budget, "seed": seed, **in_process(side, seed, one)})
                print(
                    f"{side}, {budget}, seed {seed}: {runs[-1]['macs']:,} MACs", file=sys.stderr, flush=True
                )
    for run, times in zip(runs, forward_times(runs, args), strict=True):
        run["milliseconds"] = times
    points = {side: [summary(runs, side, budget) for budget in args.budgets] for side in (OURS, MEMORY)}
    result = {
        "settings": {key: getattr(args, key) for key in SETTINGS if key != "max_macs"},
        "machine": machine,
        "points": points,
        "at equal accuracy": [at_equal_accuracy(point, points[OURS]) for point in points[MEMORY]],
        "runs": runs,
        "provenance": provenance(),
    }
    results.write(args.output, result, markdown(result))


def arguments() -> argparse.Namespace:
    parser = settings_parser(__doc__ or "", "equal_accuracy")
    parser.set_defaults(ranking="global")
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=["8%", "12%", "18%", "27%", "40%"],
        metavar="MACS",
        help="budgets on MACs",
    )
    parser.add_argument("--seconds", type=cli.number(0.01), default=30.0, help="duration of each measurement")
    return parser.parse_args()


def forward_times(runs: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, float]]:
    """Measure the milliseconds per image of the network of every run, by batch size."""
    shape = data.load(args.data, ROOT / "data", quiet=True).image_shape
    networks = {
        str(i): models.YourNet(run["widths"][:2], run["widths"][2:], image_shape=shape)
        for i, run in enumerate(runs)
    }
    times: list[dict[str, float]] = [{} for _ in runs]
    for size in BATCHES:
        found = time_forward(networks, torch.randn(size, *shape), seconds=args.seconds)
        for row, latency in zip(times, found.values(), strict=True):
            row[str(size)] = round(latency.median, 5)
    return times


def summary(runs: Sequence[dict[str, Any]], side: str, budget: str) -> dict[str, Any]:
    """Summarize the seeds of a side at a budget: all accuracies, and the means of the costs."""
    chosen = [run for run in runs if (run["side"], run["budget"]) == (side, budget)]
    return {
        "budget": budget,
        "accuracy": [run["accuracy"] for run in chosen],
        "params": round(statistics.mean(run["params"] for run in chosen)),
        "MACs": round(statistics.mean(run["macs"] for run in chosen)),
        **{
            f"ms, batch {size}": round(statistics.mean(run["milliseconds"][str(size)] for run in chosen), 5)
            for size in BATCHES
        },
    }


COSTS = ("params", "MACs", *(f"ms, batch {size}" for size in BATCHES))


def at_equal_accuracy(point: dict[str, Any], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return our costs at the accuracy of a point divided by those of the point; None beyond our curve."""
    wanted = statistics.mean(point["accuracy"])
    found: dict[str, Any] = {"budget": point["budget"], "accuracy": wanted}
    for key in COSTS:
        curve = front([Point(each[key], statistics.mean(each["accuracy"])) for each in ours])
        accuracies = [each.accuracy for each in curve]
        if accuracies[0] <= wanted <= accuracies[-1]:
            cost = math.exp(np.interp(wanted, accuracies, [math.log(each.cost) for each in curve]))
            found[key] = round(cost / point[key], 3)
        else:
            found[key] = None
    return found


def markdown(result: dict[str, Any]) -> str:
    """Format the result as tables."""
    lines = [heading(result, "several budgets of MACs"), ""]
    names = {OURS: "ours", MEMORY: "torch-pruning"}
    rows = [
        [
            names[side],
            point["budget"],
            results.percent(point["accuracy"]),
            *(_shown(point[key]) for key in COSTS),
        ]
        for side, points in result["points"].items()
        for point in points
    ]
    lines += results.table(["side", "budget of MACs", "accuracy %", *COSTS], rows)
    lines += ["What ours costs at the accuracy of torch-pruning's network, divided by what that costs:", ""]
    rows = [
        [
            found["budget"],
            f"{100 * found['accuracy']:.2f}",
            *("beyond our curve" if found[key] is None else f"{found[key]:.2f}" for key in COSTS),
        ]
        for found in result["at equal accuracy"]
    ]
    lines += results.table(["budget of torch-pruning", "accuracy %", *COSTS], rows)
    return "\n".join(lines).rstrip() + "\n"


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    cli.run(main)
