"""Draw the figures of Network Slimming (Liu et al., ICCV 2017, arXiv 1708.06519) from trainings of one's own.

    python -m benchmarks.fair.paper --network resnet8 --data-dir FOLDER
    python -m benchmarks.fair.paper --draw           # the figures of existing results

Three figures: the BatchNorm scales γ after training with three strengths λ of the L1 term; the test error
against the share of channels that one pass prunes by |γ|, before and after fine-tuning; and the test error
after each of several passes of training with the L1 term and pruning. λ is that of the paper, λ Σ|γ| added
to the loss; its values of 1e-5 and 1e-4 are for 160 epochs. Each value is stored when it is complete, and
not computed again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.fair.cells import Cell, Results, locked
from benchmarks.fair.flags import add_training_flags, settings, workshop_of
from benchmarks.fair.recipes import NETWORKS
from benchmarks.fair.training import LATER, Part, Workshop
from benchmarks.peers import regularized
from eval.cli import ROOT, use_threads
from eval.metrics import EVALUATION_BATCH
from pruning import Budget, PruningError, cli, prune, save
from pruning.report import figures
from pruning.training import accuracy

FORMAT = "benchmarks.fair.paper"
#: Bars of a histogram.
BINS = 40

#: An entry of the results.
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fair.paper", description=__doc__, formatter_class=cli.HelpFormatter
    )
    parser.add_argument("--network", default="resnet8", help=f"{', '.join(NETWORKS)}, or module:factory")
    parser.add_argument(
        "--strengths", nargs="+", type=cli.number(0), default=[0.0, 1e-4, 1e-3], help="λ of each training"
    )
    parser.add_argument(
        "--shares", nargs="+", type=percentage, default=[10, 20, 30, 40, 50, 60, 70, 80], metavar="PERCENT",
        help="channels to prune in one pass",
    )  # fmt: skip
    parser.add_argument("--passes", type=cli.whole_number(1), default=4, help="passes of the last figure")
    parser.add_argument(
        "--each", type=percentage, default=30, metavar="PERCENT", help="channels that each pass prunes"
    )
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="seed")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "fair-paper.json", metavar="FILE"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fair", metavar="FOLDER")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "docs", metavar="FOLDER", help="folder of the figures"
    )
    parser.add_argument("--draw", action="store_true", help="only draw existing results")
    add_training_flags(parser)
    args = parser.parse_args()
    results = Results(args.results, FORMAT)
    if not args.draw:
        use_threads(args.threads)
        workshop = workshop_of(args.network, args)
        results.require_settings(args.network, settings(workshop))
        fill(workshop, results, args)
    for path in draw(results.read(), args.network, args.seed, args.figures):
        print(path)


def percentage(text: str) -> int:
    """Check a command-line argument that is a share of the channels."""
    found = cli.whole_number(1)(text)
    if found > 99:
        raise argparse.ArgumentTypeError(f"{text}: expected a percentage from 1 to 99")
    return found


def fill(workshop: Workshop, results: Results, args: argparse.Namespace) -> None:
    """Compute what the results lack."""
    for strength in args.strengths:
        entries = {("scales", f"{strength:g}"): partial(scales, workshop, strength, args)}
        for share in args.shares:
            entries["pruned", f"{strength:g} {share}%"] = partial(pruned, workshop, strength, share, args)
        for (kind, detail), compute in entries.items():
            store(workshop, results, kind, detail, args.seed, compute)
    strongest = max(args.strengths)
    for number in range(1, args.passes + 1):
        one = partial(after_pass, workshop, strongest, number, args)
        store(workshop, results, "pass", pass_key(strongest, args, number), args.seed, one)


def pass_key(strength: float, args: argparse.Namespace, number: int) -> str:
    """Return the name of a pass in the results."""
    return f"{strength:g} {args.each}% {number}"


def store(
    workshop: Workshop, results: Results, kind: str, detail: str, seed: int, compute: Callable[[], Found]
) -> None:
    """Compute one entry of the results, unless the file has it."""
    cell = Cell(workshop.network, kind, detail, seed)
    with locked(workshop.folder(kind, detail, seed) / "measured", wait=True):
        if results.find(cell) is None:
            print(f"{time.strftime('%H:%M')} {cell}", flush=True)
            results.add(cell, compute())


def trained(workshop: Workshop, strength: float, args: argparse.Namespace) -> nn.Module:
    """Return the dense network, trained with an L1 term."""
    if not strength:
        return workshop.dense(args.seed)
    loss = regularized(workshop.loss, strength)
    return workshop.dense_with(f"L1 {strength:g}", args.seed, loss)


def test_error(workshop: Workshop, model: nn.Module) -> float:
    return 1 - accuracy(model, workshop.source.batches("test", EVALUATION_BATCH))


def scales(workshop: Workshop, strength: float, args: argparse.Namespace) -> Found:
    """Return |γ| of all BatchNorm layers, and the test error."""
    model = trained(workshop, strength, args)
    norms = [m.weight for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    values = torch.cat([weight.detach().abs().flatten().cpu() for weight in norms])
    return {"scales": [round(value, 6) for value in values.tolist()], "error": test_error(workshop, model)}


def narrow(workshop: Workshop, model: nn.Module, share: int) -> nn.Module:
    """Prune a share of the channels of a network by |γ|, compared over all layers as in the paper."""
    budget = Budget(channels=f"{100 - share}%")
    return prune(model, workshop.example, budget, score="bn_scale", per_cost=False).model


def pruned(workshop: Workshop, strength: float, share: int, args: argparse.Namespace) -> Found:
    """Return the test errors of a pruned network before and after fine-tuning; none where it cannot be."""
    dense, recipe = trained(workshop, strength, args), workshop.recipe
    try:
        small = narrow(workshop, dense, share)
    except PruningError as error:
        return {"refused": str(error)}
    before = test_error(workshop, small)
    part = Part(workshop, workshop.folder("pruned", f"{strength:g} {share}%", args.seed) / "tuned")
    tuned = part.learn(
        lambda: small, recipe.later_epochs, recipe.later_rate, LATER + args.seed, keep_best=True
    )
    return {"error before": before, "error": test_error(workshop, tuned)}


def after_pass(workshop: Workshop, strength: float, number: int, args: argparse.Namespace) -> Found:
    """Prune the result of the previous pass, and train it with the L1 term; return error and costs."""
    recipe = workshop.recipe

    def folder(at: int) -> Path:
        return workshop.folder("pass", pass_key(strength, args, at), args.seed)

    def make() -> nn.Module:
        if number == 1:
            return narrow(workshop, trained(workshop, strength, args), args.each)
        return narrow(workshop, workshop.load(folder(number - 1) / "result.pth"), args.each)

    loss = regularized(workshop.loss, strength)
    try:
        tuned = Part(workshop, folder(number) / "tuned").learn(
            make, recipe.later_epochs, recipe.later_rate, LATER + args.seed, loss=loss, keep_best=True
        )
    except PruningError as error:
        return {"refused": str(error)}
    save(folder(number) / "result.pth", tuned)
    cost, dense = workshop.cost(tuned), workshop.cost(workshop.new(args.seed))
    return {
        "error": test_error(workshop, tuned),
        "params": cost.params / dense.params,
        "macs": cost.macs / dense.macs,
        "channels": cost.channels / dense.channels,
    }


def draw(content: dict[str, Any], network: str, seed: int, folder: Path) -> list[Path]:
    """Write the three figures, of what the results have; return the paths.

    Raises:
        PruningError: they have nothing of the network.
    """
    cells = [c for c in content["cells"] if (c["network"], c["seed"]) == (network, seed) and "error" in c]
    by_kind = {kind: [c for c in cells if c["method"] == kind] for kind in ("scales", "pruned", "pass")}
    strengths = sorted({c["budget"] for c in by_kind["scales"]}, key=float)
    if not strengths:
        raise PruningError(f"the results have nothing of {network}, seed {seed}: compute it without --draw")
    drawn = {"scales": _scales(by_kind["scales"], strengths)}
    if by_kind["pruned"]:
        drawn["shares"] = _shares(by_kind, strengths)
    if by_kind["pass"]:
        drawn["passes"] = _passes(by_kind, strengths)
    paths: list[Path] = []
    for name, figure in drawn.items():
        paths += figures.save(figure, folder / f"fair-{name}")
    return paths


def _scales(cells: list[Found], strengths: list[str]) -> figures.Figure:
    figure, axes = figures.new_figure(3.1 * len(strengths), 2.8, 1, len(strengths))
    top = max(max(cell["scales"]) for cell in cells)
    for each, strength in zip(axes, strengths, strict=True):
        (values,) = (cell["scales"] for cell in cells if cell["budget"] == strength)
        each.hist(values, bins=BINS, range=(0, top or 1.0), color=figures.COLORS[0])
        each.set_title(f"λ = {strength}", fontsize=10)
        each.set_xlabel("|γ|")
    axes[0].set_ylabel("channels")
    return figure


def _shares(by_kind: dict[str, list[Found]], strengths: list[str]) -> figures.Figure:
    figure, (axes,) = figures.new_figure(5.6, 3.8)
    for number, strength in enumerate(strengths):
        dense = next(100 * cell["error"] for cell in by_kind["scales"] if cell["budget"] == strength)
        found = [(0, dense, dense)]
        for cell in by_kind["pruned"]:
            of, share = cell["budget"].split()
            if of == strength:
                found.append((int(share.rstrip("%")), 100 * cell["error before"], 100 * cell["error"]))
        shares, before, after = zip(*sorted(found), strict=True)
        color, marker = figures.COLORS[number % 7], figures.MARKERS[number % 7]
        axes.plot(shares, before, color=color, marker=marker, ms=4, ls=":", label=f"λ = {strength}, pruned")
        axes.plot(shares, after, color=color, marker=marker, ms=4, label=f"λ = {strength}, fine-tuned")
    axes.set_xlabel("channels pruned, %")
    axes.set_ylabel("test error, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _passes(by_kind: dict[str, list[Found]], strengths: list[str]) -> figures.Figure:
    figure, (axes,) = figures.new_figure(5.6, 3.8)
    ordered = sorted(by_kind["pass"], key=lambda cell: -cell["channels"])
    dense = next(100 * cell["error"] for cell in by_kind["scales"] if cell["budget"] == strengths[0])
    for number, (key, label) in enumerate((("channels", "channels"), ("params", "params"), ("macs", "MACs"))):
        removed = [100 * (1 - cell[key]) for cell in ordered]
        errors = [100 * cell["error"] for cell in ordered]
        axes.plot(removed, errors, color=figures.COLORS[number], marker=figures.MARKERS[number], label=label)
    axes.axhline(dense, color="#555555", ls="--", lw=1, label=f"dense, λ = {strengths[0]}")
    axes.set_xlabel("removed after each pass, %")
    axes.set_ylabel("test error, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    cli.run(main)
