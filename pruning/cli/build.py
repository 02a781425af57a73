"""What the flags of commands name: budget, settings, model, data, inputs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pruning.checkpoint import load, read
from pruning.cli.arguments import read_flags
from pruning.cli.factories import arguments_of, factory, make_model, parameters, require_finite, require_runs
from pruning.cli.flags import DataFlags, FactoryFlags, ModelFlags
from pruning.cli.named_images import BUILT_IN
from pruning.cli.preprocessing import Preprocessing
from pruning.cli.sources import Data, make_data, number_of_classes
from pruning.errors import CheckpointError, PruningError
from pruning.planning.budget import PLACES, Budget, LatencyBudget
from pruning.stages.config import SlimConfig
from pruning.training.batches import to_device
from pruning.utils.batch import find_batch
from pruning.utils.files import read_plain
from pruning.utils.tree import Inputs, tensors
from pruning.utils.wording import number_of

#: What a checkpoint holds, by name.
Stored: TypeAlias = Mapping[str, Any]


def budget(args: argparse.Namespace) -> Budget | LatencyBudget:
    """Return the budget that flags name: of latency, or of counts."""
    limits = (args.max_params, args.max_macs, args.max_channels)
    if args.max_latency is None:
        if (args.runtime, args.runtime_batch, args.runtime_threads) != (PLACES[0], 1, 1):
            raise PruningError(
                "--runtime, --runtime-batch and --runtime-threads are for --max-latency: give it, too"
            )
        if not any(limits):
            raise PruningError(
                "a budget is needed: --max-macs 50%, or --max-params, --max-channels or --max-latency"
            )
        return read_flags(Budget, args)
    if any(limit is not None for limit in limits):
        raise PruningError("--max-latency stands alone: give no --max-params, --max-macs or --max-channels")
    return read_flags(LatencyBudget, args)


def slim_config(args: argparse.Namespace) -> SlimConfig:
    """Return the settings of the three stages that flags name."""
    return read_flags(SlimConfig, args, budget=budget(args))


def network(args: argparse.Namespace) -> nn.Module:
    """Return the model that flags name, on its device."""
    flags = read_flags(ModelFlags, args)
    torch.set_num_threads(min(flags.threads, torch.get_num_threads()))
    torch.manual_seed(args.seed)
    return network_with(args, flags.weights)


def network_with(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """Return the model that flags name, with the weights of another file.

    A classifier of torchvision has as many outputs as the data has classes, if no flag says otherwise.

    Raises:
        PruningError: no flag names a model, or its factory fails.
        CheckpointError: the weights do not fit, or are not finite.
    """
    head = [] if args.model is None else _head(args, weights)
    args.model_arg = [*args.model_arg, *head]
    try:
        model = _network(args, weights)
    except CheckpointError as error:
        if not head:
            raise
        source = getattr(args, "data", None) or weights
        raise CheckpointError(
            f"{error}. The network has {head[0]}: as many as {source} has classes; give "
            "weights trained for these classes"
        ) from error
    if weights is not None:
        require_finite(model, weights)
    return model.to(args.device)


def _head(args: argparse.Namespace, weights: Path | None) -> list[str]:
    """The argument with which torchvision makes a classifier for the classes of the weights or the data."""
    if ":" in args.model or any(text.partition("=")[0] == "num_classes" for text in args.model_arg):
        return []
    made = (_stored_factory(weights) if weights is not None else None) or {}
    if made.get("name") == args.model:
        return [f"{key}={value!r}" for key, value in made["arguments"].items() if key == "num_classes"]
    classes = number_of_classes(args.data) if getattr(args, "data", None) is not None else None
    return [] if classes is None else [f"num_classes={classes}"]


def _network(args: argparse.Namespace, weights: Path | None) -> nn.Module:
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
        raise PruningError(
            "a model is needed: --model NAME, one of torchvision's or package.module:factory, or --weights "
            'with a checkpoint (see "Your own model" in the documentation)'
        )
    return model


def described(args: argparse.Namespace, path: Path) -> Stored:
    """Return the content of a checkpoint; a bare state dict of the model of --model describes nothing."""
    content = read_plain(path)
    if args.model is not None and not (isinstance(content, dict) and "format" in content):
        return {"class": args.model, "arguments": {}, "provenance": {}}
    return read(path)


def _stored_factory(path: Path) -> Stored | None:
    """The factory that made the network of a checkpoint: its `name` and its `arguments`."""
    made = stored_facts(path).get("model")
    return made if isinstance(made, dict) and {"name", "arguments"} <= made.keys() else None


def stored_facts(path: Path | None) -> Stored:
    """Return the provenance in a checkpoint; empty for no file and for one of weights alone."""
    content = None if path is None else read_plain(path)
    facts = content.get("provenance") if isinstance(content, dict) else None
    return facts if isinstance(facts, dict) else {}


def _loaded(path: Path, made: Stored | None) -> nn.Module:
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
    """Return the data that flags name, or else the checkpoint.

    Raises:
        PruningError: neither does, or the checkpoint names a factory, which is not imported.
    """
    args.data = args.data or _recorded_data(args)
    flags = read_flags(DataFlags, args)
    if flags.data is None:
        raise PruningError(
            "data is needed: --data with the name of a data set, a folder of images, or module:factory, a "
            'function that returns batches to train on and to validate on (see "Your own model" in the '
            "documentation)"
        )
    if flags.cutout is not None and flags.data not in BUILT_IN:
        raise PruningError(f"--cutout is for named data sets ({', '.join(BUILT_IN)}); {flags.data} is none")
    stored = stored_facts(_checkpoint(args))
    data = make_data(
        flags.data,
        folder=flags.data_dir,
        batch_size=flags.batch_size,
        preprocessing=_preprocessing(flags, stored) if Path(flags.data).is_dir() else None,
        normalization=_normalization(flags.mean, flags.std),
        cutout_side=flags.cutout or 0,
        workers=flags.workers,
        seed=flags.seed,
        device=getattr(args, "device", "cpu"),
        arguments=arguments_of(flags.data_arg),
    )
    if data.preprocessing is not None:
        print(f"data {data}", flush=True)
        return data
    for name in ("resize", "crop", "augment"):
        if getattr(flags, name) is not None:
            raise PruningError(f"--{name} is for images of a folder; --data {flags.data} is none")
    return data


def _recorded_data(args: argparse.Namespace) -> str | None:
    """The data that the checkpoint was made with; a factory of the user's is not imported."""
    path = _checkpoint(args)
    name = stored_facts(path).get("dataset")
    if not isinstance(name, str):
        return None
    if not (name in BUILT_IN or Path(name).is_dir()):
        raise PruningError(f"data is needed: --data (the checkpoint was made with {name!r})")
    print(f"data {name!r}, as {path} says")
    return name


def _checkpoint(args: argparse.Namespace) -> Path | None:
    """The file that a command reads its network from: --weights, or the checkpoint that it names first."""
    return getattr(args, "weights", None) or getattr(args, "checkpoint", None)


def _preprocessing(flags: DataFlags, stored: Stored) -> Preprocessing:
    """How images of a folder become inputs: as flags say, or else the checkpoint."""
    if flags.image_size is not None and flags.crop is not None and flags.image_size != flags.crop:
        raise PruningError("--image-size and --crop are the same setting: give one of them")
    _normalization(flags.mean, flags.std)
    given = {key: getattr(flags, key) for key in ("resize", "mean", "std", "augment")}
    crop = flags.crop if flags.crop is not None else flags.image_size
    if flags.mean is None and "preprocessing" not in stored and "normalisation" in stored:
        given |= {key: stored["normalisation"][key] for key in ("mean", "std")}
    return Preprocessing.chosen({**given, "crop": crop}, stored.get("preprocessing"))


def require_classes(args: argparse.Namespace, outputs: object, data: Data) -> None:
    """Check that a network has as many outputs as named data, or an image folder, has classes.

    Args:
        outputs: of the network. data: data that was made from flags.

    Raises:
        PruningError: it has another number of outputs; the message names the argument that sets it.
    """
    classes = len(data.classes)
    found = outputs.shape[1] if isinstance(outputs, Tensor) and outputs.ndim == 2 else classes
    if ":" not in data.name and classes and found != classes:
        raise PruningError(
            f"the network has {number_of(found, 'output')}, data {data.name!r} has "
            f"{number_of(classes, 'class')}: give --model-arg {_classes_argument(args)}={classes}, and "
            "weights trained for these classes"
        )


def _classes_argument(args: argparse.Namespace) -> str:
    """What the factory of the network calls its number of classes."""
    names = ("num_classes", "classes", "n_classes", "nclasses", "num_labels", "num_outputs", "outputs")
    taken = parameters(factory(args.model)) if args.model and ":" in args.model else ()
    return next((name for name in names if name in taken), names[0])


def input_shape(args: argparse.Namespace) -> tuple[int, ...] | None:
    """Return the shape that --input-shape gives, where the command has the flag and it is given."""
    text = getattr(args, "input_shape", None)
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text.lower()):
        raise PruningError(f"--input-shape {text!r}: expected sizes such as 1x28x28 or 3x224x224")
    return tuple(int(size) for size in text.lower().split("x"))


def image_shape(args: argparse.Namespace, content: Stored, data: Data | None = None) -> tuple[int, ...]:
    """Return the shape of one input: from --input-shape, the content of `args.checkpoint`, or the data."""
    given, stored = input_shape(args), tuple(content["arguments"].get("image_shape", ()))
    if not stored and len(inputs := content["provenance"].get("inputs", ())) == 1:
        stored = tuple(inputs[0]["shape"])
    if given and stored and given != stored:
        asked, known = ("x".join(map(str, size)) for size in (given, stored))
        raise PruningError(f"--input-shape {asked}: {args.checkpoint} takes {known}")
    if not given and not stored and data is None:
        raise PruningError(
            f"{args.checkpoint} does not say what its inputs are: give --input-shape, such as 3x224x224"
        )
    return given or stored or tuple(tensors(_inputs(args, data))[0].shape[1:])


def stored_dtype(content: Stored) -> torch.dtype:
    """Return the type of the inputs that a checkpoint stores, or float32."""
    inputs = content["provenance"].get("inputs") or [{}]
    found = getattr(torch, str(inputs[0].get("dtype", "float32")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def normalization(args: argparse.Namespace, content: Stored) -> Stored | None:
    """Return `mean` and `std` by channel: from --mean and --std, or the content of a checkpoint."""
    given = _normalization(args.mean, args.std)
    if given is not None:
        return dict(zip(("mean", "std"), given, strict=True))
    stored = content["provenance"].get("preprocessing")
    if stored is not None:
        return {key: stored[key] for key in ("mean", "std")}
    return content["provenance"].get("normalisation")


def _normalization(
    mean: list[float] | None, std: list[float] | None
) -> tuple[list[float], list[float]] | None:
    """The mean and standard deviation of each channel, if flags give them."""
    if len(mean or []) != len(std or []):
        raise PruningError("--mean and --std go together: give as many numbers for both")
    if 0 in (std or []):
        raise PruningError("--std 0: expected numbers above 0, by which each channel is divided")
    return (mean, std) if mean and std else None


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
    try:
        outputs = require_runs(model, inputs)
    except PruningError as error:
        raise PruningError(f"{error}{_other_order(args)}") from error
    if data is not None:
        require_classes(args, outputs, data)
    if trains and batch.size > 1:
        require_runs(model, inputs, "in training mode", training=True)
    return inputs


def _other_order(args: argparse.Namespace) -> str:
    """A hint where --input-shape seems to have the channels last."""
    shape = input_shape(args) or ()
    if len(shape) == 3 and shape[2] <= 4 < min(shape[:2]):
        return f". Shapes are CxHxW: did you mean {shape[2]}x{shape[0]}x{shape[1]}?"
    return ""


def _inputs(args: argparse.Namespace, data: Data | None) -> Inputs:
    shape = input_shape(args)
    if shape is not None:
        return torch.randn(2, *shape, device=args.device)
    if data is None:
        stored = stored_facts(getattr(args, "weights", None)).get("inputs") or []
        if [each.get("dtype") for each in stored] == ["float32"]:
            return torch.randn(2, *stored[0]["shape"], device=args.device)
        raise PruningError("inputs are needed to run the model on: --data, or --input-shape CxHxW")
    return to_device((data.examples, None), torch.device(args.device))[0]
