"""Run the pipeline for several budgets and seeds, and draw the Pareto front of accuracy and cost.

    python -m benchmarks.search                               # hours on 2 cores
    python -m benchmarks.search --budgets 1000:40k 5000:100k --seeds 0
    python -m benchmarks.search --draw                        # only draw existing results

A budget is PARAMS:MACS; leave either empty for no limit. The recipe gives all other settings.
Each result is saved to `benchmarks/search.json` at once, and is not computed again while the
recipe is the same. The front is selected on the validation split only; the figures,
`docs/pareto-params` and `docs/pareto-macs`, show accuracy on the test split.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import data
from benchmarks.results import changed_json, deviation, percent, read_json
from benchmarks.table import CHECKPOINTS, fingerprint, measured, read_results, side_by_side, train
from eval.cli import ROOT
from pruning import Budget, cli
from pruning.report.figures import save
from pruning.report.pareto import Point, front, pareto

LADDER = ("700:30k", "1000:36k", "1485:47.4k", "2500:60k", "5000:100k", "10000:150k", "20000:200k")
NOTHING: dict[str, Any] = {"runs": []}
#: Published networks: params, MACs, test accuracy (mostly that of the best run or epoch).
ANCHORS: tuple[tuple[str, int, int, float], ...] = (
    ("lhwzds", 1485, 50_700, 0.985),
    ("z1V-Chan", 2705, 36_400, 0.983),
    ("RachelSunHanxi", 2510, 95_800, 0.988),
    ("deepoceansame", 13_930, 50_800, 0.989),
    ("BC-GHS", 2792, 153_000, 0.990),
    ("BC-GNJ", 4118, 283_000, 0.990),
    ("JoshWarn", 697, 80_600, 0.9903),
    ("ruslangrimov", 1936, 413_000, 0.9910),
    ("woolly-of-cv", 3762, 621_000, 0.9952),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--budgets", nargs="+", type=budget, default=LADDER, metavar="PARAMS:MACS", help="budgets to run"
    )
    parser.add_argument(
        "--seeds", type=cli.whole_number(0), nargs="+", default=[0, 1, 2], help="seeds to run"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        default=CHECKPOINTS / "nano" / "recipe.toml",
        help="all settings but the budget",
    )
    parser.add_argument("--data", choices=data.NAMES, default="mnist", help="data set")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs", metavar="FOLDER", help="folder of the runs"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "search.json", help="results, as JSON"
    )
    parser.add_argument("--figures", type=Path, default=ROOT / "docs", help="folder of the figures")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads of each run")
    parser.add_argument("--jobs", type=cli.whole_number(1), default=1, help="runs at the same time")
    parser.add_argument("--draw", action="store_true", help="only draw existing results")
    args = parser.parse_args()
    if not args.draw:
        side_by_side(args.jobs, fill, itertools.product([args], args.budgets, args.seeds))
    runs = read(args.results)["runs"]
    rows = read_results(CHECKPOINTS)["rows"]
    for axis, name in (("params", "params"), ("macs", "MACs")):
        series = {"slimmed LeNet-5": points(runs, axis), "rows of the table": row_points(rows, axis)}
        anchors = [
            Point(params if axis == "params" else macs, accuracy, who)
            for who, params, macs, accuracy in ANCHORS
        ]
        figure = pareto({key: value for key, value in series.items() if value}, anchors, cost=name)
        for path in save(figure, args.figures / f"pareto-{axis}"):
            print(path)
    print(markdown(runs))


def budget(text: str) -> str:
    """Check a command-line argument of the form PARAMS:MACS."""
    params, separator, macs = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected PARAMS:MACS, for example 1485:47.4k")
    Budget(params or None, macs or None)
    return text


def fill(args: argparse.Namespace, limits: str, seed: int) -> None:
    """Run one budget and seed and store the result, unless the file has it already."""
    key = {"budget": limits, "seed": seed, "dataset": args.data, "recipe": fingerprint(args.recipe)}
    if any(key.items() <= run.items() for run in read(args.results)["runs"]):
        return
    print(f"{limits}, seed {seed}", flush=True)
    folder = args.runs / "search" / f"{limits.replace(':', '-').replace('%', 'pc')}-{seed}"
    flags = ["--recipe", str(args.recipe.resolve()), "--seed", str(seed), "--data", args.data]
    for flag, limit in zip(("--max-params", "--max-macs"), limits.split(":"), strict=True):
        flags += [flag, limit] if limit else []
    train(folder, flags, args.threads)
    found = {**key, **measured(folder / "best.pth", args.data)}
    with changed_json(args.results, NOTHING) as content:
        content["runs"].append(found)


def read(path: Path) -> dict[str, Any]:
    return read_json(path, NOTHING)


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def by_budget(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each budget on the front: no cheaper budget has a higher validation accuracy."""
    groups = {limits: [r for r in runs if r["budget"] == limits] for limits in {r["budget"] for r in runs}}
    kept: set[str] = set()
    for axis in ("params", "macs"):
        places = [
            Point(mean(group, axis), mean(group, "validation"), limits) for limits, group in groups.items()
        ]
        kept |= {point.label for point in front(places)}
    return {limits: groups[limits] for limits in sorted(kept, key=lambda key: mean(groups[key], "params"))}


def points(runs: list[dict[str, Any]], axis: str) -> list[Point]:
    found = []
    for group in by_budget(runs).values():
        accuracies = [run["accuracy"] for run in group]
        found.append(Point(mean(group, axis), statistics.mean(accuracies), "", deviation(accuracies)))
    return found


def row_points(rows: list[dict[str, Any]], axis: str) -> list[Point]:
    return [
        Point(row[axis], statistics.mean(row["accuracy"]), row["row"], deviation(row["accuracy"]))
        for row in rows
    ]


def markdown(runs: list[dict[str, Any]]) -> str:
    lines = ["| budget | params | MACs | accuracy % | seeds |", "|---|---|---|---|---|"]
    for limits, group in by_budget(runs).items():
        lines.append(
            f"| {limits} | {mean(group, 'params'):,.0f} | {mean(group, 'macs'):,.0f} | "
            f"{percent([run['accuracy'] for run in group])} | {len(group)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
