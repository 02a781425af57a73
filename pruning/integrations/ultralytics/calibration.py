"""Batches of a data set of the library, and the loss of a model, to score channels and to fit layers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT

from pruning.integrations.ultralytics.library import network, quiet, random_state_kept, user_input
from pruning.integrations.ultralytics.trainer import trainer_for
from pruning.planning.width_sweep import Batch

#: Augmentations of the library that are turned off for calibration.
_AUGMENTATIONS = (
    "mosaic", "mixup", "cutmix", "copy_paste", "degrees", "translate", "scale", "shear", "perspective",
    "flipud", "fliplr", "bgr", "hsv_h", "hsv_s", "hsv_v", "erasing", "multi_scale",
)  # fmt: skip


def calibration_batches(
    yolo: YOLO, data: str | Path, images: int = 64, *, imgsz: int = 640, batch: int = 16
) -> list[Batch]:
    """Return batches of training images of a data set, resized as for inference, with their labels.

    Args:
        yolo: a model of the data's task. data: a data set of the library, such as a data.yaml.
        images: least number of images, if there are so many. imgsz: height and width of the images.
        batch: number of images in a batch.

    Returns:
        Pairs of images (N, channels, imgsz, imgsz) in [0, 1], and the labels as the model's loss takes them.

    Raises:
        PruningError: if the data set cannot be read, or has no training images.

    Example:
        ```python
        batches = calibration_batches(yolo, "data.yaml", images=64, imgsz=640)
        ```
    """
    found: list[Batch] = []
    with _reader(yolo, data, imgsz, batch) as trainer:
        for content in trainer.get_dataloader(trainer.data["train"], batch_size=batch, rank=-1, mode="train"):
            labels = {k: v for k, v in trainer.preprocess_batch(content).items() if isinstance(v, Tensor)}
            found.append((labels["img"], labels))
            if sum(len(inputs) for inputs, _ in found) >= images:
                break
    return found


def classes_in(yolo: YOLO, data: str | Path, imgsz: int = 640) -> int:
    """Return the number of classes of a data set.

    Raises:
        PruningError: if the data set cannot be read.
    """
    with _reader(yolo, data, imgsz, 1) as trainer:
        return int(trainer.data["nc"])


@contextlib.contextmanager
def _reader(yolo: YOLO, data: str | Path, imgsz: int, batch: int) -> Iterator[Any]:
    """Yield a trainer of the library that reads a data set without augmentation, and trains nothing."""
    model = network(yolo)
    settings = {**dict.fromkeys(_AUGMENTATIONS, 0.0), "auto_augment": None}
    with (
        user_input(f"data {str(data)!r}"),
        random_state_kept(),
        quiet(),
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer: Any = trainer_for(yolo)(
            overrides={
                **{name: value for name, value in settings.items() if name in DEFAULT_CFG_DICT},
                "model": "model.pt",
                "task": yolo.task,
                "data": str(data),
                "imgsz": imgsz,
                "batch": batch,
                "device": "cpu",
                "workers": 0,
                "project": folder,
                "deterministic": False,
            }
        )
        trainer.model, trainer.stride = model, 32
        yield trainer


def model_loss(yolo: YOLO) -> Callable[[Any, Any], Tensor]:
    """Return the loss of a model for an image, as a criterion of (outputs, labels).

    `prune` uses it for batches of `calibration_batches`.

    Example:
        ```python
        loss = model_loss(yolo)(yolo.model(images), labels)
        ```
    """
    model: Any = network(yolo)
    criteria: dict[str, Any] = {}

    def loss(outputs: Any, labels: Any) -> Tensor:
        device = str(labels["img"].device)
        if device not in criteria:
            criteria[device] = _criterion(model)
        value: Tensor = criteria[device](outputs, labels)[0].sum() / len(labels["img"])
        return value

    return loss


def _criterion(model: Any) -> nn.Module:
    """Return the criterion that a model makes, with its hyperparameters or the library's."""
    before = model.args
    given = before if isinstance(before, dict) else vars(before)
    try:
        model.args = SimpleNamespace(**{**DEFAULT_CFG_DICT, **given})
        made: nn.Module = model.init_criterion()
        return made
    finally:
        model.args = before
