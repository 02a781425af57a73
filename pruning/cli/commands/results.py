"""Write what the commands make: checkpoints and runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from pruning.checkpoint import provenance, save, write_loader
from pruning.cli import arguments, config_file
from pruning.cli.factories import arguments_of
from pruning.cli.sources import Data
from pruning.errors import PruningError
from pruning.planning.cost import count
from pruning.report.tensorboard import TensorBoardWriter
from pruning.stages.run import Run
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace
from pruning.utils import distributed
from pruning.utils.tree import Inputs

#: Flags that the result does not depend on.
ELSEWHERE = {
    "parser",
    "device",
    "command",
    "output",
    "resume",
    "config",
    "standalone",
    "tensorboard",
    "data_dir",
}


def start(args: argparse.Namespace) -> Run:
    """Create the run in --output or the next free folder, with the file that repeats it."""
    if args.output is None:
        if args.resume:
            raise PruningError("--resume needs --output FOLDER: the run to continue")
        args.output = distributed.broadcast(arguments.next_run())
    run = Run(args.output, settings(args), resume=args.resume)
    if run.writes:
        if args.tensorboard:
            run.observe = TensorBoardWriter(run.folder / "tensorboard").add
        config_file.write_recipe(run.folder / "config.toml", args, args.parser)
    return run


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return what config.json keeps: all flags that the result depends on."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ELSEWHERE
    }


def finish(
    args: argparse.Namespace,
    run: Run,
    model: nn.Module,
    example: Inputs,
    data: Data,
    *,
    epochs: int,
    accuracy: float,
) -> str:
    """Write the network of a run; return a line that describes it. `accuracy` is on the validation split."""
    path = run.folder / "best.pth"
    facts = {"seed": args.seed, "dataset": data.name, "epochs": epochs, "validation_accuracy": accuracy}
    net = save_network(args, path, model, example, **facts)
    return f"{path}: {count(net, example)}, validation {accuracy:.4f}"


def save_network(
    args: argparse.Namespace, path: Path, model: nn.Module, example: Inputs, **facts: object
) -> nn.Module:
    """Write a network, by one process alone; return it as it was written."""
    if args.fold:
        model = fold_batchnorm(model, trace(model, example))
    if distributed.rank():
        return model
    made = {"name": args.model, "arguments": arguments_of(args.model_arg)} if args.model else None
    save(path, model, provenance=provenance(model=made, **facts))
    if args.standalone:
        write_loader(path.parent)
    return model
