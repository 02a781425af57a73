"""`python -m pruning finetune`: train a pruned network further."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import nn

from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.commands.results import finish, start
from pruning.cli.sources import Data
from pruning.errors import PruningError
from pruning.stages.few_shot import recover
from pruning.stages.finetune import tune
from pruning.training.config import TrainConfig
from pruning.training.distillation import require_features
from pruning.training.loop import require_trainable
from pruning.training.losses import accuracy, require_classifier, why_not_classifier
from pruning.training.optimizers import require_small
from pruning.utils.wording import number_of

#: Peak learning rate of sgd and soap; other optimizers have their own.
RATE = 0.05


def execute(args: argparse.Namespace) -> None:
    model, data = build.network(args), build.required_data(args)
    if args.few_shot is not None:
        _recover(args, model, data)
        return
    if bool(args.distill) != (args.teacher is not None):
        raise PruningError("a teacher and its weight go together: --teacher FILE --distill WEIGHT")
    example = build.examples(args, model, data, trains=True)
    config = read_flags(TrainConfig, args)
    if config.lr is None:
        args.rate = RATE if config.own_rate is None else config.peak
        config = replace(config, lr=args.rate)
    # Refuse impossible settings before creating the run folder.
    if config.optimizer == "soap":
        require_small(model.parameters())
    teacher = None
    if args.teacher is not None:
        teacher = build.network_with(args, args.teacher)
    require_features(model, teacher, args.distill_features)
    if args.distill_features and teacher is None:
        raise PruningError(
            "--distill-features are compared with a teacher's: give --teacher and --distill, too"
        )
    if config.compile and (args.int8 or args.distill_features):
        raise PruningError(
            "--compile: compiled networks leave out the hooks of --int8 and --distill-features; "
            "train without --compile"
        )
    require_trainable(model, [config], data.train)
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
        features=args.distill_features,
        int8=args.int8,
    )
    after = validate(tuned)
    written = finish(args, run, tuned, example, data, epochs=args.epochs, accuracy=after, given=before)
    print(f"{written} ({before:.4f} before)")


def _recover(args: argparse.Namespace, model: nn.Module, data: Data) -> None:
    """Train on a few examples without labels, towards the outputs of the teacher."""
    if args.teacher is None:
        raise PruningError("--few-shot trains towards the dense network: give --teacher FILE, too")
    if args.int8 or args.distill not in (0, 1):
        raise PruningError("--few-shot has no loss but the teacher's: leave out --int8 and --distill")
    example = build.examples(args, model, data)
    config = replace(read_flags(TrainConfig, args), eval_mode=True)
    teacher = build.network_with(args, args.teacher)
    require_features(model, teacher, args.distill_features)
    require_trainable(model, [config], data.train)
    classifies = why_not_classifier(model, data.validation) is None
    run = start(args)
    torch.manual_seed(args.seed)
    batches = data.calibration(args.few_shot)
    done = recover(model, teacher, batches, config, features=args.distill_features, run=run)
    before, after = (accuracy(net, data.validation) if classifies else None for net in (model, done.model))
    written = finish(args, run, done.model, example, data, epochs=args.epochs, accuracy=after, given=before)
    print(
        f"{written}{'' if before is None else f' ({before:.4f} before)'}; loss towards the teacher on "
        f"{number_of(done.held_out, 'example')} held out: {done.before:.4g} before, {done.after:.4g} after"
    )
