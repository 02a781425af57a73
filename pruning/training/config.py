"""Settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pruning.errors import PruningError


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training batches; 0 trains nothing.
        lr: learning rate; the peak of a one-cycle schedule.
        optimizer: `sgd` with Nesterov momentum, or `soap` for networks of a few thousand
            parameters, with a rate of about 0.05 (see `pruning.soap.Soap`).
        momentum: of either.
        weight_decay: L2 factor on weights; norms and biases have none.
        schedule: `one-cycle` (up over `warmup` of the steps, then down to almost nothing;
            Smith & Topin, arXiv 1708.07120) or `constant`.
        warmup: share of the steps in which a one-cycle schedule rises.
        ema: decay of an exponential moving average of the weights after every step, which
            then are the weights that are validated and kept; 0 keeps none.
        channels_last: train with the channels of convolutions last in memory. Whether that
            pays is to be measured: on one CPU thread a small network took 0.8 of the time,
            on two threads twice the time.
    """

    epochs: int
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    warmup: float = 0.2
    ema: float = 0.0
    channels_last: bool = False

    def __post_init__(self) -> None:
        require_setting(self.epochs >= 0, f"epochs {self.epochs}: at least 0")
        require_setting(self.lr > 0, f"learning rate {self.lr}: above 0")
        optimizers = ", ".join(OPTIMIZERS)
        require_setting(self.optimizer in OPTIMIZERS, f"optimizer {self.optimizer!r}: one of {optimizers}")
        require_setting(0 <= self.momentum < 1, f"momentum {self.momentum}: at least 0 and below 1")
        require_setting(self.weight_decay >= 0, f"weight decay {self.weight_decay}: at least 0")
        require_setting(
            self.schedule in SCHEDULES, f"schedule {self.schedule!r}: one of {', '.join(SCHEDULES)}"
        )
        require_setting(0 < self.warmup < 1, f"warmup {self.warmup}: between 0 and 1")
        require_setting(0 <= self.ema < 1, f"decay of the moving average {self.ema}: at least 0 and below 1")

    def rate(self, progress: float) -> float:
        """The learning rate after `progress`, 0 to 1, of all steps, as a share of `lr`.

        One cycle goes from 1/25 to 1 to almost 0 by half cosines.
        """
        if self.schedule == "constant":
            return 1.0
        if progress < self.warmup:
            return 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * progress / self.warmup)) / 2
        return (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))) / 2


#: With the highest learning rate of stage 3 that fits most networks.
OPTIMIZERS = {"sgd": 0.2, "soap": 0.05}

SCHEDULES = ("one-cycle", "constant")


def require_setting(condition: bool, message: str) -> None:
    if not condition:
        raise PruningError(f"{message} is needed")
