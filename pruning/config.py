"""Settings of the stages: small frozen dataclasses, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pruning.budget import Budget, LatencyBudget, require_budget
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
        _require(self.epochs >= 0, f"epochs {self.epochs}: at least 0")
        _require(self.lr > 0, f"learning rate {self.lr}: above 0")
        optimizers = ", ".join(OPTIMIZERS)
        _require(self.optimizer in OPTIMIZERS, f"optimizer {self.optimizer!r}: one of {optimizers}")
        _require(0 <= self.momentum < 1, f"momentum {self.momentum}: at least 0 and below 1")
        _require(self.weight_decay >= 0, f"weight decay {self.weight_decay}: at least 0")
        _require(self.schedule in SCHEDULES, f"schedule {self.schedule!r}: one of {', '.join(SCHEDULES)}")
        _require(0 < self.warmup < 1, f"warmup {self.warmup}: between 0 and 1")
        _require(0 <= self.ema < 1, f"decay of the moving average {self.ema}: at least 0 and below 1")

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


@dataclass(frozen=True)
class PruneConfig:
    """Stage 2: removing channels, in several iterations.

    Attributes:
        iterations: pruning steps, each to an equal ratio of the way.
        recover: training after each step.
        score: importance of a channel: `taylor`, `bn_scale`, `l1`, `l2`, `random` or
            `sensitivity`.
        layers: also remove whole layers, where a trial shows that the network is better
            without them within the same budget.
        ranking, floor, most, multiple: as `plan_within` takes them, in every step.
    """

    iterations: int
    recover: TrainConfig
    score: str = "taylor"
    layers: bool = False
    ranking: str = "global"
    floor: int = 1
    most: float = 1.0
    multiple: int = 1

    def __post_init__(self) -> None:
        from pruning.prune import NAMES

        _require(self.iterations >= 1, f"iterations {self.iterations}: at least 1")
        _require(self.score in NAMES, f"score {self.score!r}: one of {', '.join(NAMES)}")
        _require(
            self.floor >= 1 <= self.multiple, f"floor {self.floor}, multiple {self.multiple}: at least 1"
        )
        _require(0 < self.most <= 1, f"largest share dropped in a step {self.most}: above 0, at most 1")

    @property
    def limits(self) -> dict[str, Any]:
        """The arguments of `plan_within` besides the budget."""
        return {key: getattr(self, key) for key in ("ranking", "floor", "most", "multiple")}


@dataclass(frozen=True)
class SlimConfig:
    """The three stages of slimming.

    Attributes:
        budget: what the result may cost.
        sparsify: training of stage 1.
        prune: stage 2.
        finetune: training of stage 3.
        strength: λ of the L1 pull on BatchNorm scales in stage 1; None finds it from the
            budget, 0 trains without it.
        distill: weight of the teacher's outputs in the loss of stages 2 and 3; 0 has no teacher.
        temperature: at which the two are compared (see `distillation`).
        restart: train stage 3, and the trials of whole layers, from fresh weights: pruning then gives
            the widths (see `fresh_weights`).
    """

    budget: Budget | LatencyBudget
    sparsify: TrainConfig
    prune: PruneConfig
    finetune: TrainConfig
    strength: float | None = None
    distill: float = 0.0
    temperature: float = 4.0
    restart: bool = False

    def __post_init__(self) -> None:
        require_budget(self.budget)
        _require((self.strength or 0) >= 0, f"sparsity strength {self.strength}: at least 0")
        _require(
            not self.sparsify.ema,
            f"decay of the moving average {self.sparsify.ema} in stage 1: 0 (an average has no exact zeros)",
        )
        _require(0 <= self.distill <= 1, f"distillation weight {self.distill}: from 0 to 1")
        _require(self.temperature > 0, f"distillation temperature {self.temperature}: above 0")

    @classmethod
    def within(cls, budget: Budget | LatencyBudget) -> SlimConfig:
        """The settings of this project's own main job, for any budget."""
        decay = 1e-3
        return cls(
            budget,
            sparsify=TrainConfig(8, lr=0.1, weight_decay=decay),
            prune=PruneConfig(5, TrainConfig(2, lr=0.05, weight_decay=decay)),
            finetune=TrainConfig(40, lr=0.1, weight_decay=decay),
        )

    @property
    def counts(self) -> Budget:
        """The budget, where it is one of counts. Raises `PruningError` for one of latency."""
        if isinstance(self.budget, LatencyBudget):
            raise PruningError(f"a budget of params, MACs or channels is needed here, not {self.budget}")
        return self.budget

    @property
    def epochs(self) -> int:
        """Epochs of all stages together."""
        return self.sparsify.epochs + self.prune.iterations * self.prune.recover.epochs + self.finetune.epochs

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PruningError(f"{message} is needed")
