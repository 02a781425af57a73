"""Flags that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pruning.cli import arguments
from pruning.planning.budget import PLACES
from pruning.planning.options import RANKINGS
from pruning.planning.scores import NAMES as SCORES
from pruning.training.config import OPTIMIZERS


def model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    _factory_flags(group)
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="state dict, or a checkpoint of this toolkit"
    )
    group.add_argument("--device", type=arguments.device, default="cpu", metavar="DEVICE", help="cpu or cuda")
    group.add_argument(
        "--threads", type=arguments.whole_number(1), default=2, metavar="N", help="CPU threads, at most"
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
        action=arguments.Several,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the factory",
    )
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML file with flags of this command")


def ignore_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--ignore",
        action=arguments.Several,
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that keep their channels: layer4.*, conv1",
    )


def calibration_flag(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--calibration",
        type=arguments.whole_number(1),
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
        action=arguments.Several,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the factory",
    )
    group.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="FOLDER", help="where data sets lie"
    )
    group.add_argument(
        "--batch-size", type=arguments.whole_number(1), default=64, metavar="N", help="examples in a batch"
    )
    group.add_argument(
        "--image-size",
        type=arguments.whole_number(1),
        default=224,
        metavar="PIXELS",
        help="of a folder's images",
    )
    group.add_argument(
        "--workers", type=arguments.whole_number(0), default=0, metavar="N", help="processes that read images"
    )
    group.add_argument("--seed", type=arguments.seed, default=0, help="of weights, order and splits")
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
        "--mean", type=arguments.number(float("-inf")), nargs="+", metavar="X",
        help="what was subtracted from each channel of the training images; default: as the checkpoint says",
    )  # fmt: skip
    parser.add_argument(
        "--std", type=arguments.number(0), nargs="+", metavar="X", help="what each was divided by"
    )
    _factory_flags(parser)
    data_flags(parser, required=False, shape=False)
    parser.set_defaults(device="cpu")


def run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--output",
        type=arguments.folder,
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
        type=arguments.strength,
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
        "--iterations",
        type=arguments.whole_number(1),
        default=5,
        metavar="N",
        help="pruning steps in stage 2",
    )
    rates: dict[str, tuple[int, float | None, str]] = {
        "sparsify": (8, 0.1, "stage 1"),
        "recover": (2, 0.05, "each pruning step of stage 2"),
        "finetune": (40, None, "stage 3"),
    }
    for stage, (epochs, rate, when) in rates.items():
        group.add_argument(
            f"--{stage}-epochs",
            type=arguments.whole_number(0),
            default=epochs,
            metavar="N",
            help=f"of {when}",
        )
        group.add_argument(
            f"--{stage}-rate",
            type=arguments.number(0),
            default=rate,
            metavar="RATE",
            help=f"highest learning rate of {when}"
            + ("" if rate else "; default: " + ", ".join(f"{r} with {o}" for o, r in OPTIMIZERS.items())),
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
        "--runtime-batch", type=arguments.whole_number(1), default=1, metavar="N", help="examples in a pass"
    )
    latency.add_argument(
        "--runtime-threads",
        type=arguments.whole_number(1),
        default=1,
        metavar="N",
        help="CPU threads of a pass",
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
        type=arguments.whole_number(1),
        default=1,
        metavar="N",
        help="channels that every group keeps at least",
    )
    plan.add_argument(
        "--most",
        type=arguments.number(0, 1),
        default=1.0,
        metavar="SHARE",
        help="largest share of a group's channels dropped in one step",
    )
    plan.add_argument(
        "--multiple",
        type=arguments.whole_number(1),
        default=1,
        metavar="N",
        help="widths are multiples of so many channels, the full width or the floor",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that hold for the training of every stage."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        default="sgd",
        help="of stage 3; soap needs fewer epochs, for networks of at most a few thousand parameters",
    )
    group.add_argument(
        "--weight-decay",
        type=arguments.number(0),
        default=1e-3,
        metavar="FACTOR",
        help="L2 factor on weights",
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train with the channels of convolutions last in memory: may pay on one thread",
    )
    group.add_argument(
        "--ema",
        type=arguments.number(0, 0.99999),
        default=0.0,
        metavar="DECAY",
        help="of a moving average of the weights in stage 3; 0 keeps none",
    )
    group.add_argument(
        "--distill",
        type=arguments.number(0, 1),
        default=0.0,
        metavar="WEIGHT",
        help="share of the teacher's outputs in the loss of stages 2 and 3",
    )
    group.add_argument(
        "--temperature",
        type=arguments.number(1e-3),
        default=4.0,
        metavar="T",
        help="by which the teacher's and the network's outputs are divided before they are compared",
    )


#: Where runs go that are told no folder.
RUNS = Path("runs")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one, and the description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Several(argparse.Action):
    """Values that stand in place of the default, and add up where the flag is given again."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if before is self.default else [*before, *values])


def next_run() -> Path:
    """The next free numbered folder of `RUNS`."""
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdigit()]
    return RUNS / str(max(numbers, default=0) + 1)


def new_file(text: str) -> Path:
    """An argument type: a file that is to be written, and is no folder."""
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected the name of a file")
    return Path(text)


def folder(text: str) -> Path:
    """An argument type: a folder that is to be written to, there or not."""
    place = Path(text)
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is a file")
    return place


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number that is at least `least`, and at most `most` where there is one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bounds = f"from {least}" + (f" to {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number {bounds}")
        return value

    return parse


#: An argument type: what torch's generators can be seeded with.
seed = whole_number(0, 2**63 - 1)


def number(least: float, most: float = float("inf")) -> Callable[[str], float]:
    """An argument type: a number between two bounds, both allowed."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            bounds = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number {bounds}")
        return value

    return parse


def device(text: str) -> str:
    """An argument type: a device that torch can use here and that holds values."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "it is not available"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    if torch.device(text).type == "meta":
        raise argparse.ArgumentTypeError(f"{text!r} holds no values to prune: expected cpu or cuda")
    return text


def strength(text: str) -> float | None:
    """An argument type: λ, or `auto`, which is None."""
    return None if text == "auto" else number(0)(text)
