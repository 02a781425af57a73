"""What command lines share: argument types, and how they end."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pruning.budget import Budget
from pruning.checkpoint import replace_file
from pruning.config import PruneConfig, SlimConfig, TrainConfig
from pruning.errors import PruningError, UserError
from pruning.plan import RANKINGS
from pruning.prune import NAMES as SCORES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Where runs go that are told no folder.
RUNS = Path("runs")
#: Exit codes: bad usage or input, and Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one, and the description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def read_recipe(path: Path, parser: argparse.ArgumentParser, given: Sequence[str] = ()) -> list[str]:
    """The flags that a TOML file holds: `max-params = 2000` is --max-params 2000.

    `true` and `false` stand for a flag and its --no- form, an array for a flag with several
    values. Flags that are among the words `given` on the command line are left out.

    Raises `PruningError` for a file that cannot be read, a name that is no flag of the parser
    (it says which is near), or a value of another kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruningError(f"{path} cannot be read as a recipe: {error}") from error
    known = [
        option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"
    ]
    words = {word.partition("=")[0] for word in given}
    flags = []
    for name, value in content.items():
        if {f"--{name}", f"--no-{name}"} & words:
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise PruningError(
                f"{path}: there is no setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        if value is True or (value is False and f"no-{name}" in known):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            flags.append(f"--{name}={value}")
        elif value is not False:
            raise PruningError(f"{path}: {name} is a {type(value).__name__}, a plain value was expected")
    return flags


def write_recipe(path: Path, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the TOML file from which `read_recipe` gives these flags again, but for `path` flags."""
    lines = ["# The flags of this run: give this file as --config to repeat it."]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        long = next((o[2:] for o in action.option_strings if o.startswith("--")), "")
        if not long or value is None or value == [] or action.dest in ("help", "config", "output", "resume"):
            continue
        lines.append(f"{long} = {_toml(value)}")
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Call `main`; end with one line and an exit code when the user's input was at fault.

    `interrupted` is said after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks γ or ≤ shows a ? for it
            stream.reconfigure(errors="replace")
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def next_run() -> Path:
    """The next free numbered folder of `RUNS`."""
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdigit()]
    return RUNS / str(max(numbers, default=0) + 1)


def whole_number(least: int) -> Callable[[str], int]:
    """An argument type: a whole number that is at least `least`."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}")
        return int(text)

    return parse


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
    """An argument type: a device that torch can use here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "it is not available"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return text


def stage_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the three stages and of the budget, for `slim_config`."""
    budget_flags(parser)
    group = parser.add_argument_group("the three stages")
    group.add_argument(
        "--sparsity",
        type=strength,
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
        "--iterations", type=whole_number(1), default=5, metavar="N", help="pruning steps in stage 2"
    )
    for stage, (epochs, rate, when) in {
        "sparsify": (8, 0.1, "stage 1"),
        "recover": (2, 0.05, "each pruning step of stage 2"),
        "finetune": (40, 0.2, "stage 3"),
    }.items():
        group.add_argument(
            f"--{stage}-epochs", type=whole_number(0), default=epochs, metavar="N", help=f"of {when}"
        )
        group.add_argument(
            f"--{stage}-rate",
            type=number(0),
            default=rate,
            metavar="RATE",
            help=f"highest learning rate of {when}",
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
    plan = parser.add_argument_group("which channels go")
    plan.add_argument("--score", choices=SCORES, default="taylor", help="importance of a channel")
    plan.add_argument(
        "--ranking",
        choices=RANKINGS,
        default="global",
        help="compare the scores of all groups, or take the same share of every group",
    )
    plan.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that keep their channels: layer4.*, conv1",
    )
    plan.add_argument(
        "--floor",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="channels that every group keeps at least",
    )
    plan.add_argument(
        "--most",
        type=number(0, 1),
        default=1.0,
        metavar="SHARE",
        help="largest share of a group's channels dropped in one step",
    )
    plan.add_argument(
        "--multiple",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="widths are multiples of so many channels",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that hold for the training of every stage."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--weight-decay", type=number(0), default=1e-3, metavar="FACTOR", help="L2 factor on weights"
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train with the channels of convolutions last in memory: may pay on one thread",
    )
    group.add_argument(
        "--ema",
        type=number(0, 0.99999),
        default=0.0,
        metavar="DECAY",
        help="of a moving average of the weights in stage 3; 0 keeps none",
    )
    group.add_argument(
        "--distill",
        type=number(0, 1),
        default=0.0,
        metavar="WEIGHT",
        help="share of the teacher's outputs in the loss of stages 2 and 3",
    )


def budget(args: argparse.Namespace) -> Budget:
    """The budget that flags name."""
    return Budget(params=args.max_params, macs=args.max_macs, channels=args.max_channels)


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
    )


def strength(text: str) -> float | None:
    """An argument type: λ, or `auto`, which is None."""
    return None if text == "auto" else number(0)(text)
