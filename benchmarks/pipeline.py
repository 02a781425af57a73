"""Compare the whole pipeline with torch-pruning's: sparsity training, iterative pruning, fine-tuning.

    python -m benchmarks.pipeline                       # on the embedded digits
    MNIST_DIR=... python -m benchmarks.pipeline --data mnist

Four sides prune the same LeNet-5 with BatchNorm to the same budget, with the same share of every
group (so all of them train networks of about the same widths) and with the same number of epochs per
stage, batch size, learning rates and threads:

- ours: `pruning.slim` on batches indexed from tensors in memory;
- loader 0, loader 2: torch-pruning's BNScalePruner in a plain training loop on torchvision's
  MNIST (ToTensor, Normalize), with a DataLoader of 0 or 2 workers;
- memory: the same loop on our batches.

Ours is compared with the faster loader. Each run has its own process; the sides run in turns, each
repeat with another seed. Time covers the whole pipeline, from reading the data to the fine-tuned
network, without imports; CPU time includes workers; memory is the peak of the main process. All sides
validate after every epoch; accuracy is that of the epoch that is best on the validation split, on the
test split. Params and MACs are with BatchNorm folded.

Writes benchmarks/pipeline.json and benchmarks/pipeline.md, and prints the latter.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

import data
import models
from benchmarks import results, timing
from benchmarks.peers import Peer, cost
from benchmarks.process import peak_memory, run_module
from eval.cli import ROOT, use_threads
from eval.metrics import EVALUATION_BATCH
from pruning import Budget, PruningError, SlimConfig, cli, slim
from pruning.checkpoint import provenance
from pruning.planning.options import RANKINGS
from pruning.stages import PruneConfig
from pruning.training import TrainConfig, accuracy

OURS, LOADERS, MEMORY = "ours", {"loader 0": 0, "loader 2": 2}, "memory"
SIDES = (OURS, *LOADERS, MEMORY)
#: The settings of a run, besides its side and seed.
SETTINGS = (
    "data",
    "max_macs",
    "ranking",
    "sparsify_epochs",
    "iterations",
    "recover_epochs",
    "finetune_epochs",
    "batch_size",
    "threads",
)
#: The figures of a run that are summarized, and their column headings.
COLUMNS = {"seconds": "s", "cpu seconds": "CPU s", "memory": "MB"}


def main() -> None:
    args = arguments()
    if args.side is not None:
        print(json.dumps(run(args)))
        return
    machine, runs = timing.machine(), []
    for seed in range(args.repeats):
        first = seed % len(args.sides)  # rotate the order of the sides
        for side in (*args.sides[first:], *args.sides[:first]):
            runs.append({"side": side, "seed": seed, **in_process(side, seed, args)})
            print(f"{side}, seed {seed}: {runs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    result = {
        "settings": {key: getattr(args, key) for key in SETTINGS},
        "machine": machine,
        "sides": {side: summary([each for each in runs if each["side"] == side]) for side in args.sides},
        "ratios": ratios(runs),
        "runs": runs,
        "provenance": provenance(),
    }
    results.write(args.output, result, markdown(result))


def arguments() -> argparse.Namespace:
    parser = settings_parser(__doc__ or "", "pipeline")
    parser.add_argument(
        "--max-macs",
        default="25%",
        metavar="MACS",
        help="budget of the result (train_yournet.py: 24 %%)",
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="sides to run")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one run, in this process
    parser.add_argument("--seed", type=cli.seed, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser of a run's settings without the budget; results go to `benchmarks/{name}.json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=cli.HelpFormatter)
    parser.add_argument("--data", choices=data.NAMES, default="mnist5k", help="data set")
    parser.add_argument(
        "--ranking", choices=RANKINGS, default="group", help="rank channels by group, or over all layers"
    )
    for stage, epochs in {"sparsify": 4, "recover": 1, "finetune": 10}.items():
        parser.add_argument(
            f"--{stage}-epochs", type=cli.whole_number(1), default=epochs, help="epochs of this stage"
        )
    parser.add_argument("--iterations", type=cli.whole_number(1), default=5, help="pruning steps")
    parser.add_argument("--batch-size", type=cli.whole_number(2), default=64, help="batch size of training")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads")
    parser.add_argument("--repeats", type=cli.whole_number(1), default=3, help="number of runs of each side")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / f"{name}.json", help="results, as JSON and .md"
    )
    return parser


def in_process(side: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side with one seed in its own process."""
    settings = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in SETTINGS]
    try:
        return run_module("pipeline", [*settings, f"--side={side}", f"--seed={seed}"])
    except PruningError as error:
        raise PruningError(f"{side}, seed {seed} failed: {error}") from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run one side; return its time, memory, accuracy and costs."""
    use_threads(args.threads)
    started, processor = time.perf_counter(), os.times()
    dataset = data.load(args.data, ROOT / "data", quiet=True)
    calibration = dataset.calibration()
    torch.manual_seed(args.seed)
    dense = models.start("lenet5", dataset.image_shape, dataset.classes)
    config = settings(args)
    stages: dict[str, float] = {}

    def ended(line: str) -> None:
        if line.startswith("stage"):
            stages[line.partition(",")[0]] = round(time.perf_counter() - started, 2)

    train, validation = splits(dataset, args)
    validate = partial(accuracy, batches=validation)
    if args.side == OURS:
        slimmed = slim(dense, train, config=config, validate=validate, calibration=calibration, log=ended)
        net = slimmed.model
    else:
        net = dense
        with_torch_pruning(net, train, config, validate, calibration[0][0][:8], ended)
    seconds = time.perf_counter() - started
    del train, validation, validate  # ends the workers of a loader, so that their CPU time is counted
    used = sum(os.times()[:4]) - sum(processor[:4])
    costs = cost(net, calibration[0][0][:8])
    return {
        "seconds": round(seconds, 2),
        "seconds until the end of": stages,
        "cpu seconds": round(used, 2),
        "memory": round(peak_memory()),
        "accuracy": accuracy(net, dataset.batches("test", EVALUATION_BATCH)),
        "params": costs.params,
        "macs": costs.macs,
        "widths": list(net.widths),  # type: ignore[arg-type]
    }


def settings(args: argparse.Namespace) -> SlimConfig:
    """Return the default settings of slimming with the requested numbers of epochs."""
    config = SlimConfig.within(Budget(macs=args.max_macs))
    recover = replace(config.prune.recover, epochs=args.recover_epochs)
    return replace(
        config,
        sparsify=replace(config.sparsify, epochs=args.sparsify_epochs),
        prune=PruneConfig(args.iterations, recover, ranking=args.ranking),
        finetune=replace(config.finetune, epochs=args.finetune_epochs),
    )


class Images(MNIST):
    """torchvision's MNIST on one of our splits; items are built by the code of the original."""

    def __init__(self, split: data.Split, transform: Callable[[Any], torch.Tensor]):
        self.data, self.targets = split.images[:, 0], split.labels
        self.transform, self.target_transform = transform, None


def splits(dataset: data.Dataset, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the training and validation batches of a side."""
    if args.side not in LOADERS:
        train = dataset.batches("train", args.batch_size, shuffle=True)
        return train, dataset.batches("validation", EVALUATION_BATCH)
    normalize = transforms.Normalize(**dataset.normalization)
    prepare = transforms.Compose([transforms.ToTensor(), normalize])
    workers = LOADERS[args.side]
    loader: Callable[..., Any] = partial(DataLoader, num_workers=workers, persistent_workers=workers > 0)
    train = loader(Images(dataset.train, prepare), args.batch_size, shuffle=True, drop_last=True)
    return train, loader(Images(dataset.validation, prepare), EVALUATION_BATCH)


def with_torch_pruning(
    net: nn.Module,
    batches: Any,
    config: SlimConfig,
    validate: Callable[[nn.Module], float],
    example: torch.Tensor,
    ended: Callable[[str], None],
) -> None:
    """Run the three stages with BNScalePruner, in place."""
    peer = Peer("bn-scale", net, example, ranking=config.prune.ranking)
    learn = partial(plain, net, batches, validate)
    learn(config.sparsify, regularize=peer.pruner.regularize)
    ended("stage 1, sparsify")
    peer.iterate(config, lambda: learn(config.prune.recover))
    ended("stage 2, prune")
    learn(config.finetune, keep_best=True)
    ended("stage 3, fine-tune")


def plain(
    net: nn.Module,
    batches: Any,
    validate: Callable[[nn.Module], float],
    how: TrainConfig,
    *,
    regularize: Callable[[nn.Module], None] = lambda net: None,
    keep_best: bool = False,
) -> None:
    """Train by a plain loop, as users of torch-pruning write it."""
    optimizer = torch.optim.SGD(
        net.parameters(), how.peak, momentum=how.momentum, nesterov=True, weight_decay=how.weight_decay
    )
    total = how.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: how.rate(step / total))
    best, weights = -1.0, None
    for _ in range(how.epochs):
        net.train()
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            regularize(net)
            optimizer.step()
            schedule.step()
        reached = validate(net)
        if keep_best and reached >= best:
            best, weights = reached, copy.deepcopy(net.state_dict())
    if weights is not None:
        net.load_state_dict(weights)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of one side, and the accuracy of every run."""
    medians = {key: round(statistics.median(run[key] for run in runs), 2) for key in COLUMNS}
    return {
        **medians,
        "accuracy": [run["accuracy"] for run in runs],
        **{key: round(statistics.median(run[key] for run in runs)) for key in ("params", "macs")},
    }


def ratios(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return ours divided by every other side: median, minimum and maximum over the repeats."""
    found: dict[str, dict[str, list[float]]] = {}
    by_side: dict[str, list[dict[str, Any]]] = {}
    for each in sorted(runs, key=lambda each: each["seed"]):
        by_side.setdefault(each["side"], []).append(each)
    for side in [side for side in by_side if side != OURS and OURS in by_side]:
        pairs = list(zip(by_side[OURS], by_side[side], strict=True))
        for key in COLUMNS:
            values = [ours[key] / other[key] for ours, other in pairs if other[key]]
            if values:
                spread = [statistics.median(values), min(values), max(values)]
                found.setdefault(side, {})[key] = [round(value, 3) for value in spread]
    return found


def heading(result: dict[str, Any], limit: str) -> str:
    """Describe the settings and the machine of the runs."""
    asked = result["settings"]
    return (
        f"{asked['data']}, batch {asked['batch_size']}, {asked['threads']} "
        f"thread{'s' * (asked['threads'] > 1)}, {limit}, ranking {asked['ranking']}; epochs: "
        f"{asked['sparsify_epochs']} of stage 1, {asked['recover_epochs']} after each of "
        f"{asked['iterations']} pruning steps, {asked['finetune_epochs']} of fine-tuning. "
        f"{timing.described(result['machine'])}."
    )


def markdown(result: dict[str, Any]) -> str:
    """Format the result as tables."""
    lines = [heading(result, f"at most {result['settings']['max_macs']} of the MACs"), ""]
    rows = []
    for side, found in result["sides"].items():
        figures = [f"{found[key]:,.1f}" for key in COLUMNS] + [results.percent(found["accuracy"])]
        sizes = [f"{found[key]:,}" for key in ("params", "macs")]
        rows.append([side, *figures, *sizes, str(len(found["accuracy"]))])
    heads = ["side", *COLUMNS.values(), "accuracy %", "params", "MACs", "runs"]
    lines += results.table(heads, rows)
    heads = ["ours ÷", *(f"{head} (least to most)" for head in COLUMNS.values())]
    rows = [
        [side, *(timing.shown(found[key]) if key in found else "–" for key in COLUMNS)]
        for side, found in result["ratios"].items()
    ]
    if rows:
        lines += results.table(heads, rows)
    loaders = {side: found["seconds"] for side, found in result["sides"].items() if side in LOADERS}
    if loaders and OURS in result["sides"]:
        quicker = min(loaders, key=loaders.__getitem__)
        share = result["ratios"][quicker]["seconds"][0]
        lines += [f"Ours takes {share:.2f} of the time of torch-pruning with the quicker loader ({quicker})."]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    cli.run(main)
