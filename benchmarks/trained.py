"""Slim trained networks by the default settings, beside hand-picked rates: docs/trained.md.

    python -m benchmarks.trained                         # all: hours on one core
    python -m benchmarks.trained --networks plain --seeds 0 --rates
    python -m benchmarks.trained --print                 # existing results, as Markdown

Four networks are trained by AdamW, as by a user without this toolkit, then slimmed to 40 % of their
MACs by `python -m pruning slim --weights dense.pth`, once by the defaults and once with each of five
values of `--rate`. The choice between epochs is made on the validation split; the figures are those
of the test split. Existing results are not computed again, and an interrupted run is resumed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import trained_networks
from benchmarks.results import changed_json, percent, read_json, table
from eval.cli import ROOT
from pruning import cli, load
from pruning.checkpoint import read
from pruning.cli.factories import arguments_of, make_model
from pruning.cli.preprocessing import Preprocessing
from pruning.cli.sources import Data, make_data
from pruning.planning import count
from pruning.training import accuracy
from pruning.training.batches import first_batch
from pruning.utils.files import replace_file

BUDGET = "40%"
#: Hand-picked values of --rate.
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


class Case(NamedTuple):
    """A network and its data: the flags of `python -m pruning`, and how the network is trained."""

    title: str
    model: str
    arguments: tuple[str, ...]
    batch_size: int
    epochs: int
    images: str = ""
    rate: float = 2e-3


CASES = {
    "plain": Case("plain CNN, image folder", "benchmarks.trained_networks:PlainCNN", (), 32, 25),
    "mobilenet_v2": Case(
        "mobilenet_v2 of half width, image folder", "mobilenet_v2", ("width_mult=0.5", "num_classes=3"), 32,
        50, rate=1e-2,
    ),
    "resnet8": Case(
        "ResNet-8, {images}", "benchmarks.trained_networks:ResNet8", (), 64, 12, "fashion-mnist"
    ),
    "transformer": Case(
        "transformer encoder, embedded digits", "benchmarks.trained_networks:DigitTransformer", (), 64, 30,
        "mnist5k",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES), help="networks to slim")
    parser.add_argument("--seeds", nargs="+", type=cli.whole_number(0), default=[0, 1, 2], help="seeds")
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES), help="hand-picked rates")
    parser.add_argument("--epochs", type=cli.whole_number(1), help="epochs of the dense training")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of slim, without their hyphens")
    parser.add_argument(
        "--images", default="fashion-mnist", help="images of resnet8; mnist5k needs no download"
    )
    parser.add_argument("--train", type=cli.whole_number(1), default=2000, help="training images or digits")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "trained", help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "trained.json", help="results, as JSON"
    )
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "trained.md", help="table, as Markdown")
    parser.add_argument("--print", action="store_true", help="only print existing results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(seed, None, name) for seed in args.seeds for name in args.networks]
    cells += [(seed, rate, name) for seed in args.seeds for rate in args.rates for name in args.networks]
    for seed, rate, name in () if args.print else cells:
        fill(args, name, seed, rate)
        replace_file(args.table, markdown(read_json(args.results, {})).encode())
    print(markdown(read_json(args.results, {})))


def fill(args: argparse.Namespace, name: str, seed: int, rate: float | None) -> None:
    """Run one cell and store its result, unless the file has it already."""
    key = f"{name} seed {seed} rate {'found' if rate is None else f'{rate:g}'}"
    if key in read_json(args.results, {}):
        return
    print(key, flush=True)
    folder, started = args.runs / name / str(seed), time.monotonic()
    case = CASES[name]
    dense, data = given(args, name, case, seed, folder)
    run = folder / ("found" if rate is None else f"{rate:g}")
    command = ["--model", case.model, "--weights", str(folder / "dense.pth"), "--max-macs", BUDGET]
    command += ["--seed", str(seed), "--threads", "1", "--batch-size", str(case.batch_size)]
    command += data_flags(args, case)
    command += [] if not case.arguments else ["--model-arg", *case.arguments]
    command += [] if rate is None else ["--rate", f"{rate:g}"]
    command += [f"--{flag}" for flag in args.flags]
    resumed = ["--resume"] if (run / "config.json").exists() else []
    done = subprocess.run(
        [sys.executable, "-m", "pruning", "slim", *command, "--output", str(run), *resumed],
        check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    small = load(run / "best.pth", lambda: make_model(case.model, arguments_of(list(case.arguments))))
    facts = read(run / "best.pth")["provenance"]
    example = first_batch(data.validation)[0][:1]
    assert data.test is not None
    result = {
        "images": str(images_of(args, case)["name"]) if case.images else "folder",
        "given": {"validation": accuracy(dense, data.validation), "test": accuracy(dense, data.test)},
        "slim": {"validation": facts["validation_accuracy"], "test": accuracy(small, data.test)},
        "macs": [count(net, example).macs for net in (dense, small)],
        "lines": [
            line for line in done.stdout.splitlines() if line.startswith(("given", "stage", "the best"))
        ],
        "seconds": round(time.monotonic() - started),
    }
    with changed_json(args.results, {}) as content:
        content[key] = result


def given(args: argparse.Namespace, name: str, case: Case, seed: int, folder: Path) -> tuple[nn.Module, Data]:
    """Return the trained dense network of a seed, from the folder or newly trained, and its data."""
    pictures = args.runs / "pictures"
    if not case.images and not (pictures / "drawn").exists():
        trained_networks.draw_pictures(pictures)
        (pictures / "drawn").touch()
    data = data_of(args, case)
    torch.manual_seed(seed)
    dense = make_model(case.model, arguments_of(list(case.arguments)))
    path = folder / "dense.pth"
    if path.exists():
        dense.load_state_dict(torch.load(path, weights_only=True))
        return dense.eval(), data
    trained_networks.train(dense, data.train, args.epochs or case.epochs, case.rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dense.state_dict(), path)
    return dense, data


def images_of(args: argparse.Namespace, case: Case) -> dict[str, object]:
    """Return the arguments of `data:loaders`."""
    if "mnist5k" in (case.images, args.images):
        return {"name": "mnist5k", "train": args.train}
    return {"name": args.images, "train": args.train, "validation": 1000}


def data_of(args: argparse.Namespace, case: Case) -> Data:
    """Return the data of a case."""
    if case.images:
        given = {**images_of(args, case), "batch_size": case.batch_size}
        return make_data("data:loaders", arguments=given)
    chosen = Preprocessing.chosen(
        {"resize": trained_networks.SIZE, "crop": trained_networks.SIZE, "augment": "none"}, None
    )
    return make_data(str(args.runs / "pictures"), batch_size=case.batch_size, preprocessing=chosen)


def data_flags(args: argparse.Namespace, case: Case) -> list[str]:
    """Return the flags that name the same data."""
    if case.images:
        return ["--data", "data:loaders", "--data-arg",
                *(f"{key}={value}" for key, value in images_of(args, case).items())]  # fmt: skip
    size = str(trained_networks.SIZE)
    return ["--data", str(args.runs / "pictures"), "--resize", size, "--crop", size, "--augment", "none"]


def markdown(results: dict[str, Any]) -> str:
    """Format the table, after a description of the runs."""
    lines = [
        "# Trained networks by the defaults",
        "",
        "Each network was trained by AdamW, then slimmed to 40 % of its MACs by `python -m pruning slim "
        "--weights dense.pth` without a flag on training. Made by `python -m benchmarks.trained`; accuracy "
        "in % on test images, mean and standard deviation of the seeds. The last columns are runs with "
        "`--rate`; the difference to the best of them is that of the seeds that have been run with all.",
        "",
    ]
    heads = ["network", "seeds", "given", "slim", "difference", "behind the best rate"]
    heads += [f"{rate:g}" for rate in RATES]
    return "\n".join([*lines, *table(heads, filter(None, (row(results, name) for name in CASES)))])


def row(results: dict[str, Any], name: str) -> list[str]:
    """Return the row of a network; nothing where it has no results."""
    found = by_seed(results, name, "found")
    if not found:
        return []
    before = [100 * cell["given"]["test"] for cell in found.values()]
    after = [100 * cell["slim"]["test"] for cell in found.values()]
    picked = [by_seed(results, name, f"{rate:g}") for rate in RATES]
    shared = [seed for seed in found if all(seed in cells for cells in picked)]
    behind = "–"
    if shared:
        best = max(mean_test(cells[seed] for seed in shared) for cells in picked)
        behind = f"{100 * (best - mean_test(found[seed] for seed in shared)):+.2f}"
    images = next(iter(found.values()))["images"]
    return [
        CASES[name].title.format(images=images),
        str(len(found)),
        percent([value / 100 for value in before]),
        percent([value / 100 for value in after]),
        f"{fmean(after) - fmean(before):+.2f}",
        behind,
        *(percent([cell["slim"]["test"] for cell in cells.values()]) if cells else "–" for cells in picked),
    ]


def by_seed(results: dict[str, Any], name: str, rate: str) -> dict[str, dict[str, Any]]:
    """Return the results of a network at a rate, by seed."""
    found = {}
    for key, cell in sorted(results.items()):
        network, _, seed, _, used = key.split()
        if (network, used) == (name, rate):
            found[seed] = cell
    return found


def mean_test(cells: Iterable[dict[str, Any]] | Sequence[dict[str, Any]]) -> float:
    """Return the mean accuracy on the test images."""
    return fmean(cell["slim"]["test"] for cell in cells)


if __name__ == "__main__":
    cli.run(main, interrupted="interrupted; continue with the same command")
