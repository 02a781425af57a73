"""The main job over several seeds, and beside it the control: the same widths from scratch.

    python -m benchmarks.seeds

Runs `train_yournet.py --seed N` for every seed, then trains the widths that it found from
random weights for as many epochs as all stages had together. Everything is measured on the
test split at the end; nothing is chosen by it. What is in the folder already is not run
again. Writes FOLDER/../seeds.json (by default benchmarks/seeds.json) and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import data
from eval.cli import ROOT, use_threads
from eval.metrics import EVALUATION_BATCH, measure
from eval.score import REFERENCE_ACCURACY, score
from models import LeNet5, YourNet
from pruning import TrainConfig, accuracy, cli, fit, fold_batchnorm, load, provenance, save, trace
from pruning.checkpoint import read, replace_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    whole = cli.whole_number(0)
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2, 3, 4], help="of the main job")
    parser.add_argument("--control-seeds", type=whole, nargs="*", default=[0, 1, 2], help="of the control")
    parser.add_argument("--data", choices=data.NAMES, default="auto", help="data set")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds", help="where the runs go")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "seeds.json", help="the results")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads in training")
    args = parser.parse_args()
    use_threads(args.threads)
    dataset = data.load(args.data, ROOT / "data")

    networks: dict[str, LeNet5] = {}
    for seed in args.seeds:
        folder = args.folder / str(seed)
        if not (folder / "best.pth").exists():
            go_on = ["--resume"] if (folder / "config.json").exists() else []
            run = [
                sys.executable,
                str(ROOT / "train_yournet.py"),
                "--seed",
                str(seed),
                "--data",
                dataset.name,
            ]
            run += ["--threads", str(args.threads), "--output", str(folder), *go_on]
            subprocess.run(run, check=True)
        networks[f"reference {seed}"] = load_lenet(folder / "reference.pth")
        networks[f"slimmed {seed}"] = load_lenet(folder / "best.pth")
    for seed in args.control_seeds:
        path = args.folder / str(seed) / "control.pth"
        if not path.exists():
            train_control(path, args.folder / str(seed) / "best.pth", seed, dataset)
        networks[f"control {seed}"] = load_lenet(path)

    rows = {row.model: row for row in measure(networks, dataset, seconds=2.0 * len(networks))}
    result: dict[str, object] = {"dataset": dataset.name, "notice": dataset.notice, "rows": []}
    for name, row in rows.items():
        kind, seed = name.split()
        reference = rows[f"reference {seed}"]
        a = REFERENCE_ACCURACY if dataset.name == "mnist" else reference.accuracy
        points = score(row, reference, a)
        entry = {**row.to_json(), "model": kind, "seed": int(seed), "widths": networks[name].widths}
        if kind != "reference":
            entry.update(score=points.capped, score_uncapped=points.uncapped, worse=points.worse)
        result["rows"].append(entry)  # type: ignore[attr-defined]
    replace_file(args.json, (json.dumps(result, indent=2) + "\n").encode())
    print(summary(result["rows"]))  # type: ignore[arg-type]


def load_lenet(path: Path) -> LeNet5:
    net = load(path)
    assert isinstance(net, LeNet5)
    return net


def train_control(path: Path, slimmed: Path, seed: int, dataset: data.Dataset) -> None:
    """Train the widths of a slimmed network from random weights, for as many epochs in all."""
    config = load_lenet(slimmed).config
    epochs = read(slimmed)["provenance"]["epochs"]
    torch.manual_seed(seed)
    net = YourNet(**{**config, "batch_norm": True})  # type: ignore[arg-type]
    validation = dataset.batches("validation", EVALUATION_BATCH)
    fit(
        net,
        dataset.batches("train", 64, shuffle=True),
        TrainConfig(epochs, lr=0.2, weight_decay=1e-3),
        validate=lambda model: accuracy(model, validation),
        keep_best=True,
        label=f"control {seed}",
    )
    folded = YourNet.like(fold_batchnorm(net, trace(net, next(iter(validation))[0][:8])))
    save(path, folded, provenance=provenance(seed=seed, dataset=dataset.name, epochs=epochs))


def summary(rows: list[dict]) -> str:
    """A Markdown table: mean ± standard deviation over the seeds of each kind."""
    lines = [
        "| network | seeds | accuracy % | params | MACs | ms per image | uncapped score |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("reference", "slimmed", "control"):
        chosen = [row for row in rows if row["model"] == kind]
        if chosen:
            columns = [
                spread([100 * row["accuracy"] for row in chosen], 2),
                spread([row["params"] for row in chosen], 0),
                spread([row["macs"] for row in chosen], 0),
                spread([row["infer_time_ms"] for row in chosen], 4),
                spread([row["score_uncapped"] for row in chosen], 1) if kind != "reference" else "60",
            ]
            lines.append(f"| {kind} | {len(chosen)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    mean = statistics.mean(values)
    if len(set(values)) == 1:
        return f"{mean:,.{digits}f}"
    return f"{mean:,.{digits}f} ± {statistics.stdev(values):,.{digits}f}"


if __name__ == "__main__":
    cli.run(main)
