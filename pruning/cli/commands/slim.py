"""`python -m pruning slim`: train, prune and fine-tune a model under a budget."""

from __future__ import annotations

import argparse
import contextlib
import json

import torch

from pruning.checkpoint import provenance, save
from pruning.cli import build
from pruning.cli.commands.results import facts_of, finish, start
from pruning.errors import PruningError
from pruning.planning.cost import deployed_cost
from pruning.report.predictions import differing_predictions
from pruning.stages.feasibility import feasible
from pruning.stages.slim import slim
from pruning.training.loop import require_trainable
from pruning.training.losses import accuracy, require_classifier
from pruning.utils.files import replace_file


def execute(args: argparse.Namespace) -> None:
    config = build.slim_config(args)
    model, data = build.network(args), build.required_data(args)
    example = build.examples(args, model, data, trains=True)
    # Refuse impossible settings before creating the run folder.
    outputs = args.outputs or None
    target = None if args.resume else feasible(model, example, config, ignored=args.ignore, outputs=outputs)
    require_trainable(model, config.trainings, data.train)
    require_classifier(model, data.train, data.validation)
    run = start(args)
    print(
        f"{run.folder}: {args.model or args.weights} on {data.name}, {deployed_cost(model, example)}",
        flush=True,
    )
    torch.manual_seed(args.seed)
    calibration = data.calibration(args.calibration)

    result = slim(
        model,
        data.train,
        example,
        config,
        validate=data.validation,
        target=target,
        calibration=calibration,
        ignored=args.ignore,
        outputs=outputs,
        run=run,
        log=lambda line: print(line, flush=True),
    )
    reference = result.reference
    given = reference.score if reference.trained else None
    best = accuracy(result.model, data.validation)
    written = finish(args, run, result.model, example, data, epochs=result.epochs, accuracy=best, given=given)
    if run.writes:
        facts = facts_of(args, example, data)
        known = {} if given is None else {"validation_accuracy": given}
        save(run.folder / "given.pth", model, provenance=provenance(**facts, **known))
        save(run.folder / "sparsified.pth", result.sparsified, provenance=provenance(**facts))
        with contextlib.suppress(PruningError):  # of a network that is no classifier of whole examples
            compared = differing_predictions(result.dense, result.model, data.validation)
            replace_file(run.folder / "mistakes.json", (json.dumps(compared) + "\n").encode())
    if given is not None:
        written += f", given {given:.4f}; made by {result.stage}"
    print(written)
