"""Slim the paper's networks for 32 x 32 images to half of their MACs in a few epochs: docs/paper.md.

    python -m benchmarks.paper                      # all seven: two hours on one core
    python -m benchmarks.paper --models resnet20 --data mnist5k
    python -m benchmarks.paper --print              # existing results, as Markdown

Each run is `python -m pruning slim --config recipes/short.toml --model models:NAME`; an interrupted
run is resumed. The dense network is measured after stage 1, with the weights from which pruning
starts. Networks with existing results are not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import data
from benchmarks.results import read_json, write_json
from eval.cli import ROOT
from eval.metrics import EVALUATION_BATCH
from pruning import cli, load
from pruning.planning import count
from pruning.training import accuracy
from pruning.utils.files import replace_file

NAMES = ("resnet20", "resnet56", "mobilenet_v2", "vgg16", "vgg19", "densenet40", "resnet164")
RECIPE = ROOT / "recipes" / "short.toml"
SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="networks to slim"
    )
    parser.add_argument("--data", choices=data.NAMES, default="fashion-mnist", help="data set")
    parser.add_argument("--train", type=cli.whole_number(1), default=4000, help="training images")
    parser.add_argument("--validation", type=cli.whole_number(1), default=1000, help="validation images")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paper", help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "paper.json", help="results, as JSON"
    )
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "paper.md", help="table, as Markdown")
    parser.add_argument("--print", action="store_true", help="only print existing results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = read_json(args.results, {})
    for name in () if args.print else args.models:
        print(name, flush=True)
        if name not in results:
            results[name] = slimmed(name, args)
            write_json(args.results, results, sort_keys=True)
    if not args.print:
        replace_file(args.table, markdown(results).encode())
    print(markdown(results))


def slimmed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Slim a network, and measure the dense and the slim network on the test split."""
    folder = args.runs / name
    images = {"name": args.data, "size": SIZE, "train": args.train, "validation": args.validation}
    shape = f"image_shape=[1,{SIZE},{SIZE}]"
    command = ["--config", str(RECIPE), "--model", f"models:{name}", "--model-arg", shape]
    command += ["--data-arg", *(f"{key}={value}" for key, value in images.items())]
    command += ["--threads", str(args.threads), "--output", str(folder)]
    if (folder / "config.json").exists():
        command.append("--resume")
    subprocess.run([sys.executable, "-m", "pruning", "slim", *command], check=True, cwd=ROOT)
    test = data.loaders(args.data, batch_size=EVALUATION_BATCH, size=SIZE)[2]
    found: dict[str, Any] = {"data": images}
    for kind, file in (("dense", "sparsified.pth"), ("slim", "best.pth")):
        net = load(folder / file)
        cost = count(net, next(iter(test))[0][:1])
        found[kind] = {"accuracy": accuracy(net, test), "params": cost.params, "macs": cost.macs}
    return found


def markdown(results: dict[str, Any]) -> str:
    """Format the table, after a description of the runs."""
    lines = [
        "# The paper's networks, in a few epochs",
        "",
        "Each slimmed to 50 % of its MACs by `recipes/short.toml`: three epochs with the pull on the "
        "scales, two pruning steps with an epoch after each, three epochs of fine-tuning. Made by "
        "`python -m benchmarks.paper`, one run each; accuracies on all test images. The dense network is "
        "the one that pruning began with, which was trained for less long: the slim one may be ahead of it. "
        "These runs show that the stages work on these networks, not what they can reach; the recipes for "
        "CIFAR-10 train as the paper does.",
        "",
        "| network | images | params | | MACs | | accuracy %, after stage 1 | slim |",
        "|" + "---|" * 8,
    ]
    for name in filter(results.__contains__, NAMES):
        found = results[name]
        dense, slim = found["dense"], found["slim"]
        cells = [
            name,
            f"{found['data']['train']:,} of {found['data']['name']}",
            *(f"{dense[k]:,} | {slim[k] / dense[k]:.0%}" for k in ("params", "macs")),
            *(f"{100 * each['accuracy']:.2f}" for each in (dense, slim)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
