"""Measure the sensitivity of LeNet-5 at every width, and compare predicted with measured losses of plans.

    python -m benchmarks.sensitivity

Trains LeNet-5 through stage 1 by the recipe of train_yournet.py, analyses all its groups on the
validation split, and compares the plan of the curves with the Taylor plan at several budgets,
before any further training. Writes benchmarks/sensitivity.json and the figures
docs/sensitivity*.png and .svg.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import data
import models
import train_yournet
from benchmarks.results import write_json
from eval.cli import ROOT, use_threads
from pruning import Budget, cli, prune, sensitivity
from pruning.cli.build import slim_config
from pruning.planning import joint
from pruning.report.figures import save
from pruning.report.sensitivity_plots import lost_per_cost, sensitivity_curves, sensitivity_map
from pruning.stages.sparsify import sparsify
from pruning.training import accuracy

BUDGETS = ("75%", "50%", "35%", "25%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--data", choices=data.NAMES, default="auto", help="data set")
    parser.add_argument(
        "--widths", type=cli.whole_number(1), help="number of widths to measure for each group (default: all)"
    )
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads")
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="seed of the weights and the order of images"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT,
        metavar="FOLDER",
        help="folder that receives benchmarks/ and docs/",
    )
    args = parser.parse_args()
    use_threads(args.threads)
    dataset = data.load(args.data, ROOT / "data")
    calibration = dataset.calibration()
    validation = list(dataset.batches("validation", 500))
    example = calibration[0][0][:8]
    config = slim_config(train_yournet.arguments([]))
    torch.manual_seed(args.seed)
    net = models.start("lenet5", dataset.image_shape, dataset.classes)
    batches = dataset.batches("train", 64, shuffle=True)
    sparsify(net, batches, config.sparsify, example, budget=config.counts, label="stage 1")

    started = time.perf_counter()
    found = sensitivity(net, example, validation, calibration=calibration, widths=args.widths, score="taylor")
    seconds = time.perf_counter() - started
    plans: list[dict[str, Any]] = []
    for share in BUDGETS:
        budget = Budget(params=share, macs=share)
        whole = joint(net, example, budget, found, validation, calibration=calibration)
        taylor = prune(net, example, budget, calibration=calibration)
        plans.append(
            {
                "budget": str(budget),
                "predicted_loss": whole.predicted_loss,
                "measured_loss": whole.measured["recalibrated"].loss,
                "accuracy": whole.measured["recalibrated"].accuracy,
                "widths": whole.plan.widths,
                "taylor_accuracy": accuracy(taylor.model, validation),
                "taylor_widths": taylor.plan.widths,
            }
        )
    result = {
        "dataset": dataset.name,
        "images": len(dataset.validation.labels),
        "points": len(found.points),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "dense": {"loss": found.dense.loss, "accuracy": found.dense.accuracy},
        "plans": plans,
    }
    print(write_json(args.output / "benchmarks" / "sensitivity.json", result), end="")
    for name, figure in {
        "sensitivity": sensitivity_curves(found),
        "sensitivity-map": sensitivity_map(found),
        "sensitivity-cost": lost_per_cost(found),
    }.items():
        save(figure, args.output / "docs" / name)


if __name__ == "__main__":
    cli.run(main)
