"""Compute the table of results: each row is a recipe, run with several seeds.

    python -m benchmarks.table                      # all rows: hours on 2 cores
    python -m benchmarks.table --rows nano --seeds 0 1
    python -m benchmarks.table --print              # existing results, as Markdown

A row is a folder `checkpoints/ROW` with a `recipe.toml`, the flags of `train_yournet.py`. The run of
each seed is measured on the test split when it has finished; the seed that is best on the
validation split becomes `checkpoints/ROW/best.pth`. Each result is saved to
`checkpoints/results.json` at once and is not computed again unless the recipe changes. An
interrupted run is resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import data
from benchmarks.results import changed_json, percent, read_json
from eval.cli import COMMITTED, ROOT
from eval.metrics import EVALUATION_BATCH
from pruning import PruningError, cli, load
from pruning.checkpoint import read
from pruning.planning import count
from pruning.training import accuracy
from pruning.utils.files import replace_file

CHECKPOINTS = ROOT / "checkpoints"
NOTHING: dict[str, Any] = {"rows": [], "controls": []}


def main() -> None:
    parser = arguments(__doc__ or "", [0, 1, 2, 3, 4])
    args = parser.parse_args()
    rows = args.rows or sorted(path.parent.name for path in args.checkpoints.glob("*/recipe.toml"))
    if not args.print:
        side_by_side(args.jobs, fill, [(args, row, seed) for row in rows for seed in args.seeds])
    print(markdown(read_results(args.checkpoints)))


def arguments(description: str, seeds: list[int]) -> argparse.ArgumentParser:
    """Return a parser with the flags that all writers of `results.json` share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=cli.HelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to compute (default: all)")
    parser.add_argument("--seeds", type=cli.whole_number(0), nargs="+", default=seeds, help="seeds to run")
    parser.add_argument("--data", choices=data.NAMES, default="mnist", help="data set")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=CHECKPOINTS,
        metavar="FOLDER",
        help="folder with the recipe of each row",
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs", metavar="FOLDER", help="folder of the runs"
    )
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads of each run")
    parser.add_argument("--jobs", type=cli.whole_number(1), default=1, help="runs at the same time")
    parser.add_argument("--print", action="store_true", help="only print existing results")
    return parser


def fill(args: argparse.Namespace, row: str, seed: int) -> None:
    """Run one seed of a row and store its result, unless the file has it already."""
    path = recipe(args.checkpoints, row)
    print(f"{row}, seed {seed}", flush=True)
    key = (row, args.data, fingerprint(path))
    if any(run["seed"] == seed for run in known_runs(read_results(args.checkpoints), *key)):
        return
    folder = args.runs / "table" / row / str(seed)
    train(folder, ["--recipe", str(path), "--seed", str(seed), "--data", args.data], args.threads)
    entry = {"seed": seed, "threads": args.threads, **measured(folder / "best.pth", args.data)}
    with changed_results(args.checkpoints) as content:
        runs = [*known_runs(content, *key), entry]
        content["rows"] = [old for old in content["rows"] if old["row"] != row]
        content["rows"].append(summary(*key, runs))
        if best_of(runs)["seed"] == seed:
            replace_file(path.with_name("best.pth"), (folder / "best.pth").read_bytes())


def side_by_side(jobs: int, fill: Callable[..., None], wanted: Iterable[tuple[Any, ...]]) -> None:
    """Call `fill` with each tuple of arguments: in this process, or in `jobs` processes at a time.

    Threads cannot be used, because all trainings would draw from torch's single global generator.
    """
    if jobs == 1:
        for arguments in wanted:
            fill(*arguments)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(fill, *arguments) for arguments in wanted]
    for job in waiting:
        job.result()


def recipe(checkpoints: Path, row: str) -> Path:
    """Return the recipe of a row; raises `PruningError` where there is none."""
    path = checkpoints.resolve() / row / "recipe.toml"
    if not path.exists():
        raise PruningError(f"row {row!r} has no recipe: {path} does not exist")
    return path


def train(folder: Path, flags: list[str], threads: int) -> None:
    """Run train_yournet.py in a folder, or resume it."""
    if (folder / "best.pth").exists():
        return
    resume = ["--resume"] if (folder / "config.json").exists() else []
    command = [sys.executable, str(ROOT / "train_yournet.py"), *flags, "--threads", str(threads)]
    reference = ["--reference", str(COMMITTED["LeNet5"])]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        subprocess.run(
            [*command, *reference, "--output", str(folder), *resume],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def measured(checkpoint: Path, dataset: str) -> dict[str, Any]:
    """Measure the costs of a trained network and its accuracy on the test split."""
    net = load(checkpoint)
    splits = data.load(dataset, ROOT / "data", quiet=True)
    cost = count(net, next(iter(splits.batches("test", 1)))[0])
    facts = read(checkpoint)["provenance"]
    return {
        "accuracy": accuracy(net, splits.batches("test", EVALUATION_BATCH)),
        "validation": facts["validation_accuracy"],
        "params": cost.params,
        "macs": cost.macs,
        "macs_with_bias": cost.macs_with_bias,
        "widths": list(getattr(net, "widths", ())),
        "epochs": facts["epochs"],
        "commit": facts["commit"],
    }


def summary(row: str, dataset: str, recipe: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the file: the network that is best on validation, and every seed."""
    runs = sorted(runs, key=lambda run: run["seed"])
    best = best_of(runs)
    return {
        "row": row,
        "checkpoint": f"checkpoints/{row}/best.pth",
        "command": f"python train_yournet.py --recipe checkpoints/{row}/recipe.toml --seed {best['seed']} "
        f"--threads {best['threads']}",
        "dataset": dataset,
        "recipe": recipe,
        "seeds": [run["seed"] for run in runs],
        "accuracy": [run["accuracy"] for run in runs],
        **{key: best[key] for key in ("params", "macs", "macs_with_bias", "widths")},
        "runs": runs,
    }


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run that is best on the validation split; among equals, that of the lowest seed."""
    return max(runs, key=lambda run: (run["validation"], -run["seed"]))


def fingerprint(recipe: Path) -> str:
    """Return a hash of a recipe's content."""
    return hashlib.sha256(recipe.read_bytes()).hexdigest()[:12]


def known_runs(content: dict[str, Any], row: str, dataset: str, recipe: str) -> list[dict[str, Any]]:
    """Return the results of a row with the same recipe and data."""
    for old in content["rows"]:
        if (old["row"], old["dataset"], old["recipe"]) == (row, dataset, recipe):
            return old["runs"]
    return []


def read_results(checkpoints: Path) -> dict[str, Any]:
    return read_json(checkpoints / "results.json", NOTHING)


@contextlib.contextmanager
def changed_results(checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Yield the results under a lock, and write them afterwards."""
    with changed_json(checkpoints / "results.json", NOTHING) as content:
        yield content
        content["rows"].sort(key=lambda row: row["row"])


def markdown(content: dict[str, Any]) -> str:
    """Format the rows as a table: accuracy as mean ± σ over seeds, costs of the committed network."""
    lines = [
        "| row | widths | params | MACs | with biases | accuracy % | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        lines.append(
            f"| {row['row']} | {'-'.join(map(str, row['widths']))} | {row['params']:,} | {row['macs']:,} | "
            f"{row['macs_with_bias']:,} | {percent(row['accuracy'])} | {len(row['accuracy'])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
