"""`python -m pruning finetune`: train a pruned network further."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from pruning.cli import arguments, build
from pruning.cli.commands.results import finish, start
from pruning.errors import PruningError
from pruning.stages.finetune import tune
from pruning.training.config import TrainConfig
from pruning.training.losses import accuracy, require_classifier
from pruning.training.optimizers import require_small

SUMMARY = "train a pruned network further"


def add_flags(parser: argparse.ArgumentParser) -> None:
    arguments.model_flags(parser)
    arguments.data_flags(parser, required=True)
    arguments.training_flags(parser)
    parser.add_argument("--epochs", type=arguments.whole_number(1), default=20, metavar="N", help="to train")
    parser.add_argument("--rate", type=arguments.number(0), default=0.05, help="highest learning rate")
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="checkpoint of --model, for --distill")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="train it as rounded to 8 bits, for export --int8, and keep the epoch that is best when rounded",
    )
    arguments.run_flags(parser)
    arguments.result_flags(parser)


def execute(args: argparse.Namespace) -> None:
    model, data = build.network(args), build.required_data(args)
    if bool(args.distill) != (args.teacher is not None):
        raise PruningError("a teacher and its weight go together: --teacher FILE --distill WEIGHT")
    example = build.examples(args, data)
    config = TrainConfig(
        args.epochs,
        lr=args.rate,
        optimizer=args.optimizer,
        weight_decay=args.weight_decay,
        ema=args.ema,
        channels_last=args.channels_last,
    )
    # What cannot be is refused before there is a run.
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
