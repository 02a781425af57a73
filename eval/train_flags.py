"""Flags of train_yournet.py: the command line takes precedence over the recipe; config.json keeps both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import models
from eval.cli import COMMITTED, ROOT, ScriptFlags, Seed, Threads
from pruning import PruningError, SlimConfig, cli
from pruning.cli import argument_types
from pruning.cli import arguments as flags
from pruning.cli.flags import STAGES, RunFlags
from pruning.cli.parsers import HelpFormatter, Parser
from pruning.utils.settings import Setting

RECIPE = ROOT / "checkpoints" / "nano" / "recipe.toml"
#: The default recipe where only the embedded digits are available, or are requested.
RECIPE_MNIST5K = RECIPE.with_name("mnist5k.toml")

#: Flags that do not affect the result of a run, or that config.json stores in another form.
_OF_ONE_CALL = {"output", "resume", "publish", "data_dir", "data", "recipe", "reference", "tensorboard"}
#: Flags that earlier runs did not have, with their defaults; they are kept where they are given.
_LATER = flags.later_flags(SlimConfig)


@dataclass(frozen=True, kw_only=True)
class YourNetFlags(ScriptFlags):
    recipe: Annotated[
        Path,
        Setting("TOML file with flags of this command; the command line takes precedence", metavar="FILE"),
    ] = RECIPE
    start: Annotated[
        str, Setting("the dense network to slim", choices=tuple(models.STARTS), group="model")
    ] = "lenet5"
    teacher: Annotated[
        str | None,
        Setting(
            "checkpoint of the teacher (default: the dense network of stage 1)",
            metavar="PATH",
            group="training",
        ),
    ] = None
    augment: Annotated[
        float,
        Setting(
            "strength of augmentation: 1 rotates, shifts and scales half of the images by up to 10 degrees, "
            "1 pixel, 10 %",
            metavar="STRENGTH",
            least=0,
            group="data",
        ),
    ] = 0.0
    seed: Seed = 0
    threads: Threads = 2
    reference: Annotated[
        Path | None,
        Setting(
            "LeNet-5 to compare with (default: the committed one on MNIST; on other data the run trains one)",
            metavar="PATH",
            group="run",
        ),
    ] = None
    publish: Annotated[
        bool, Setting(f"copy the result to {COMMITTED['YourNet'].relative_to(ROOT).as_posix()}", group="run")
    ] = False


def arguments(
    argv: Sequence[str] | None = None, recipe: Path = RECIPE, description: str | None = None
) -> argparse.Namespace:
    """Parse the command line or `argv`; defaults come from the recipe or from the resumed run."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    flags.add_flags(parser, flags.FlagsOf(YourNetFlags, {"recipe": recipe}), *STAGES, RunFlags)
    first = Parser(add_help=False)
    first.add_argument("--recipe", type=Path, default=recipe)
    first.add_argument("--max-latency")
    given = first.parse_known_args(argv)[0]
    wanted = cli.read_recipe(given.recipe, parser)
    if given.max_latency is not None:  # replaces the recipe's limits on counts
        wanted = [flag for flag in wanted if not flag.startswith("--max-")]
    parser.set_defaults(**vars(parser.parse_args(["--recipe", str(given.recipe), *wanted])))
    args = parser.parsed(argv)
    if args.resume:
        folder = args.output or _newest_run()
        parser.set_defaults(**_saved_flags(folder))
        args = parser.parsed(argv)
        args.output = folder
    elif args.output is None:
        args.output = cli.next_run()
    return args


def settings(args: argparse.Namespace, dataset: str, config: SlimConfig) -> dict[str, object]:
    """Return the content of config.json: all settings that affect the result."""
    kept = {
        key: value
        for key, value in vars(args).items()
        if key not in _OF_ONE_CALL and not (key in _LATER and (value or None) == (_LATER[key] or None))
    }
    return {**kept, "data": dataset, "stages": config.to_json()}


def _newest_run() -> Path:
    configs = sorted(argument_types.RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise PruningError(f"{argument_types.RUNS}/ holds no run to resume")
    return configs[-1].parent


def _saved_flags(folder: Path) -> dict[str, object]:
    """Return the flags with which a run was started."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        return {key: value for key, value in saved.items() if key != "stages"}
    except (OSError, ValueError) as error:
        raise PruningError(f"{folder} holds no run to resume: {error}") from error
