"""What the flags of commands name: budget, settings, model, data, inputs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning.checkpoint import load, read
from pruning.cli.sources import Data, arguments_of, make_data, make_model
from pruning.errors import CheckpointError, PruningError
from pruning.planning.budget import PLACES, Budget, LatencyBudget
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.training.batches import to_device
from pruning.training.config import OPTIMIZERS, TrainConfig
from pruning.utils.files import read_plain
from pruning.utils.tree import Inputs, tensors


def budget(args: argparse.Namespace) -> Budget | LatencyBudget:
    """The budget that flags name: of latency, or of counts."""
    counts = {"params": args.max_params, "macs": args.max_macs, "channels": args.max_channels}
    if args.max_latency is None:
        if (args.runtime, args.runtime_batch, args.runtime_threads) != (PLACES[0], 1, 1):
            raise PruningError("--runtime, its batch and threads are for --max-latency: give it, too")
        return Budget(**counts)
    if any(limit is not None for limit in counts.values()):
        raise PruningError("--max-latency stands alone: give no --max-params, --max-macs or --max-channels")
    return LatencyBudget(args.max_latency, args.runtime, args.runtime_threads, args.runtime_batch)


def slim_config(args: argparse.Namespace) -> SlimConfig:
    """The settings of the three stages that flags name."""
    both = {"weight_decay": args.weight_decay, "channels_last": args.channels_last}
    rate = OPTIMIZERS[args.optimizer] if args.finetune_rate is None else args.finetune_rate
    recover = TrainConfig(args.recover_epochs, lr=args.recover_rate, **both)
    return SlimConfig(
        budget=budget(args),
        sparsify=TrainConfig(args.sparsify_epochs, lr=args.sparsify_rate, **both),
        prune=PruneConfig(
            args.iterations,
            recover,
            args.score,
            args.layers,
            args.ranking,
            args.floor,
            args.most,
            args.multiple,
        ),
        finetune=TrainConfig(
            args.finetune_epochs,
            lr=rate,
            optimizer=args.optimizer,
            ema=args.ema,
            **both,
        ),
        strength=args.sparsity,
        distill=args.distill,
        temperature=args.temperature,
        restart=args.restart,
    )


def network(args: argparse.Namespace) -> nn.Module:
    """The model that flags name, on its device."""
    torch.set_num_threads(min(args.threads, torch.get_num_threads()))
    torch.manual_seed(getattr(args, "seed", 0))
    return network_with(args, args.weights)


def network_with(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """The model that flags name, with the weights of another file."""
    if args.model is not None:
        model = make_model(args.model, arguments_of(args.model_arg), weights)
    elif weights is not None:
        made = _stored(weights)
        if made is not None and ":" not in made["name"]:
            model = make_model(made["name"], made["arguments"], weights)
        else:
            model = _loaded(weights, made)
    else:
        raise PruningError("a model is needed: --model NAME, or --weights with a checkpoint of this toolkit")
    return model.to(args.device)


def described(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The content of a checkpoint; weights alone, of the network that flags name, describe nothing."""
    content = read_plain(path)
    if args.model is not None and not (isinstance(content, dict) and "format" in content):
        return {"class": args.model, "arguments": {}, "provenance": {}}
    return read(path)


def _stored(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says it was made of: the `name` of a factory and its `arguments`."""
    content = read_plain(path)
    facts = content.get("provenance") if isinstance(content, dict) else None
    made = facts.get("model") if isinstance(facts, dict) else None
    return made if isinstance(made, dict) and {"name", "arguments"} <= made.keys() else None


def _loaded(path: Path, made: dict[str, Any] | None) -> nn.Module:
    """The network of a checkpoint by its class alone; a factory of another's is named, not imported."""
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
    """The data that flags name, if they name any."""
    return None if args.data is None else required_data(args)


def required_data(args: argparse.Namespace) -> Data:
    """The data that flags name; raises `PruningError` where they name none."""
    if args.data is None:
        raise PruningError("data is needed: --data NAME, FOLDER or module:factory")
    return make_data(
        args.data,
        folder=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        workers=args.workers,
        seed=args.seed,
        arguments=arguments_of(args.data_arg),
    )


def input_shape(args: argparse.Namespace) -> tuple[int, ...] | None:
    """What --input-shape says, where it is a flag and given."""
    text = getattr(args, "input_shape", None)
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text.lower()):
        raise PruningError(f"--input-shape {text!r}: expected sizes such as 1x28x28 or 3x224x224")
    return tuple(int(size) for size in text.lower().split("x"))


def image_shape(
    args: argparse.Namespace, content: Mapping[str, Any], data: Data | None = None
) -> tuple[int, ...]:
    """The shape of one input: as --input-shape, the content of `args.checkpoint` or the data say."""
    given, stored = input_shape(args), tuple(content["arguments"].get("image_shape", ()))
    if given and stored and given != stored:
        asked, known = ("x".join(map(str, size)) for size in (given, stored))
        raise PruningError(f"--input-shape {asked}: {args.checkpoint} takes {known}")
    if not given and not stored and data is None:
        raise PruningError(
            f"{args.checkpoint} does not say what its inputs are: give --input-shape, such as 3x224x224"
        )
    return given or stored or tuple(tensors(examples(args, data))[0].shape[1:])


def normalisation(args: argparse.Namespace, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """`mean` and `std` by channel: as --mean and --std or the content of a checkpoint say."""
    if bool(args.mean) != bool(args.std) or len(args.mean or ()) != len(args.std or ()):
        raise PruningError("--mean and --std go together: as many numbers for both")
    if 0 in (args.std or ()):
        raise PruningError("--std 0: what the images were divided by was expected, above 0")
    if args.mean:
        return {"mean": args.mean, "std": args.std}
    return content["provenance"].get("normalisation")


def examples(args: argparse.Namespace, data: Data | None) -> Inputs:
    """Example inputs of the data, or random ones of a shape."""
    shape = input_shape(args)
    if shape is not None:
        return torch.randn(2, *shape, device=args.device)
    if data is None:
        raise PruningError("inputs are needed to run the model on: --data, or --input-shape CxHxW")
    return to_device((data.examples, None), torch.device(args.device))[0]
