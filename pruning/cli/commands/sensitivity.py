"""`python -m pruning sensitivity`: narrow each group alone, and draw what accuracy is lost."""

from __future__ import annotations

import argparse

from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.command_flags import SensitivityFlags
from pruning.planning.sensitivity import sensitivity
from pruning.report.figures import require_matplotlib, save
from pruning.report.sensitivity_plots import lost_per_cost, sensitivity_curves, sensitivity_map
from pruning.training.batches import spread_examples
from pruning.training.config import TrainConfig
from pruning.training.losses import require_classifier
from pruning.utils.files import replace_file
from pruning.utils.wording import number_of


def execute(args: argparse.Namespace) -> None:
    require_matplotlib()
    flags = read_flags(SensitivityFlags, args)
    model, data = build.network(args), build.required_data(args)
    example = build.examples(args, model, data, trains=flags.finetune_epochs > 0)
    require_classifier(model, data.train, data.validation)
    validation = spread_examples(data.validation, flags.examples)
    seen = sum(len(targets) for _, targets in validation)
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
        cluster=flags.cluster,
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
        print(f"  {group}: {number_of(channels, 'channel')}; at {narrow.width} {reached}")
    for layer, reason in found.skipped.items():
        print(f"  {layer} keeps all its channels: {reason}")
    print(f"{flags.output}: curves.json, curves.csv, and the pictures curves, map and cost (PNG and SVG)")
