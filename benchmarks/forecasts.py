"""Compare forecasts of whole plans with what is measured: by sensitivity curves, and by a frontier.

    python -m benchmarks.forecasts

Ten small networks are trained on the embedded digits. For each, the groups are analysed one by one
(`sensitivity`), and twelve budgets are measured (`frontier`). Five other budgets are then forecast in both
ways, and measured. Networks that the results file has are not trained again. Writes a JSON file, and a
Markdown table next to it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import models
from benchmarks.results import read_json, table, write
from benchmarks.trained_networks import DigitTransformer, ResNet8, train
from eval.cli import ROOT, use_threads
from pruning import Budget, cli, prune, sensitivity
from pruning.planning import joint
from pruning.planning.judge import Judge
from pruning.stages import frontier
from pruning.tracing.trace import trace

#: Shares of the MACs that are forecast: none is among the twelve that a frontier measures.
BUDGETS = ("85%", "70%", "55%", "40%", "25%")


def _convolutions(widths: tuple[int, ...], norm: bool, groups: int = 1) -> nn.Module:
    """Return convolutions, each followed by a norm, an activation and pooling, and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((1, *widths)):
        if groups > 1 and before > 1:  # depthwise separable
            layers.append(nn.Conv2d(before, before, 3, padding=1, groups=before, bias=not norm))
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, after, 1)]
        else:
            layers.append(nn.Conv2d(before, after, 3, padding=1))
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10))


class _Concatenated(nn.Module):
    """Convolutions that read the outputs of all earlier ones (Huang et al., arXiv 1608.06993)."""

    def __init__(self, growth: int = 8, depth: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(1, growth, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(growth * n), nn.ReLU(), nn.Conv2d(growth * n, growth, 3, padding=1))
            for n in range(1, depth)
        )
        self.head = nn.Linear(growth * depth, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(torch.relu(x).amax((2, 3)))


def _perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((784, *widths)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lambda: models.start("lenet5", (1, 28, 28), 10),
    "perceptron": lambda: _perceptron(128, 64),
    "deep perceptron": lambda: _perceptron(64, 64, 64, 64),
    "convolutions": lambda: _convolutions((8, 16, 32), norm=True),
    "without norm": lambda: _convolutions((8, 16, 32), norm=False),
    "wide": lambda: _convolutions((24, 24), norm=True),
    "separable": lambda: _convolutions((16, 32, 32), norm=True, groups=2),
    "concatenated": _Concatenated,
    "residual": ResNet8,
    "transformer": DigitTransformer,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks")
    parser.add_argument("--epochs", type=cli.whole_number(1), default=6, help="epochs of training")
    parser.add_argument("--points", type=cli.whole_number(2), default=12, help="points of a frontier")
    parser.add_argument("--widths", type=cli.whole_number(1), default=6, help="widths of a group")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "forecasts.json", help="results")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the forecasts and measurements of one network, one row for each budget."""
    digits = data.load("mnist5k", ROOT / "data", quiet=True)
    torch.manual_seed(0)
    net = train(NETWORKS[name](), digits.batches("train", 64, shuffle=True), args.epochs, 2e-3)
    validation = list(digits.batches("validation", 250))
    calibration = list(digits.batches("train", 64))[:8]
    example = calibration[0][0][:2]
    options: dict[str, Any] = {"score": "taylor", "calibration": calibration}
    curves = sensitivity(net, example, validation, widths=args.widths, label=name, **options)
    found = frontier(net, example, validation, points=args.points, label=name, **options)
    judge = Judge(net, validation, trace(net, example).batch)
    rows = []
    for text in BUDGETS:
        budget = Budget(macs=text)
        by_curves = joint(net, example, budget, curves, validation, calibration=calibration)
        step = prune(net, example, budget, **options)
        measured = judge(step.model).metrics
        row: dict[str, Any] = {"network": name, "budget": text, "dense": curves.dense.loss}
        row["curves"] = {
            "forecast": by_curves.predicted_loss,
            "measured": by_curves.measured["recalibrated"].loss,
        }
        for metric in ("loss", "accuracy"):
            forecast = found.forecast(step.after.macs / step.before.macs, metric)
            row[metric] = {
                "forecast": None if forecast is None else list(forecast),
                "measured": list(measured[metric]),
            }
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        factors = sorted(
            (row["curves"]["measured"] - row["dense"]) / max(row["curves"]["forecast"] - row["dense"], 1e-3)
            for row in mine
        )
        middle, least, most = factors[len(factors) // 2], factors[0], factors[-1]
        held = [sum(_holds(row, metric) for row in mine) for metric in ("loss", "accuracy")]
        lines.append(
            (name, f"{middle:.1f} ({least:.1f} to {most:.1f})", *(f"{n} of {len(mine)}" for n in held))
        )
    loss, accuracy = (sum(_holds(row, metric) for row in rows) for metric in ("loss", "accuracy"))
    return "\n".join(
        [
            "# Forecasts of whole plans",
            "",
            "Small networks on the embedded digits, 500 validation images: `python -m benchmarks.forecasts`.",
            "The factor is the measured increase of the loss over the sum of the increases of each group",
            "alone: the median, the least and the largest of the budgets. The other columns count the",
            "budgets at which the measured figure lies within the interval that the frontier forecasts.",
            "",
            *table(["network", "factor of the curves", "loss within", "accuracy within"], lines),
            f"Of {len(rows)} cases, the interval holds the loss in {loss} and the accuracy in {accuracy}.",
            f"In the median it is {_width(rows, 'forecast'):.1f} points of accuracy wide; the interval of a",
            f"network that is measured is {_width(rows, 'measured'):.1f} points wide.",
            "",
        ]
    )


def _width(rows: list[dict[str, Any]], of: str) -> float:
    """Return the median width of the intervals of the accuracy, in percentage points."""
    intervals = [row["accuracy"][of] for row in rows if row["accuracy"][of] is not None]
    return 100 * statistics.median(high - low for _, low, high in intervals)


def _holds(row: dict[str, Any], metric: str) -> bool:
    forecast = row[metric]["forecast"]
    return forecast is not None and forecast[1] <= row[metric]["measured"][0] <= forecast[2]


def main() -> None:
    args = arguments()
    use_threads(args.threads)
    result = read_json(args.output, {"rows": []})
    for name in args.networks:
        if not any(row["network"] == name for row in result["rows"]):
            result["rows"] += measure(name, args)
            write(args.output, result, summary(result["rows"]))


if __name__ == "__main__":
    cli.run(main)
