"""`python -m pruning sensitivity`: narrow each group alone, and draw what is lost."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruning.cli import arguments, build
from pruning.planning.budget import PLACES
from pruning.planning.scores import NAMES as SCORES
from pruning.planning.sensitivity import sensitivity
from pruning.report.figures import require_matplotlib, save
from pruning.report.sensitivity_plots import lost_per_cost, sensitivity_curves, sensitivity_map
from pruning.training.config import TrainConfig
from pruning.training.losses import require_classifier
from pruning.utils.files import replace_file
from pruning.utils.tree import first_examples

SUMMARY = "narrow each group alone, and draw what is lost"


def add_flags(parser: argparse.ArgumentParser) -> None:
    arguments.model_flags(parser)
    arguments.data_flags(parser, required=True)
    parser.add_argument("--score", choices=[n for n in SCORES if n != "sensitivity"], default="taylor",
                        help="which channels of a group go first")  # fmt: skip
    arguments.ignore_flag(parser)
    parser.add_argument(
        "--widths", type=arguments.whole_number(1), default=8, metavar="N", help="so many of each group"
    )
    parser.add_argument(
        "--examples",
        type=arguments.whole_number(2),
        metavar="N",
        help="of the validation split (default: all)",
    )
    arguments.calibration_flag(parser, 1024)
    parser.add_argument(
        "--finetune-epochs", type=arguments.whole_number(0), default=0, metavar="N",
        help="also train each point so long on the calibration examples",
    )  # fmt: skip
    parser.add_argument(
        "--runtime", choices=PLACES, default="eager",
        help="where layers are timed, for one example on one thread",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=arguments.folder, default=Path("sensitivity"), metavar="FOLDER",
        help="receives curves.json (from which an interrupted analysis goes on), curves.csv and the pictures",
    )  # fmt: skip


def execute(args: argparse.Namespace) -> None:
    require_matplotlib()
    model, data = build.network(args), build.required_data(args)
    example = build.examples(args, data)
    require_classifier(model, data.train, data.validation)
    validation, seen = [], 0
    for inputs, targets in data.validation:
        room = args.examples - seen if args.examples else len(targets)
        validation.append((first_examples(inputs, room), first_examples(targets, room)))
        seen += len(validation[-1][1])
        if args.examples and seen >= args.examples:
            break
    brief = TrainConfig(args.finetune_epochs, lr=0.02) if args.finetune_epochs else None
    found = sensitivity(
        model,
        example,
        validation,
        calibration=data.calibration(args.calibration),
        widths=args.widths,
        score=args.score,
        finetune=brief,
        ignored=args.ignore,
        runtime=args.runtime,
        path=args.output / "curves.json",
    )
    replace_file(args.output / "curves.csv", found.to_csv().encode())
    save(sensitivity_curves(found), args.output / "curves")
    save(sensitivity_map(found), args.output / "map")
    save(lost_per_cost(found), args.output / "cost")
    print(
        f"dense: {found.dense_cost}, accuracy {found.dense.accuracy:.4f} on {seen} examples; its layers take "
        f"{found.dense_milliseconds:.3f} ms in {args.runtime}"
    )
    for group, channels in found.channels.items():
        narrow = min((p for p in found.points if p.group == group), key=lambda point: point.width)
        reached = f"accuracy {narrow.readings['recalibrated'].accuracy:.4f}, {narrow.milliseconds:.3f} ms"
        print(f"  {group}: {channels} channels; at {narrow.width} {reached}")
    for layer, reason in found.skipped.items():
        print(f"  {layer} keeps all its channels: {reason}")
    print(f"{args.output}: curves.json, curves.csv, and the pictures curves, map and cost (PNG and SVG)")
