"""Write what the commands make: checkpoints and runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pruning.checkpoint import provenance, save, write_loader
from pruning.cli import argument_types, build, config_file
from pruning.cli.arguments import later_flags
from pruning.cli.factories import arguments_of
from pruning.cli.flags import OutputFlags
from pruning.cli.sources import Data
from pruning.errors import PruningError
from pruning.planning.cost import deployed_cost
from pruning.report.tensorboard import TensorBoardWriter
from pruning.stages.config import SlimConfig
from pruning.stages.run import Run
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace
from pruning.utils import distributed
from pruning.utils.tree import Inputs, tensors

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


#: Flags that runs of earlier versions did not have, with their defaults; they are resumed without them.
LATER = {
    **dict.fromkeys(("augment", "crop", "cutout", "few_shot", "mean", "rate", "resize", "std")),
    **later_flags(SlimConfig, OutputFlags),
}

#: Facts of the checkpoint from which the weights came that still hold.
KEPT = ("preprocessing", "normalisation", "classes", "dataset", "given_accuracy")


def start(args: argparse.Namespace) -> Run:
    """Create the run in --output or the next free folder, with the file that repeats it."""
    if args.output is None:
        if args.resume:
            raise PruningError("--resume needs --output FOLDER: the run to continue")
        args.output = distributed.broadcast(argument_types.next_run())
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
        if key not in ELSEWHERE and not (key in LATER and (value or None) == (LATER[key] or None))
    }


def finish(
    args: argparse.Namespace,
    run: Run,
    model: nn.Module,
    example: Inputs,
    data: Data,
    *,
    epochs: int,
    accuracy: float | None,
    given: float | None = None,
) -> str:
    """Write the network of a run; return a line that describes it.

    Args:
        accuracy, given: on the validation split, of the network and of the trained one it was made from;
            None for a network that is no classifier.
    """
    path = run.folder / "best.pth"
    facts: dict[str, object] = {"epochs": epochs}
    if accuracy is not None:
        facts["validation_accuracy"] = accuracy
    if given is not None:
        facts["given_accuracy"] = given
    net = save_network(args, path, model, example, data, **facts)
    shown = "" if accuracy is None else f", validation {accuracy:.4f}"
    return f"{path}: {deployed_cost(net, example)}{shown}"


def facts_of(args: argparse.Namespace, example: Inputs, data: Data | None) -> dict[str, object]:
    """Return what a checkpoint remembers, as plain data.

    That is the seed, the factory of the network, the shape and type of one example, the data, how its
    images became inputs, and the names of its classes. What flags do not say is as in the checkpoint
    from which the weights came.
    """
    made = {"name": args.model, "arguments": arguments_of(args.model_arg)} if args.model else None
    before = build.stored_facts(args.weights)
    inputs = [
        {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")} for x in tensors(example)
    ]
    if isinstance(example, Mapping) and all(isinstance(x, Tensor) for x in example.values()):
        inputs = [{"name": name, **each} for name, each in zip(example, inputs, strict=True)]
    facts: dict[str, object] = {
        **{key: before[key] for key in KEPT if key in before},
        "seed": args.seed,
        "model": made or before.get("model"),
        "inputs": inputs,
    }
    if data is None:
        return facts
    facts["dataset"] = data.name
    if data.classes:
        facts["classes"] = list(data.classes)
    if data.preprocessing is not None:
        facts["preprocessing"] = data.preprocessing.to_json()
    elif args.mean:
        facts["normalisation"] = {"mean": args.mean, "std": args.std}
    return facts


def save_network(
    args: argparse.Namespace,
    path: Path,
    model: nn.Module,
    example: Inputs,
    data: Data | None,
    **facts: object,
) -> nn.Module:
    """Write a network, by one process alone; return it as it was written."""
    if args.fold:
        model = fold_batchnorm(model, trace(model, example))
    if distributed.rank():
        return model
    # The class can be called with these arguments when the file is loaded, if --model names the class.
    own = args.model == f"{type(model).__module__}:{type(model).__qualname__}"
    given = arguments_of(args.model_arg) if own and args.model_arg else None
    remembered = {**facts_of(args, example, data), **facts}
    save(path, model, arguments=given, provenance=provenance(**remembered))
    if args.standalone:
        write_loader(path.parent)
    return model
