"""`python -m pruning sensitivity`: narrow each group alone, and draw what accuracy is lost."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pruning.cli import arguments, build
from pruning.cli.arguments import read_flags
from pruning.planning.budget import PLACES
from pruning.planning.scores import NAMES as SCORES
from pruning.planning.sensitivity import sensitivity
from pruning.report.figures import require_matplotlib, save
from pruning.report.sensitivity_plots import lost_per_cost, sensitivity_curves, sensitivity_map
from pruning.training.config import TrainConfig
from pruning.training.losses import require_classifier
from pruning.utils.batch import usual_batch
from pruning.utils.files import replace_file
from pruning.utils.settings import Setting

SUMMARY = "narrow each group alone, and draw what accuracy is lost"


@dataclass(frozen=True)
class SensitivityFlags:
    score: Annotated[
        str,
        Setting(
            "importance of a channel: the least important are removed first",
            choices=tuple(name for name in SCORES if name != "sensitivity"),
        ),
    ] = "taylor"
    widths: Annotated[int, Setting("number of widths to try for each group", metavar="N", least=1)] = 8
    examples: Annotated[
        int | None,
        Setting("examples of the validation split to measure on (default: all)", metavar="N", least=2),
    ] = None
    finetune_epochs: Annotated[
        int, Setting("epochs to train each point on the calibration examples", metavar="N", least=0)
    ] = 0
    runtime: Annotated[
        str,
        Setting("runtime in which layers are timed, one example at a time on one thread", choices=PLACES),
    ] = "eager"
    output: Annotated[
        Path,
        Setting(
            "folder for curves.json (from which an interrupted analysis goes on), curves.csv and the figures",
            metavar="FOLDER",
            parse=arguments.folder,
            group="run",
        ),
    ] = Path("sensitivity")


FLAGS = (build.ModelFlags, build.DataFlags, SensitivityFlags, build.IgnoreFlags, build.CalibrationFlags)


def execute(args: argparse.Namespace) -> None:
    require_matplotlib()
    flags = read_flags(SensitivityFlags, args)
    model, data = build.network(args), build.required_data(args)
    example = build.examples(args, model, data, trains=flags.finetune_epochs > 0)
    require_classifier(model, data.train, data.validation)
    validation, seen = [], 0
    for inputs, targets in data.validation:
        room = flags.examples - seen if flags.examples else len(targets)
        validation.append((usual_batch(inputs).first(inputs, room), targets[:room]))
        seen += len(validation[-1][1])
        if flags.examples and seen >= flags.examples:
            break
    brief = TrainConfig(flags.finetune_epochs, lr=0.02) if flags.finetune_epochs else None
    found = sensitivity(
        model,
        example,
        validation,
        calibration=data.calibration(args.calibration),
        widths=flags.widths,
        score=flags.score,
        finetune=brief,
        ignored=args.ignore,
        runtime=flags.runtime,
        path=flags.output / "curves.json",
    )
    replace_file(flags.output / "curves.csv", found.to_csv().encode())
    save(sensitivity_curves(found), flags.output / "curves")
    save(sensitivity_map(found), flags.output / "map")
    save(lost_per_cost(found), flags.output / "cost")
    print(
        f"dense: {found.dense_cost}, accuracy {found.dense.accuracy:.4f} on {seen} examples; its layers take "
        f"{found.dense_milliseconds:.3f} ms in {flags.runtime}"
    )
    for group, channels in found.channels.items():
        narrow = min((p for p in found.points if p.group == group), key=lambda point: point.width)
        reached = f"accuracy {narrow.readings['recalibrated'].accuracy:.4f}, {narrow.milliseconds:.3f} ms"
        print(f"  {group}: {channels} channels; at {narrow.width} {reached}")
    for layer, reason in found.skipped.items():
        print(f"  {layer} keeps all its channels: {reason}")
    print(f"{flags.output}: curves.json, curves.csv, and the pictures curves, map and cost (PNG and SVG)")
