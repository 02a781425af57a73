"""Compute cells and draw the page; see `benchmarks.fair`."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from dataclasses import replace
from pathlib import Path

import benchmarks.fair
from benchmarks.fair.cells import WHOLE, Cell, Results, locked
from benchmarks.fair.flags import add_training_flags, recipe_of, settings, share, workshop_of
from benchmarks.fair.measure import result, times
from benchmarks.fair.methods import METHODS, RESULT
from benchmarks.fair.page import draw
from benchmarks.fair.recipes import NETWORKS
from benchmarks.fair.training import Workshop
from benchmarks.table import side_by_side
from eval.cli import ROOT, use_threads
from pruning import cli
from pruning.deploy.runtimes import require_package
from pruning.utils.cluster import in_order

#: Seconds between two looks at cells that other processes compute.
POLL = 5.0


def main() -> None:
    args = arguments()
    results = Results(args.results)
    if not args.draw:
        require_package("onnxruntime")
        for name in args.networks:
            results.require_settings(name, settings(workshop_of(name, args)))
        if args.time:
            time_again(args)
        elif args.cluster is not None:
            for _ in in_order(functools.partial(job, args), range(args.jobs), args.cluster):
                pass
        else:
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
    parser.add_argument("--jobs", type=cli.whole_number(1), default=1, help="cells at the same time")
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="Ray cluster for the jobs, whose machines share these folders; local: workers of this machine",
    )
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
    parser.add_argument(
        "--time", action="store_true", help="time the networks of complete cells again, on a quiet machine"
    )
    parser.add_argument("--draw", action="store_true", help="only draw existing results")
    add_training_flags(parser)
    args = parser.parse_args()
    for name in args.networks:
        recipe_of(name, args)
    return args


def work(args: argparse.Namespace) -> None:
    """Compute the cells that are not complete and that no other process computes; wait for the others."""
    use_threads(args.threads)
    results = Results(args.results)
    workshops = {name: workshop_of(name, args) for name in args.networks}
    pending = cells(args)
    while pending:
        left = [cell for cell in pending if not done(cell, workshops[cell.network], results, args)]
        if len(left) == len(pending):
            time.sleep(POLL)
        pending = left


def job(args: argparse.Namespace, number: int) -> int:
    """Do the work of one job in a worker of a cluster; return the number of the job."""
    work(args)
    return number


def cells(args: argparse.Namespace) -> list[Cell]:
    """Return the cells that flags name, in the order in which they are computed."""
    every = itertools.product(args.networks, args.seeds, args.budgets, METHODS)
    found = [
        Cell(name, method, WHOLE if method == "dense" else budget, seed)
        for name, seed, budget, method in every
        if method in args.methods
    ]
    return list(dict.fromkeys(found))


def time_again(args: argparse.Namespace) -> None:
    """Time the networks of complete cells, where the folder of trainings still has them."""
    results = Results(args.results)
    for cell in cells(args):
        workshop = workshop_of(cell.network, args)
        path = workshop.folder(cell.method, cell.budget, cell.seed) / RESULT
        found = results.find(cell)
        if found is not None and "accuracy" in found and path.exists():
            results.change(cell, times(workshop.load(path), workshop, args.seconds))


def done(cell: Cell, workshop: Workshop, results: Results, args: argparse.Namespace) -> bool:
    """Compute a cell and what it needs; return False where another process computes one of these."""
    if results.find(cell) is not None:
        return True
    for needed in (replace(cell, method=method) for method in METHODS[cell.method].needs):
        if not done(needed, workshop, results, args):
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
