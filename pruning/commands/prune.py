"""`python -m pruning prune`: remove channels in one step, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from pruning import cli, flagged, flags
from pruning.commands.results import save_network
from pruning.errors import PruningError
from pruning.losses import accuracy, no_classifier
from pruning.prune import prune
from pruning.sources import Data

SUMMARY = "remove channels in one step, without training"


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=False)
    flags.budget_flags(parser)
    flags.result_flags(parser)
    flags.calibration_flag(parser, 1024)
    parser.add_argument(
        "--output", type=cli.new_file, default=Path("small.pth"), metavar="FILE", help="checkpoint"
    )


def execute(args: argparse.Namespace) -> None:
    model, data = flagged.network(args), flagged.data_of(args)
    example = flagged.examples(args, data)
    calibration = data.calibration(args.calibration) if data is not None else []
    if not calibration and args.score in ("taylor", "sensitivity"):
        raise PruningError(f"score {args.score} needs data: add --data, or --score l1, l2 or bn_scale")
    step = prune(
        model,
        example,
        flagged.budget(args),
        score=args.score,
        calibration=calibration,
        ignored=args.ignore,
        ranking=args.ranking,
        floor=args.floor,
        most=args.most,
        multiple=args.multiple,
    )
    lines = [] if data is None else [_accuracies(model, step.model, data)]
    save_network(args, args.output, step.model, example)
    print(f"before: {step.before}\nafter:  {step.after} (asked {step.asked})")
    if step.latency is not None:
        print(f"time:   {step.latency}; {step.latency.networks} networks were timed")
    narrowed = {g: f"{step.trace.groups[g].channels}→{w}" for g, w in step.plan.widths.items()}
    print("widths: " + ", ".join(f"{g} {w}" for g, w in narrowed.items()))
    print(*lines, f"{args.output}: outputs agree with the plan to {step.difference:.1e}", sep="\n")


def _accuracies(before: nn.Module, after: nn.Module, data: Data) -> str:
    """The line on accuracy; of a network that is no classifier, why there is none."""
    if (reason := no_classifier(before, data.validation)) is not None:
        return f"validation accuracy was not taken: {reason}"
    first, then = (accuracy(model, data.validation) for model in (before, after))
    return f"validation accuracy, without training: {first:.4f} before, {then:.4f} after"
