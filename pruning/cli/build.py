"""What the flags of commands name: budget, settings, model, data, inputs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from pruning.checkpoint import load, read
from pruning.cli import arguments
from pruning.cli.arguments import FlagsOf, read_flags
from pruning.cli.factories import arguments_of, make_model, require_runs
from pruning.cli.sources import Data, make_data
from pruning.errors import CheckpointError, PruningError
from pruning.planning.budget import PLACES, Budget, LatencyBudget
from pruning.stages.config import SlimConfig
from pruning.training.batches import to_device
from pruning.training.config import OPTIMIZERS
from pruning.utils.batch import find_batch
from pruning.utils.files import read_plain
from pruning.utils.settings import Setting
from pruning.utils.tree import Inputs, tensors


@dataclass(frozen=True, kw_only=True)
class FactoryFlags:
    """The factory of a network, and the file with flags."""

    GROUP: ClassVar[str] = "model"

    model: Annotated[
        str | None,
        Setting(
            "package.module:factory, or one of torchvision's classifiers (resnet18); not needed for a "
            "checkpoint of this toolkit whose class can be imported",
            metavar="NAME",
        ),
    ] = None
    model_arg: Annotated[list[str], Setting("arguments of the factory", metavar="KEY=VALUE")] = field(
        default_factory=list
    )
    config: Annotated[
        Path | None,
        Setting(
            "TOML file with flags of this command; those on the command line take precedence", metavar="FILE"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelFlags(FactoryFlags):
    """A network, its weights and where it runs."""

    weights: Annotated[
        Path | None, Setting("state dict, or a checkpoint of this toolkit", metavar="FILE")
    ] = None
    device: Annotated[str, Setting("cpu or cuda", metavar="DEVICE", parse=arguments.device)] = "cpu"
    threads: Annotated[int, Setting("most CPU threads", metavar="N", least=1)] = 2


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Data, and how it is read."""

    GROUP: ClassVar[str] = "data"

    data: Annotated[
        str | None,
        Setting(
            "mnist, fashion-mnist, kmnist, cifar10, cifar100; an image folder with one subfolder per class "
            "(or train, val and test, each of such); or module:factory that returns train, validation and "
            "test batches",
            metavar="NAME",
        ),
    ] = None
    data_arg: Annotated[list[str], Setting("arguments of the factory", metavar="KEY=VALUE")] = field(
        default_factory=list
    )
    data_dir: Annotated[
        Path, Setting("folder in which named data sets are, or are downloaded to", metavar="FOLDER")
    ] = Path("data")
    batch_size: Annotated[int, Setting("examples per batch", metavar="N", least=1)] = 64
    image_size: Annotated[
        int, Setting("height and width of the images of a folder", metavar="PIXELS", least=1)
    ] = 224
    workers: Annotated[int, Setting("processes that read images", metavar="N", least=0)] = 0
    seed: Annotated[
        int, Setting("seed of weights, order and splits", metavar="SEED", least=0, most=2**63 - 1)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """The shape of the inputs where no data is given."""

    GROUP: ClassVar[str] = "data"

    input_shape: Annotated[
        str | None,
        Setting(
            "shape of one example, such as 3x224x224: traces with random examples where no data is given",
            metavar="CxHxW",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags(FactoryFlags):
    """A checkpoint that a command reads on the CPU, and the normalisation of its images."""

    GROUP: ClassVar[str] = "model"

    checkpoint: Annotated[Path, Setting("checkpoint of a network", metavar="CHECKPOINT", positional=True)]
    input_shape: Annotated[
        str | None,
        Setting(
            "shape of one input, such as 3x224x224 (default: the image_shape that the checkpoint stores)",
            metavar="CxHxW",
        ),
    ] = None
    mean: Annotated[
        list[float] | None,
        Setting(
            "what was subtracted from each channel of the training images (default: as the checkpoint says)",
            metavar="X",
        ),
    ] = None
    std: Annotated[
        list[float] | None,
        Setting("what each channel of the training images was divided by", metavar="X", least=0),
    ] = None


@dataclass(frozen=True, kw_only=True)
class IgnoreFlags:
    """Layers that are left as they are."""

    GROUP: ClassVar[str] = "stage 2"

    ignore: Annotated[
        list[str], Setting("layers that keep all their channels: layer4.*, conv1", metavar="PATTERN")
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CalibrationFlags:
    """The examples that channels are scored on."""

    GROUP: ClassVar[str] = "stage 2"

    calibration: Annotated[
        int, Setting("training examples on which channels are scored", metavar="N", least=1)
    ] = 1024


#: Flags of a budget, of counts or of latency, as `budget` reads them.
BUDGET = (Budget, FlagsOf(LatencyBudget, {"limit": None, "batch_size": 1}))
#: Flags of the three stages, as `slim_config` reads them.
STAGES = (*BUDGET, SlimConfig, IgnoreFlags)


def budget(args: argparse.Namespace) -> Budget | LatencyBudget:
    """Return the budget that flags name: of latency, or of counts."""
    if args.max_latency is None:
        if (args.runtime, args.runtime_batch, args.runtime_threads) != (PLACES[0], 1, 1):
            raise PruningError(
                "--runtime, --runtime-batch and --runtime-threads are for --max-latency: give it, too"
            )
        return read_flags(Budget, args)
    if any(limit is not None for limit in (args.max_params, args.max_macs, args.max_channels)):
        raise PruningError("--max-latency stands alone: give no --max-params, --max-macs or --max-channels")
    return read_flags(LatencyBudget, args)


def slim_config(args: argparse.Namespace) -> SlimConfig:
    """Return the settings of the three stages that flags name.

    The peak learning rate of stage 3 follows from its optimizer where no flag gives it.
    """
    rate = OPTIMIZERS[args.optimizer] if args.finetune_rate is None else args.finetune_rate
    flags = argparse.Namespace(**{**vars(args), "finetune_rate": rate})
    return read_flags(SlimConfig, flags, budget=budget(args))


def network(args: argparse.Namespace) -> nn.Module:
    """Return the model that flags name, on its device."""
    flags = read_flags(ModelFlags, args)
    torch.set_num_threads(min(flags.threads, torch.get_num_threads()))
    torch.manual_seed(args.seed)
    return network_with(args, flags.weights)


def network_with(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """Return the model that flags name, with the weights of another file."""
    flags = read_flags(FactoryFlags, args)
    if flags.model is not None:
        model = make_model(flags.model, arguments_of(flags.model_arg), weights)
    elif weights is not None:
        made = _stored_factory(weights)
        if made is not None and ":" not in made["name"]:
            model = make_model(made["name"], made["arguments"], weights)
        else:
            model = _loaded(weights, made)
    else:
        raise PruningError("a model is needed: --model NAME, or --weights with a checkpoint of this toolkit")
    return model.to(args.device)


def described(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint; a bare state dict of the model of --model describes nothing."""
    content = read_plain(path)
    if args.model is not None and not (isinstance(content, dict) and "format" in content):
        return {"class": args.model, "arguments": {}, "provenance": {}}
    return read(path)


def _stored_factory(path: Path) -> dict[str, Any] | None:
    """The factory that made the network of a checkpoint: its `name` and its `arguments`."""
    content = read_plain(path)
    facts = content.get("provenance") if isinstance(content, dict) else None
    made = facts.get("model") if isinstance(facts, dict) else None
    return made if isinstance(made, dict) and {"name", "arguments"} <= made.keys() else None


def _loaded(path: Path, made: dict[str, Any] | None) -> nn.Module:
    """The network of a checkpoint by its class alone; a factory of the user's is named, not imported."""
    try:
        return load(path)
    except CheckpointError as error:
        if made is None:
            raise
        given = "".join(f" {key}={value!r}" for key, value in made["arguments"].items())
        flags = f"--model {made['name']}" + (f" --model-arg{given}" if given else "")
        raise CheckpointError(
            f"{path} needs the factory that made its network: give {flags} ({error})"
        ) from error


def data_of(args: argparse.Namespace) -> Data | None:
    """Return the data that flags name, if they name any."""
    return None if args.data is None else required_data(args)


def required_data(args: argparse.Namespace) -> Data:
    """Return the data that flags name. Raises `PruningError` where they name none."""
    flags = read_flags(DataFlags, args)
    if flags.data is None:
        raise PruningError("data is needed: --data NAME, FOLDER or module:factory")
    return make_data(
        flags.data,
        folder=flags.data_dir,
        batch_size=flags.batch_size,
        image_size=flags.image_size,
        workers=flags.workers,
        seed=flags.seed,
        arguments=arguments_of(flags.data_arg),
    )


def input_shape(args: argparse.Namespace) -> tuple[int, ...] | None:
    """Return the shape that --input-shape gives, where the command has the flag and it is given."""
    text = getattr(args, "input_shape", None)
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text.lower()):
        raise PruningError(f"--input-shape {text!r}: expected sizes such as 1x28x28 or 3x224x224")
    return tuple(int(size) for size in text.lower().split("x"))


def image_shape(
    args: argparse.Namespace, content: Mapping[str, Any], data: Data | None = None
) -> tuple[int, ...]:
    """Return the shape of one input: from --input-shape, the content of `args.checkpoint`, or the data."""
    given, stored = input_shape(args), tuple(content["arguments"].get("image_shape", ()))
    if given and stored and given != stored:
        asked, known = ("x".join(map(str, size)) for size in (given, stored))
        raise PruningError(f"--input-shape {asked}: {args.checkpoint} takes {known}")
    if not given and not stored and data is None:
        raise PruningError(
            f"{args.checkpoint} does not say what its inputs are: give --input-shape, such as 3x224x224"
        )
    return given or stored or tuple(tensors(_inputs(args, data))[0].shape[1:])


def normalisation(args: argparse.Namespace, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `mean` and `std` by channel: from --mean and --std, or the content of a checkpoint."""
    mean, std = args.mean or [], args.std or []
    if len(mean) != len(std):
        raise PruningError("--mean and --std go together: as many numbers for both")
    if 0 in std:
        raise PruningError("--std 0: expected numbers above 0, by which each channel was divided")
    if mean:
        return {"mean": mean, "std": std}
    return content["provenance"].get("normalisation")


def examples(
    args: argparse.Namespace, model: nn.Module, data: Data | None, *, trains: bool = False
) -> Inputs:
    """Return example inputs, from the data or random ones of a shape, on which the model runs.

    The bare model is run here, before the toolkit does anything with it: what it raises is an error
    of the user's code, and what is raised later is not.

    Args:
        trains: run it in training mode, too; BatchNorm then needs at least two examples.
    """
    inputs = _inputs(args, data)
    batch = find_batch(model, inputs)
    inputs = batch.first(inputs, 2)
    require_runs(model, inputs)
    if trains and batch.size > 1:
        require_runs(model, inputs, "in training mode", training=True)
    return inputs


def _inputs(args: argparse.Namespace, data: Data | None) -> Inputs:
    shape = input_shape(args)
    if shape is not None:
        return torch.randn(2, *shape, device=args.device)
    if data is None:
        raise PruningError("inputs are needed to run the model on: --data, or --input-shape CxHxW")
    return to_device((data.examples, None), torch.device(args.device))[0]
