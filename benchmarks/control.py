"""Compare rows of the table with training from scratch and with other pruners.

    python -m benchmarks.control --rows nano --seeds 0 1 2
    python -m benchmarks.control --print

Controls for a row that `benchmarks.table` has computed, with the same data and seeds:

- `scratch`: the widths that slimming found, trained from random weights for the same total of epochs;
- `uniform`: the dense network scaled down uniformly to the same budget, trained likewise;
- `half`: slimming with half of those epochs after stage 1;
- `bn-scale`, `magnitude`, `taylor`: torch-pruning's own pruners, run iteratively and trained alike.

Results are added to `checkpoints/results.json`; existing results are not computed again.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
import models
import train_yournet
from benchmarks.peers import KINDS, Peer, cost, regularized
from benchmarks.results import percent
from benchmarks.table import (
    arguments,
    changed_results,
    fingerprint,
    known_runs,
    measured,
    read_results,
    recipe,
    side_by_side,
    train,
)
from eval.cli import ROOT, use_threads
from eval.metrics import EVALUATION_BATCH
from pruning import PruningError, SlimConfig, cli, load
from pruning.cli.build import slim_config
from pruning.training import TrainConfig, accuracy, cross_entropy, fit

FROM_SCRATCH = ("scratch", "uniform")
ALL = ("half", *FROM_SCRATCH, *KINDS)


def main() -> None:
    parser = arguments(__doc__ or "", [0, 1, 2])
    parser.set_defaults(rows=["nano", "small", "caffe"])
    parser.add_argument("--kinds", nargs="+", choices=ALL, default=ALL, help="controls to run")
    args = parser.parse_args()
    if not args.print:
        side_by_side(args.jobs, fill, itertools.product([args], args.rows, args.seeds, args.kinds))
    print(markdown(read_results(args.checkpoints)))


def fill(args: argparse.Namespace, row: str, seed: int, kind: str) -> None:
    """Run one control and store its result, unless the file has it already."""
    use_threads(args.threads)
    path = recipe(args.checkpoints, row)
    content = read_results(args.checkpoints)
    ours = known_runs(content, row, args.data, fingerprint(path))
    if not ours:
        raise PruningError(f"row {row!r} has no results: run python -m benchmarks.table --rows {row} first")
    entry = {"row": row, "kind": kind, "seed": seed, "dataset": args.data, "recipe": fingerprint(path)}
    if any(entry.items() <= old.items() for old in content["controls"]):
        return
    print(f"{row}, {kind}, seed {seed}", flush=True)
    epochs = max(run["epochs"] for run in ours)
    found = half(args, path, seed, epochs) if kind == "half" else trained(path, seed, kind, args.data, epochs)
    with changed_results(args.checkpoints) as content:
        content["controls"].append({**entry, **found})


def half(args: argparse.Namespace, path: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Run slimming with half of the epochs of training from scratch after stage 1."""
    config = slim_config(train_yournet.arguments(["--recipe", str(path)]))
    rest = max(1, epochs // 2 - config.prune.iterations * config.prune.recover.epochs)
    folder = args.runs / "control" / path.parent.name / f"half-{seed}"
    flags = ["--recipe", str(path), "--seed", str(seed), "--data", args.data, "--finetune-epochs", str(rest)]
    train(folder, flags, args.threads)
    return measured(folder / "best.pth", args.data)


def trained(path: Path, seed: int, kind: str, dataset: str, epochs: int) -> dict[str, Any]:
    """Train a network of another method with the same budget and epochs, and measure it."""
    args = train_yournet.arguments(["--recipe", str(path), "--data", dataset])
    config = slim_config(args)
    splits = data.load(dataset, ROOT / "data", quiet=True)
    calibration = splits.calibration()
    example = calibration[0][0][:8]
    augment = data.augmentation(args.augment)
    batches = splits.batches("train", args.batch_size, shuffle=True, augment=augment)
    validation = splits.batches("validation", EVALUATION_BATCH)

    def learn(net: nn.Module, how: TrainConfig, **options: Any) -> nn.Module:
        return fit(net, batches, how, validate=lambda m: accuracy(m, validation), label=kind, **options)

    torch.manual_seed(seed)
    dense = models.start(args.start, splits.image_shape, splits.classes)
    asked = config.counts.resolve(cost(dense, example))
    try:
        if kind in FROM_SCRATCH:
            if kind == "scratch":
                config_found: dict[str, Any] = load(path.with_name("best.pth")).config  # type: ignore[assignment]
                net = type(dense)(**{**config_found, "batch_norm": True})
            else:
                net = scaled_down(dense, lambda m: not asked.excess(cost(m, example)))
            learn(net, replace(config.finetune, epochs=epochs), keep_best=True)
        else:
            net = dense
            with_peer(net, kind, config, example, calibration, learn, epochs)
    except PruningError as error:
        return {"refused": str(error)}
    costs = cost(net, example)
    return {
        "accuracy": accuracy(net, splits.batches("test", EVALUATION_BATCH)),
        "validation": accuracy(net, validation),
        "params": costs.params,
        "macs": costs.macs,
        "macs_with_bias": costs.macs_with_bias,
        "widths": list(net.widths),
        "epochs": epochs,
    }


def with_peer(
    net: nn.Module,
    kind: str,
    config: SlimConfig,
    example: torch.Tensor,
    calibration: list[Any],
    learn: Callable[..., nn.Module],
    epochs: int,
) -> None:
    """Train, prune iteratively and fine-tune a network in place with a pruner of torch-pruning."""
    loss = regularized(cross_entropy) if kind == "bn-scale" else cross_entropy
    learn(net, config.sparsify, loss=loss)
    Peer(kind, net, example, calibration).iterate(config, lambda: learn(net, config.prune.recover))
    spent = config.sparsify.epochs + config.prune.iterations * config.prune.recover.epochs
    learn(net, replace(config.finetune, epochs=max(0, epochs - spent)), keep_best=True)


def scaled_down(start: Any, fits: Callable[[nn.Module], bool]) -> Any:
    """Return the start with all widths times the largest factor that meets the budget."""

    def made(thousandths: int) -> Any:
        def scale(value: Any) -> Any:
            if isinstance(value, list):
                return [scale(item) for item in value]
            return max(1, round(value * thousandths / 1000))

        widths = {
            key: scale(start.config[key]) for key in ("conv", "hidden", "stages") if key in start.config
        }
        return type(start)(**{**start.config, **widths})

    # No width falls as the factor rises, so neither do the costs: bisect for the largest factor that fits.
    fitting = bisect.bisect_left(range(1, 1001), True, key=lambda factor: not fits(made(factor)))
    if not fitting:
        raise PruningError("one channel in every layer already exceeds the budget")
    return made(fitting)


def markdown(content: dict[str, Any]) -> str:
    """Format a table of the rows, each with its controls."""
    lines = [
        "| row | network | widths | params | MACs | accuracy % | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {row["row"]: row for row in content["rows"]}
    for name in dict.fromkeys(entry["row"] for entry in content["controls"]):
        current = rows[name]["recipe"]
        lines.append(_line(name, "ours", rows[name]["runs"]))
        for kind in ALL:
            runs = [
                entry
                for entry in content["controls"]
                if (entry["row"], entry["kind"], entry["recipe"]) == (name, kind, current)
            ]
            reached = [run for run in runs if "refused" not in run]
            if reached:
                lines.append(_line(name, kind, reached))
            elif runs:
                lines.append(f"| {name} | {kind} | – | – | – | budget not reached | {len(runs)} |")
    return "\n".join(lines)


def _line(row: str, kind: str, runs: list[dict[str, Any]]) -> str:
    widths = "-".join(map(str, runs[0]["widths"]))
    return (
        f"| {row} | {kind} | {widths} | {runs[0]['params']:,} | {runs[0]['macs']:,} | "
        f"{percent([run['accuracy'] for run in runs])} | {len(runs)} |"
    )


if __name__ == "__main__":
    cli.run(main)
