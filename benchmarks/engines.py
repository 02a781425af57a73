"""Compare the training loop with Lightning Fabric and Accelerate: time per step and dependencies.

    pip install lightning accelerate
    python -m benchmarks.engines

The loops train LeNet-5 on the same batches, in turns, on one thread. Times are CPU times of this process,
which other programs on the machine disturb less than wall times. Engines that are not installed are left
out. Writes benchmarks/engines.json and prints it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import data
import models
from benchmarks.overhead import CONFIG, plain
from benchmarks.results import write_json
from eval.cli import ROOT, use_threads
from pruning import cli
from pruning.training import fit

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--data", choices=data.NAMES, default="auto", help="data set")
    parser.add_argument("--rounds", type=cli.whole_number(3), default=15, help="number of turns of each loop")
    parser.add_argument("--steps", type=cli.whole_number(1), default=40, help="training steps per turn")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "engines.json", help="the results")
    args = parser.parse_args()
    use_threads(1)
    dataset = data.load(args.data, ROOT / "data")
    batches = list(itertools.islice(dataset.batches("train", 64, shuffle=True), args.steps))
    torch.manual_seed(0)
    net = models.start("lenet5", dataset.image_shape, dataset.classes)
    print(write_json(args.json, measured(net, batches, args.rounds)), end="")


def measured(net: nn.Module, batches: Batches, rounds: int) -> dict[str, Any]:
    """Time all loops in turns, in random order, and return the figures."""
    loops: dict[str, Callable[[nn.Module, Batches], None]] = {"plain": plain, "fit": own}
    for name, (package, loop) in ENGINES.items():
        if importlib.util.find_spec(package) is not None:
            loops[name] = loop
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(loops), len(loops)):
            fresh = copy.deepcopy(net)
            started = time.process_time()
            loops[name](fresh, batches)
            if turn:  # the first turn warms up
                times[name].append(1000 * (time.process_time() - started) / len(batches))
    base = requirements("torch") | requirements("torchvision") | requirements("tqdm")
    found: dict[str, Any] = {}
    for name, values in times.items():
        quarters = statistics.quantiles(values, n=4)
        found[name] = {
            "CPU ms per step": round(statistics.median(values), 3),
            "quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
            "ratio to plain": round(statistics.median(values) / statistics.median(times["plain"]), 3),
        }
        if name in ENGINES:
            package = importlib.metadata.packages_distributions()[ENGINES[name][0]][0]
            found[name]["package"] = f"{package} {importlib.metadata.version(package)}"
            found[name]["more packages"] = sorted(requirements(package) - base)
    return found


def own(model: nn.Module, batches: Batches) -> None:
    """Train for an epoch by the toolkit's loop."""
    fit(model, batches, CONFIG)


def fabric(model: nn.Module, batches: Batches) -> None:
    """Train for an epoch by Lightning Fabric."""
    from lightning_fabric import Fabric

    engine = Fabric(accelerator="cpu", devices=1)
    net, optimizer = engine.setup(model, sgd(model))
    net.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        engine.backward(F.cross_entropy(net(inputs), targets))
        optimizer.step()


def accelerate(model: nn.Module, batches: Batches) -> None:
    """Train for an epoch by Accelerate."""
    from accelerate import Accelerator

    engine = Accelerator(cpu=True)
    net, optimizer = engine.prepare(model, sgd(model))
    net.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        engine.backward(F.cross_entropy(net(inputs), targets))
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)


#: By name, the module of an engine and a loop that uses it.
ENGINES: dict[str, tuple[str, Callable[[nn.Module, Batches], None]]] = {
    "Lightning Fabric": ("lightning_fabric", fabric),
    "Accelerate": ("accelerate", accelerate),
}


def requirements(name: str) -> set[str]:
    """Return an installed distribution and all that it requires, without extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        each = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if each in found:
            continue
        try:
            lines = importlib.metadata.requires(each) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(each)
        waiting += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return found


if __name__ == "__main__":
    cli.run(main)
