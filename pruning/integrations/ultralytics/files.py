"""Load models of the library, and save pruned ones as files of the library."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import YOLO

from pruning.errors import CheckpointError, PruningError
from pruning.integrations.ultralytics.library import network, plain, quiet, require_tested
from pruning.utils.files import replace_file

#: Entries of a file that belong to an unfinished training.
OF_TRAINING = ("epoch", "ema", "updates", "optimizer", "scaler", "stopper", "best_fitness", "modelopt")


def load(weights: str | Path, task: str | None = None) -> YOLO:
    """Return the `YOLO` object of a file, or of a name that the library knows.

    Weights of the library's own names (`yolov8n.pt`) are downloaded, unless the file exists. A name with
    `.yaml` makes a model with random weights. A .pt file is a pickle, which can execute code: load files that
    you trust.

    Args:
        weights: a .pt file, or a .yaml description. task: of a description that does not show it.

    Raises:
        PruningError: if the version of the library is untested, and if the weights cannot be found,
            downloaded or read.

    Example:
        ```python
        yolo = load("yolov8n.yaml")
        ```
    """
    require_tested()
    path, name = Path(weights), str(weights)
    suffix = path.suffix.lower()
    if suffix not in (".pt", ".yaml", ".yml"):
        raise PruningError(f"weights {name!r}: expected a .pt file, or a .yaml description of a model")
    there = path.exists()
    try:
        with quiet():
            yolo = YOLO(name, task=task)
    except Exception as error:  # of any kind: the library reads and downloads
        if suffix != ".pt":
            reason = f"no model can be made of it: {plain(error)}"
        elif there:
            reason = f"it is no model of ultralytics, or damaged: {plain(error)}"
        else:
            reason = (
                "there is no such file, and it could not be downloaded. Give a local .pt file, or a .yaml "
                f"such as yolov8n.yaml to start from random weights ({plain(error)[:120]})"
            )
        raise PruningError(f"weights {name!r}: {reason}") from error
    if not isinstance(yolo.model, nn.Module):
        raise PruningError(f"weights {name!r}: they hold no network of PyTorch")
    return yolo


def save(yolo: YOLO, path: str | Path, *, half: bool = True) -> Path:
    """Write a model as a .pt file of the library, atomically; `YOLO(path)` reads it without this toolkit.

    Args:
        yolo: its network is not changed. Afterwards the object refers to the file, as if loaded from it.
        path: of the file; missing folders are created.
        half: store weights in half precision, as the library does.

    Raises:
        CheckpointError: if the file cannot be written. PruningError: if the network is fused.

    Example:
        ```python
        save(yolo, "pruned.pt")
        ```
    """
    path = Path(path)
    model: Any = network(yolo)
    if path.suffix != ".pt":
        raise CheckpointError(f"{path}: the library reads .pt files only; choose a name with .pt")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        yolo.save(file)
        content = torch.load(file, map_location="cpu", weights_only=False)  # just written
        for key in OF_TRAINING:
            content[key] = None
        content["epoch"] = -1
        if not half:
            content["model"] = model
        torch.save(content, file)
        replace_file(path, file.read_bytes())
    yolo.ckpt_path = yolo.overrides["model"] = str(path)
    setattr(model, "pt_path", str(path))  # noqa: B010 (not a declared attribute)
    return path
