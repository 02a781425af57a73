"""The networks of the benchmark, and how each is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

import models
from models.common import initialize
from pruning.cli.factories import make_model
from pruning.errors import PruningError
from pruning.training import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How all methods train a network.

    Attributes:
        epochs: total of epochs of every method. dense_epochs: those of the dense network among them.
        rate: peak learning rate of training from new weights. later_rate: of training after pruning.
        train: number of training images; None for all.
        cutout: side of the square that is blanked in training images; 0 for none.
        bf16: compute forward passes of training in bfloat16 where torch does.

    Raises:
        PruningError: no epoch is left after the dense network, or a setting is out of its bounds.
    """

    epochs: int = 12
    dense_epochs: int = 6
    batch_size: int = 128
    rate: float = 0.1
    later_rate: float = 0.05
    weight_decay: float = 5e-4
    train: int | None = None
    cutout: int = 0
    bf16: bool = False
    channels_last: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.dense_epochs < self.epochs:
            raise PruningError(
                f"{self.dense_epochs} of {self.epochs} epochs are for the dense network: give at least 1, "
                "and leave at least 1 for training after pruning (--epochs, --dense-epochs)"
            )

        for rate in (self.rate, self.later_rate):
            self.training(self.epochs, rate)  # which refuses a setting out of its bounds

    @property
    def later_epochs(self) -> int:
        """Epochs after the dense network."""
        return self.epochs - self.dense_epochs

    def training(self, epochs: int, rate: float) -> TrainConfig:
        """Return the settings of a part of the training: one cycle of the rate."""
        return TrainConfig(epochs, rate, weight_decay=self.weight_decay, channels_last=self.channels_last)

    def fingerprint(self) -> str:
        """Return a hash of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def plain(image_shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Build six convolutions without shortcuts, about the cost of ResNet-8: 12.4M MACs."""
    layers: list[nn.Module] = []
    channels = image_shape[0]
    for at, width in enumerate((18, 18, 36, 36, 72, 72)):
        if at in (2, 4):
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    initialize(model, 0.5)
    return model


def resnet8(**options: Any) -> nn.Module:
    """Build a PreResNet of one basic block per stage; 12.5M MACs."""
    return models.PreResNet(8, **options)


#: Networks by name. Each takes `image_shape` and `classes`.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "plain": plain,
    **{name: getattr(models, name) for name in ("resnet20", "resnet56", "resnet164")},
    **{name: getattr(models, name) for name in ("vgg16", "vgg19", "densenet40")},
}

#: Recipes that differ from the default, which suits one core of a CPU: those of the papers need a GPU.
_PAPER = Recipe(epochs=320, dense_epochs=160, batch_size=64, weight_decay=1e-4, rate=0.1, later_rate=0.1)
RECIPES: dict[str, Recipe] = {
    "resnet8": Recipe(),
    "plain": Recipe(),
    "resnet20": Recipe(epochs=10, dense_epochs=5),
    **dict.fromkeys(("resnet56", "resnet164", "vgg16", "vgg19", "densenet40"), _PAPER),
}


def network(name: str, image_shape: Sequence[int], classes: int) -> nn.Module:
    """Return a network of `NETWORKS`, or of a factory `module:name`, with new weights.

    Raises:
        PruningError: there is no such network.
    """
    if name not in NETWORKS and ":" not in name:
        raise PruningError(
            f"network {name!r}: expected one of {', '.join(NETWORKS)}, or module:factory with the arguments "
            "image_shape and classes"
        )
    arguments = {"image_shape": tuple(image_shape), "classes": classes}
    return NETWORKS[name](**arguments) if name in NETWORKS else make_model(name, arguments, None)
