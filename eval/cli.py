"""What the four scripts share: flags, and loading the right network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import data
from pruning import CheckpointError, cli, load
from pruning.utils.files import replace_file

Network = TypeVar("Network", bound=nn.Module)
ROOT = Path(__file__).resolve().parent.parent
COMMITTED = {
    "LeNet5": ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth",
    "YourNet": ROOT / "checkpoints" / "YourNet" / "best.pth",
}


def parser(description: str, *, batch_size: str) -> argparse.ArgumentParser:
    """A parser with the flags that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=cli.HelpFormatter)
    made.add_argument("--device", type=cli.device, default="cpu", metavar="DEVICE", help="cpu or cuda")
    made.add_argument("--batch-size", type=cli.whole_number(1), default=64, metavar="IMAGES", help=batch_size)
    made.add_argument(
        "--data",
        choices=data.NAMES,
        default="auto",
        help="data set; auto: MNIST, and where it cannot be had, the 5,000 digits that come with the project",
    )
    made.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / "data",
        metavar="FOLDER",
        help="where full data sets lie or are downloaded to; MNIST is also found through MNIST_DIR",
    )
    return made


def test_parser(description: str, network: str) -> argparse.ArgumentParser:
    """A parser for the scripts that measure a trained network."""
    made = parser(description, batch_size="images in a timed forward pass")
    made.add_argument(
        "--best-checkpoint", type=Path, default=COMMITTED[network], metavar="PATH", help="network to measure"
    )
    made.add_argument(
        "--threads",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="CPU threads of a timed forward pass",
    )
    made.add_argument("--json", type=cli.new_file, metavar="PATH", help="also write the figures here")
    return made


def load_network(path: Path, kind: type[Network], device: str) -> Network:
    """The network of a checkpoint, which must be of exactly this kind."""
    model = load(path, device=device)
    if not isinstance(model, kind) or type(model) is not kind:
        raise CheckpointError(f"{path} holds a {type(model).__name__}, a {kind.__name__} was expected")
    return model


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write figures machine-readably, where a path was given."""
    if path is not None:
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def use_threads(count: int) -> None:
    """So many CPU threads in training, but no more than there are cores."""
    torch.set_num_threads(min(count, torch.get_num_threads()))
