"""Flags that say what a network is trained on and how."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import data
from benchmarks.fair.recipes import RECIPES, Recipe
from benchmarks.fair.training import Workshop
from eval.cli import ROOT
from pruning import Budget, PruningError, cli
from pruning.cli.argument_types import device


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the data, the device and the recipe."""
    parser.add_argument("--data", choices=data.NAMES, default="cifar10", help="data set")
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / "data", metavar="FOLDER", help="folder of the data set"
    )
    parser.add_argument("--threads", type=cli.whole_number(1), default=1, help="CPU threads of each job")
    parser.add_argument(
        "--device", type=device, default="cpu", help="cpu or cuda; times are always those of a CPU"
    )
    recipe = parser.add_argument_group("training (default: the recipe of the network)")
    for name in ("epochs", "dense_epochs", "batch_size", "train", "cutout"):
        recipe.add_argument(f"--{name.replace('_', '-')}", type=cli.whole_number(1), metavar="N")
    for name in ("rate", "later_rate", "weight_decay"):
        recipe.add_argument(f"--{name.replace('_', '-')}", type=cli.number(0), metavar="X")
    recipe.add_argument("--bf16", action="store_true", default=None, help="forward passes in bfloat16")


def share(text: str) -> str:
    """Check a command-line argument that is a share of the MACs."""
    try:
        Budget(macs=text)
    except PruningError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share, for example 50%")
    return text


def recipe_of(name: str, args: argparse.Namespace) -> Recipe:
    """Return the recipe of a network, with what flags change."""
    given = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    changed = {key: value for key, value in given.items() if value is not None}
    return replace(RECIPES.get(name, Recipe()), **changed)


@lru_cache(maxsize=4)
def source(name: str, folder: Path, train: int | None, device: str) -> data.Dataset:
    """Return data in memory, with as many training images as asked for."""
    found = data.load(name, folder, quiet=True)
    return replace(found, train=found.train.first(train)).to(device)


def key_of(found: data.Dataset) -> str:
    """Return the name of a data set with a hash of its pixels and labels: copies of a data set may differ."""
    content = hashlib.sha256()
    for split in (found.train, found.validation, found.test):
        for tensor in split:
            content.update(tensor.cpu().numpy().tobytes())
    return f"{found.name}-{content.hexdigest()[:8]}"


def workshop_of(name: str, args: argparse.Namespace) -> Workshop:
    """Return what the cells of a network share."""
    recipe = recipe_of(name, args)
    found = source(args.data, args.data_dir, recipe.train, args.device)
    return Workshop(name, recipe, found, key_of(found), args.runs, args.device)


def settings(workshop: Workshop) -> dict[str, Any]:
    """Return the settings of a network, which all its cells share."""
    return {
        "data": workshop.source_key,
        "device": workshop.device.split(":")[0],
        **asdict(workshop.recipe),
    }
