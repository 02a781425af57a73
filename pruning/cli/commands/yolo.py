"""`python -m pruning yolo`: prune a model of ultralytics, trained by its own trainer."""

from __future__ import annotations

import argparse
import importlib.util

from pruning.cli.arguments import read_flags
from pruning.cli.commands.results import start
from pruning.errors import PruningError
from pruning.planning.budget import Budget


def execute(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("ultralytics") is None:
        raise PruningError("this command needs ultralytics, which is not installed: pip install ultralytics")
    if not any((args.max_params, args.max_macs, args.max_channels)):
        raise PruningError("a budget is needed: --max-macs 50%, or --max-params or --max-channels")
    from pruning.integrations.ultralytics import YoloConfig, iterations  # needs the library

    config = read_flags(
        YoloConfig,
        args,
        budget=read_flags(Budget, args),
        device="0" if args.device == "cuda" else args.device.removeprefix("cuda:"),
        arguments=_arguments(args.train_arg),
    )
    iterations.require_ready(args.weights, config)  # before there is a run
    args.tensorboard = False
    run = start(args)
    done = iterations.slim(args.weights, config, run)
    print(f"before: {done.before}\nafter:  {done.after} (asked {config.budget})")
    for name, value in done.metrics_after.items():
        if "mAP" in name or "accuracy" in name:
            before = done.metrics_before.get(name, float("nan"))
            print(
                f"{name.removeprefix('metrics/')}: {before:.4f} before, {value:.4f} after, on validation data"
            )
    print(f'{done.path}: YOLO("{done.path}") loads it; train it on by pruning.integrations.ultralytics.train')


def _arguments(given: list[str]) -> dict[str, object]:
    """Return KEY=VALUE arguments of the library's training as it reads them itself."""
    from ultralytics.cfg import parse_key_value_pair

    found = {}
    for text in given:
        if "=" not in text.strip("="):
            raise PruningError(f"--train-arg {text!r}: expected KEY=VALUE, such as lr0=0.01")
        key, value = parse_key_value_pair(text)
        found[key] = value
    return found
