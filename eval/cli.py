"""Flags and loading of networks that the four scripts share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import torch
from torch import nn

import data
from pruning import cli, load
from pruning.errors import CheckpointError
from pruning.utils.files import replace_file
from pruning.utils.settings import Setting

Network = TypeVar("Network", bound=nn.Module)
ROOT = Path(__file__).resolve().parent.parent
COMMITTED = {
    "LeNet5": ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth",
    "YourNet": ROOT / "checkpoints" / "YourNet" / "best.pth",
}

Threads: TypeAlias = Annotated[int, Setting("most CPU threads in training", metavar="N", least=1)]
Seed: TypeAlias = Annotated[
    int, Setting("seed of the weights and the order of images", metavar="SEED", least=0, most=2**63 - 1)
]
BestCheckpoint: TypeAlias = Annotated[Path, Setting("network to measure", metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class ScriptFlags:
    """The flags that every script has."""

    device: Annotated[str, Setting("cpu or cuda", metavar="DEVICE", parse=cli.device)] = "cpu"
    batch_size: Annotated[int, Setting("images in a training step", metavar="IMAGES", least=1)] = 64
    data: Annotated[
        str,
        Setting(
            "data set; auto: MNIST, or if it is not available the 5,000 digits that come with the project",
            choices=tuple(data.NAMES),
        ),
    ] = "auto"
    data_dir: Annotated[
        Path,
        Setting(
            "folder of the full data sets, also for downloads; MNIST_DIR names another folder with MNIST",
            metavar="FOLDER",
        ),
    ] = ROOT / "data"


@dataclass(frozen=True, kw_only=True)
class TestFlags(ScriptFlags):
    """The flags of the scripts that measure a trained network."""

    batch_size: Annotated[int, Setting("images in a timed forward pass", metavar="IMAGES", least=1)] = 64
    threads: Annotated[int, Setting("CPU threads of a timed forward pass", metavar="N", least=1)] = 1
    json: Annotated[
        Path | None,
        Setting("also write the figures to this file, as JSON", metavar="PATH", parse=cli.new_file),
    ] = None


def load_network(path: Path, kind: type[Network], device: str) -> Network:
    """Load the network of a checkpoint, which must be of exactly the class `kind`."""
    model = load(path, device=device)
    if not isinstance(model, kind) or type(model) is not kind:
        raise CheckpointError(f"{path} holds a {type(model).__name__}, a {kind.__name__} was expected")
    return model


def write_json(path: Path | None, content: Mapping[str, object]) -> None:
    """Write figures as JSON if a path is given."""
    if path is not None:
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def use_threads(count: int) -> None:
    """Use this many CPU threads in training, but no more than torch uses by default."""
    torch.set_num_threads(min(count, torch.get_num_threads()))
