"""`python -m pruning finetune`: train a pruned network further."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from pruning.cli import build
from pruning.cli.arguments import FlagsOf, read_flags
from pruning.cli.commands.results import ResultFlags, RunFlags, finish, start
from pruning.errors import PruningError
from pruning.stages.config import SlimConfig
from pruning.stages.finetune import tune
from pruning.training.config import TrainConfig
from pruning.training.losses import accuracy, require_classifier
from pruning.training.optimizers import require_small
from pruning.utils.settings import Setting

SUMMARY = "train a pruned network further"


@dataclass(frozen=True)
class FinetuneFlags:
    GROUP = "training"

    teacher: Annotated[Path | None, Setting("checkpoint of --model, for --distill", metavar="FILE")] = None
    int8: Annotated[
        bool,
        Setting("train with weights rounded to 8 bits, for export --int8, and keep the best rounded epoch"),
    ] = False


FLAGS = (
    build.ModelFlags,
    build.DataFlags,
    FlagsOf(TrainConfig, {"epochs": 20, "lr": 0.05, "weight_decay": 1e-3}),
    FlagsOf(SlimConfig, only=("distill", "temperature")),
    FinetuneFlags,
    RunFlags,
    ResultFlags,
)


def execute(args: argparse.Namespace) -> None:
    model, data = build.network(args), build.required_data(args)
    if bool(args.distill) != (args.teacher is not None):
        raise PruningError("a teacher and its weight go together: --teacher FILE --distill WEIGHT")
    example = build.examples(args, model, data, trains=True)
    config = read_flags(TrainConfig, args)
    # Refuse impossible settings before creating the run folder.
    if config.optimizer == "soap":
        require_small(model.parameters())
    teacher = None
    if args.teacher is not None:
        teacher = build.network_with(args, args.teacher)
    require_classifier(model, data.train, data.validation)
    run = start(args)

    def validate(network: nn.Module) -> float:
        return accuracy(network, data.validation)

    before = validate(model)
    torch.manual_seed(args.seed)
    tuned = tune(
        model,
        data.train,
        config,
        validate=validate,
        run=run,
        teacher=teacher,
        distill=args.distill,
        temperature=args.temperature,
        int8=args.int8,
    )
    after = validate(tuned)
    written = finish(args, run, tuned, example, data, epochs=args.epochs, accuracy=after)
    print(f"{written} ({before:.4f} before)")
