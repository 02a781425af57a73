"""Measure the time that the toolkit adds to a training step of plain PyTorch, and the share of pruning.

    python -m benchmarks.overhead

The training loops are timed in turns on the same batches and networks; the machine should be idle
otherwise. Writes benchmarks/overhead.json and prints it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import data
import models
from benchmarks.results import write_json
from eval.cli import ROOT, use_threads
from pruning import Budget, cli, prune, trace
from pruning.stages import ScalePull
from pruning.training import TrainConfig, fit

CONFIG = TrainConfig(1, lr=0.01, weight_decay=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--starts", nargs="+", choices=models.STARTS, default=["lenet5", "compact"], help="networks to train"
    )
    parser.add_argument("--data", choices=data.NAMES, default="auto", help="data set")
    parser.add_argument("--rounds", type=cli.whole_number(3), default=9, help="number of turns of each loop")
    parser.add_argument("--steps", type=cli.whole_number(1), default=100, help="training steps per turn")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "overhead.json", help="the results"
    )
    args = parser.parse_args()
    use_threads(args.threads)
    dataset = data.load(args.data, ROOT / "data")
    batches = list(itertools.islice(dataset.batches("train", 64, shuffle=True), args.steps))
    calibration = dataset.calibration()
    result = {name: measured(name, dataset, batches, calibration, args.rounds) for name in args.starts}
    print(write_json(args.json, result), end="")


def measured(
    name: str, dataset: data.Dataset, batches: list[Any], calibration: list[Any], rounds: int
) -> dict[str, Any]:
    """Time all loops on one network in turns, and return the figures."""
    torch.manual_seed(0)
    net = models.start(name, dataset.image_shape, dataset.classes)

    def pulled(model: nn.Module) -> None:
        pull = ScalePull(model, trace(model, batches[0][0]), strength=0.01)
        pulling = time.perf_counter()
        fit(model, batches, CONFIG, after_step=pull.step)
        times["fit with the pull"].append((time.perf_counter() - pulling) / len(batches))

    loops: dict[str, Callable[[nn.Module], Any]] = {
        "plain": lambda model: plain(model, batches),
        "fit": lambda model: fit(model, batches, CONFIG),
        "fit, channels last": lambda model: fit(model, batches, replace(CONFIG, channels_last=True)),
    }
    times: dict[str, list[float]] = {key: [] for key in (*loops, "fit with the pull")}
    steps = []
    for _ in range(rounds):
        for key, loop in loops.items():
            fresh = copy.deepcopy(net)
            started = time.perf_counter()
            loop(fresh)
            times[key].append((time.perf_counter() - started) / len(batches))
        pulled(copy.deepcopy(net))
        started = time.perf_counter()
        prune(net, batches[0][0][:8], Budget(macs="80%"), calibration=calibration)
        steps.append(time.perf_counter() - started)
    median = {key: statistics.median(values) for key, values in times.items()}
    epoch = median["fit"] * (len(dataset.train.labels) // 64)
    return {
        "threads": torch.get_num_threads(),
        "ms per training step": {key: round(1000 * value, 3) for key, value in median.items()},
        "ratio to plain": {key: round(value / median["plain"], 3) for key, value in median.items()},
        "seconds of a pruning step": round(statistics.median(steps), 3),
        "share of an iteration with 2 epochs": round(statistics.median(steps) / (2 * epoch), 4),
    }


def plain(model: nn.Module, batches: list[Any]) -> None:
    """Train for an epoch by the loop of PyTorch's tutorials."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    cli.run(main)
