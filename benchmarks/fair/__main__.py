"""Compute cells and draw the page; see `benchmarks.fair`."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import benchmarks.fair
import data
from benchmarks.fair.cells import WHOLE, Cell, Results, locked
from benchmarks.fair.measure import result
from benchmarks.fair.methods import METHODS
from benchmarks.fair.page import draw
from benchmarks.fair.recipes import NETWORKS, RECIPES, Recipe
from benchmarks.fair.training import Workshop
from benchmarks.table import side_by_side
from eval.cli import ROOT, use_threads
from pruning import Budget, PruningError, cli
from pruning.deploy.runtimes import require_package

#: Seconds between two looks at cells that other processes compute.
POLL = 5.0


def main() -> None:
    args = arguments()
    results = Results(args.results)
    if not args.draw:
        require_package("onnxruntime")
        for name in args.networks:
            results.require_settings(name, settings(name, args))
        side_by_side(args.jobs, work, [(args,)] * args.jobs)
    print(draw(results.read(), args.page))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fair",
        description=benchmarks.fair.__doc__,
        formatter_class=cli.HelpFormatter,
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["resnet8", "plain"],
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}, or module:factory",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME",
        help=f"of {', '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", nargs="+", type=share, default=["50%", "30%"], metavar="SHARE", help="MACs to keep"
    )
    parser.add_argument(
        "--seeds", type=cli.whole_number(0), nargs="+", default=[0, 1, 2], help="seeds to run"
    )
    parser.add_argument("--data", choices=data.NAMES, default="cifar10", help="data set")
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / "data", metavar="FOLDER", help="folder of the data set"
    )
    parser.add_argument("--jobs", type=cli.whole_number(1), default=1, help="cells at the same time")
    parser.add_argument("--threads", type=cli.whole_number(1), default=1, help="CPU threads of each job")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; times are always those of a CPU")
    parser.add_argument(
        "--seconds", type=cli.number(0.01), default=4.0, help="duration of the timing of a cell"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "fair.json", metavar="FILE", help="results"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "fair", metavar="FOLDER", help="folder of the trainings"
    )
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "fair.md", metavar="FILE", help="page, as Markdown"
    )
    parser.add_argument("--draw", action="store_true", help="only draw existing results")
    recipe = parser.add_argument_group("training (default: the recipe of the network)")
    for name in ("epochs", "dense_epochs", "batch_size", "train", "cutout"):
        recipe.add_argument(f"--{name.replace('_', '-')}", type=cli.whole_number(1), metavar="N")
    for name in ("rate", "later_rate", "weight_decay"):
        recipe.add_argument(f"--{name.replace('_', '-')}", type=cli.number(0), metavar="X")
    recipe.add_argument("--bf16", action="store_true", default=None, help="forward passes in bfloat16")
    args = parser.parse_args()
    for name in args.networks:
        recipe_of(name, args)
    return args


def share(text: str) -> str:
    """Check a command-line argument that is a share of the MACs."""
    try:
        Budget(macs=text)
    except PruningError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share, for example 50%")
    return text


def recipe_of(name: str, args: argparse.Namespace) -> Recipe:
    """Return the recipe of a network, with what flags change."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Recipe)}
    return replace(
        RECIPES.get(name, Recipe()), **{k: value for k, value in given.items() if value is not None}
    )


def source(args: argparse.Namespace, recipe: Recipe) -> data.Dataset:
    """Return the data of a network, in memory on the device of the training."""
    found = data.load(args.data, args.data_dir, quiet=True)
    return replace(found, train=found.train.first(recipe.train)).to(args.device)


def key_of(found: data.Dataset) -> str:
    """Return the name of a data set with a hash of its pixels and labels: copies of a data set may differ."""
    content = hashlib.sha256()
    for split in (found.train, found.validation, found.test):
        for tensor in split:
            content.update(tensor.cpu().numpy().tobytes())
    return f"{found.name}-{content.hexdigest()[:8]}"


def settings(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a network, which all its cells share."""
    recipe = recipe_of(name, args)
    return {"data": key_of(source(args, recipe)), "device": args.device.split(":")[0], **asdict(recipe)}


def work(args: argparse.Namespace) -> None:
    """Compute the cells that are not complete and that no other process computes; wait for the others."""
    use_threads(args.threads)
    results = Results(args.results)
    for name in args.networks:
        recipe = recipe_of(name, args)
        found = source(args, recipe)
        workshop = Workshop(name, recipe, found, key_of(found), args.runs, args.device)
        pending = [
            Cell(name, method, WHOLE if method == "dense" else budget, seed)
            for seed, budget, method in itertools.product(args.seeds, args.budgets, METHODS)
            if method in args.methods
        ]
        pending = list(dict.fromkeys(pending))
        while pending:
            left = [cell for cell in pending if not done(cell, workshop, results, args)]
            if len(left) == len(pending):
                time.sleep(POLL)
            pending = left


def done(cell: Cell, workshop: Workshop, results: Results, args: argparse.Namespace) -> bool:
    """Compute a cell and what it needs; return False where another process computes one of these."""
    if results.find(cell) is not None:
        return True
    for method in METHODS[cell.method].needs:
        if not done(replace(cell, method=method), workshop, results, args):
            return False
    folder = workshop.folder(cell.method, cell.budget, cell.seed)
    # The dense network has a lock of its own, which the methods that begin with it take.
    with locked(folder / "measured" if cell.method == "dense" else folder, wait=False) as mine:
        if mine and results.find(cell) is None:
            print(f"{time.strftime('%H:%M')} {cell}", flush=True)
            results.add(cell, result(cell, workshop, folder, args.threads, args.seconds))
        return mine


if __name__ == "__main__":
    cli.run(main)
