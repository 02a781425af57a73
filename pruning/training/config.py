"""Settings of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pruning.utils.settings import Setting, require_valid

#: Optimizers, each with a peak learning rate for stage 3 that suits most networks.
OPTIMIZERS = {"sgd": 0.2, "soap": 0.05}

#: Peak learning rate of a training that is given none.
DEFAULT_RATE = 0.1

SCHEDULES = ("one-cycle", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Each field states its meaning and bounds.

    The one-cycle schedule is that of Smith & Topin (arXiv 1708.07120). Measure whether `channels_last`
    is faster: a small network took 0.8 times as long on one CPU thread, but twice as long on two. Without a
    rate, `fit` takes `DEFAULT_RATE`, and `slim` one that fits the stage and the network (see `SlimConfig`).

    Raises:
        PruningError: a setting is out of its bounds.

    >>> TrainConfig(8, lr=0.2).momentum
    0.9
    """

    epochs: Annotated[int, Setting("training epochs; 0 trains nothing", metavar="N", least=0, stages="each")]
    lr: Annotated[
        float | None, Setting("peak learning rate", name="rate", metavar="RATE", above=0, stages="each")
    ] = None
    optimizer: Annotated[
        str,
        Setting(
            "sgd (with Nesterov momentum), or soap, which needs fewer epochs but only for networks of at "
            "most a few thousand parameters",
            choices=tuple(OPTIMIZERS),
            stages="last",
        ),
    ] = "sgd"
    momentum: Annotated[float, Setting("momentum of the optimizer", least=0, below=1, flag=False)] = 0.9
    weight_decay: Annotated[
        float,
        Setting(
            "L2 factor on weights; not applied to norms and biases",
            metavar="FACTOR",
            least=0,
            group="training",
        ),
    ] = 0.0
    schedule: Annotated[
        str,
        Setting(
            "one-cycle (the rate rises to its peak, then falls to almost 0) or constant",
            choices=SCHEDULES,
            flag=False,
        ),
    ] = "one-cycle"
    warmup: Annotated[
        float, Setting("share of the steps in which a one-cycle rate rises", above=0, below=1, flag=False)
    ] = 0.2
    ema: Annotated[
        float,
        Setting(
            "decay per step of an exponential moving average of the weights, which is then validated and "
            "kept in their place; 0 disables it",
            metavar="DECAY",
            least=0,
            most=0.99999,
            stages="last",
        ),
    ] = 0.0
    channels_last: Annotated[
        bool,
        Setting(
            "train in torch's channels_last memory format: may be faster on one CPU thread",
            group="training",
        ),
    ] = False

    def __post_init__(self) -> None:
        require_valid(self)

    @property
    def peak(self) -> float:
        """Return the peak learning rate, which is `DEFAULT_RATE` where none is given."""
        return DEFAULT_RATE if self.lr is None else self.lr

    def rate(self, progress: float) -> float:
        """Return the learning rate as a share of `peak`, given the share of all steps done, 0 to 1.

        The one-cycle rate rises from 1/25 to 1 and then falls to almost 0, each by half a cosine.
        """
        if self.schedule == "constant":
            return 1.0
        if progress < self.warmup:
            return 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * progress / self.warmup)) / 2
        return (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))) / 2
