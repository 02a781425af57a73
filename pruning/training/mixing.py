"""Mix training images by torchvision's MixUp and CutMix."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.batches import BatchSource, first_batch, pair, to_device
from pruning.training.config import TrainConfig
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.outputs import logits_of
from pruning.utils.tree import fresh
from pruning.utils.wording import number_of


def require_mixing(config: TrainConfig, batches: BatchSource | None) -> None:
    """Check that the batches can be mixed, if that is asked.

    Raises:
        PruningError: without torchvision, and for batches that are not images (N, C, H, W) with integer
            classes (N,).
    """
    if not config.mixes:
        return
    _transforms()
    if batches is None:
        return
    with torch.random.fork_rng(devices=[]):
        inputs, targets = first_batch(batches)
    _require_images(inputs, targets)


class MixedBatches:
    """Batches whose images are mixed, and whose targets are probabilities of classes.

    MixUp (Zhang et al., arXiv 1710.09412) averages pairs of images and their targets; CutMix (Yun et al.,
    arXiv 1905.04899) pastes a rectangle of one image into another. Both draw from torch's global generator.

    Args:
        batches: images (N, C, H, W) and integer classes (N,).
        config: the alphas. With both, each batch has one of the two, with equal probability.
        classes: number of classes of the network.

    >>> source = [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    >>> [(inputs, targets)] = MixedBatches(source, TrainConfig(1, mixup=0.2), classes=5)
    >>> targets.shape, bool(torch.isclose(targets.sum(1), torch.ones(4)).all())
    (torch.Size([4, 5]), True)
    """

    def __init__(self, batches: BatchSource, config: TrainConfig, classes: int):
        v2, self.batches = _transforms(), batches
        chosen = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        self.mixers: list[Callable[..., tuple[Tensor, Tensor]]] = [
            kind(alpha=alpha, num_classes=classes) for kind, alpha in chosen if alpha
        ]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            inputs, targets = _require_images(*pair(batch))
            if int(targets.max()) >= self.classes or int(targets.min()) < 0:
                raise PruningError(
                    f"the targets go from {int(targets.min())} to {int(targets.max())}, but the network has "
                    f"{number_of(self.classes, 'class')}, which count from 0: give a network with as many "
                    "classes as the data"
                )
            choice = int(torch.randint(len(self.mixers), ())) if len(self.mixers) > 1 else 0
            yield self.mixers[choice](inputs, targets)


def mixed(batches: BatchSource, config: TrainConfig, model: nn.Module) -> BatchSource:
    """Return the batches with their images mixed, if that is asked; the random generators do not change."""
    if not config.mixes:
        return batches
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), eval_mode(model):
        inputs, _ = to_device(first_batch(batches), device)
        logits = logits_of(call(model, fresh(inputs)))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise PruningError(
            "MixUp and CutMix need a classifier that returns logits (N, classes): set mixup=0 and cutmix=0"
        )
    return MixedBatches(batches, config, logits.shape[1])


def _transforms() -> Any:
    try:
        return importlib.import_module("torchvision.transforms.v2")
    except ImportError as error:
        raise PruningError(
            "MixUp and CutMix are those of torchvision, which cannot be imported: install torchvision, or "
            "set mixup=0 and cutmix=0"
        ) from error


def _require_images(inputs: object, targets: object) -> tuple[Tensor, Tensor]:
    is_images = isinstance(inputs, Tensor) and inputs.ndim == 4
    is_classes = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and is_images and is_classes:
        return inputs, targets
    shown = [
        f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        for x in (inputs, targets)
    ]
    raise PruningError(
        f"MixUp and CutMix need images (N, C, H, W) and integer classes (N,), got {shown[0]} and {shown[1]}: "
        "set mixup=0 and cutmix=0"
    )
