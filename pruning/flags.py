"""Flags that several commands share, and what they name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning import cli
from pruning.budget import PLACES, Budget, LatencyBudget
from pruning.checkpoint import load, read, read_plain
from pruning.config import PruneConfig, SlimConfig, TrainConfig
from pruning.errors import CheckpointError, PruningError
from pruning.graph import Inputs, tensors
from pruning.plan import RANKINGS
from pruning.prune import NAMES as SCORES
from pruning.sources import Data, arguments_of, make_data, make_model
from pruning.training import to_device


def model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    _factory_flags(group)
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="state dict, or a checkpoint of this toolkit"
    )
    group.add_argument("--device", type=cli.device, default="cpu", metavar="DEVICE", help="cpu or cuda")
    group.add_argument(
        "--threads", type=cli.whole_number(1), default=2, metavar="N", help="CPU threads, at most"
    )


def _factory_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model",
        metavar="NAME",
        help="package.module:factory, or one of torchvision's classifiers (resnet18); not needed for a "
        "checkpoint of this toolkit whose class can be imported",
    )
    group.add_argument(
        "--model-arg",
        action=cli.Several,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the factory",
    )
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML file with flags of this command")


def ignore_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--ignore",
        action=cli.Several,
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that keep their channels: layer4.*, conv1",
    )


def calibration_flag(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--calibration",
        type=cli.whole_number(1),
        default=default,
        metavar="N",
        help="examples of the training split for scores",
    )


def data_flags(parser: argparse.ArgumentParser, *, required: bool, shape: bool = True) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="NAME",
        help="mnist, fashion-mnist, kmnist, cifar10, cifar100; an image folder with a subfolder a class "
        "(or train, val and test of such); or module:factory that gives train, validation and test batches",
    )
    group.add_argument(
        "--data-arg",
        action=cli.Several,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the factory",
    )
    group.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="FOLDER", help="where data sets lie"
    )
    group.add_argument(
        "--batch-size", type=cli.whole_number(1), default=64, metavar="N", help="examples in a batch"
    )
    group.add_argument(
        "--image-size", type=cli.whole_number(1), default=224, metavar="PIXELS", help="of a folder's images"
    )
    group.add_argument(
        "--workers", type=cli.whole_number(0), default=0, metavar="N", help="processes that read images"
    )
    group.add_argument("--seed", type=cli.seed, default=0, help="of weights, order and splits")
    if shape and not required:
        group.add_argument(
            "--input-shape",
            metavar="CxHxW",
            help="of one example, to trace with random ones where no data is given: 3x224x224",
        )


def checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Of commands that make something of a checkpoint, on the CPU."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of a network")
    parser.add_argument(
        "--input-shape",
        metavar="CxHxW",
        help="of one input, such as 3x224x224; default: the image_shape that the checkpoint stores",
    )
    parser.add_argument(
        "--mean", type=cli.number(float("-inf")), nargs="+", metavar="X",
        help="what was subtracted from each channel of the training images; default: as the checkpoint says",
    )  # fmt: skip
    parser.add_argument("--std", type=cli.number(0), nargs="+", metavar="X", help="what each was divided by")
    _factory_flags(parser)
    data_flags(parser, required=False, shape=False)
    parser.set_defaults(device="cpu")


def run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--output",
        type=cli.folder,
        metavar="FOLDER",
        help="of this run alone (default: the next free runs/N)",
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in --output")
    group.add_argument("--tensorboard", action="store_true", help="also write the history for TensorBoard")


def result_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make BatchNorm part of the layers before it in the saved network",
    )
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="also write load_pruned.py, which loads the checkpoint without this toolkit",
    )


def stage_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the three stages and of the budget, for `slim_config`."""
    budget_flags(parser)
    group = parser.add_argument_group("the three stages")
    group.add_argument(
        "--sparsity",
        type=cli.strength,
        metavar="LAMBDA",
        help="strength of the L1 pull of stage 1; auto finds it from the budget (default)",
    )
    group.add_argument(
        "--layers",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also remove whole layers without which a trial is better",
    )
    group.add_argument(
        "--iterations", type=cli.whole_number(1), default=5, metavar="N", help="pruning steps in stage 2"
    )
    for stage, (epochs, rate, when) in {
        "sparsify": (8, 0.1, "stage 1"),
        "recover": (2, 0.05, "each pruning step of stage 2"),
        "finetune": (40, 0.2, "stage 3"),
    }.items():
        group.add_argument(
            f"--{stage}-epochs", type=cli.whole_number(0), default=epochs, metavar="N", help=f"of {when}"
        )
        group.add_argument(
            f"--{stage}-rate",
            type=cli.number(0),
            default=rate,
            metavar="RATE",
            help=f"highest learning rate of {when}",
        )
    group.add_argument(
        "--restart",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train stage 3 from fresh weights, so that stage 2 gives the widths alone; for small networks",
    )
    training_flags(parser)


def budget_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a budget and of a plan within it."""
    budget = parser.add_argument_group(
        "budget: a count (2000, 50k) or a percentage of the dense network (25%)"
    )
    budget.add_argument("--max-params", metavar="PARAMS", help="most parameters, BatchNorm folded")
    budget.add_argument("--max-macs", metavar="MACS", help="most multiply-adds for one example")
    budget.add_argument("--max-channels", metavar="CHANNELS", help="most channels of all groups together")
    latency = parser.add_argument_group("budget of latency, measured on this machine")
    latency.add_argument(
        "--max-latency", metavar="TIME", help="0.5x of the dense network's, or 2ms per example"
    )
    latency.add_argument("--runtime", choices=PLACES, default=PLACES[0], help="where the network will run")
    latency.add_argument(
        "--runtime-batch", type=cli.whole_number(1), default=1, metavar="N", help="examples in a pass"
    )
    latency.add_argument(
        "--runtime-threads", type=cli.whole_number(1), default=1, metavar="N", help="CPU threads of a pass"
    )
    plan = parser.add_argument_group("which channels go")
    plan.add_argument("--score", choices=SCORES, default="taylor", help="importance of a channel")
    plan.add_argument(
        "--ranking",
        choices=RANKINGS,
        default="global",
        help="compare the scores of all groups, or take the same share of every group",
    )
    ignore_flag(plan)
    plan.add_argument(
        "--floor",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="channels that every group keeps at least",
    )
    plan.add_argument(
        "--most",
        type=cli.number(0, 1),
        default=1.0,
        metavar="SHARE",
        help="largest share of a group's channels dropped in one step",
    )
    plan.add_argument(
        "--multiple",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="widths are multiples of so many channels, the full width or the floor",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that hold for the training of every stage."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--weight-decay", type=cli.number(0), default=1e-3, metavar="FACTOR", help="L2 factor on weights"
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train with the channels of convolutions last in memory: may pay on one thread",
    )
    group.add_argument(
        "--ema",
        type=cli.number(0, 0.99999),
        default=0.0,
        metavar="DECAY",
        help="of a moving average of the weights in stage 3; 0 keeps none",
    )
    group.add_argument(
        "--distill",
        type=cli.number(0, 1),
        default=0.0,
        metavar="WEIGHT",
        help="share of the teacher's outputs in the loss of stages 2 and 3",
    )
    group.add_argument(
        "--temperature",
        type=cli.number(1e-3),
        default=4.0,
        metavar="T",
        help="by which the teacher's and the network's outputs are divided before they are compared",
    )


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
        finetune=TrainConfig(args.finetune_epochs, lr=args.finetune_rate, ema=args.ema, **both),
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
