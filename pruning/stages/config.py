"""Settings of the stages: small frozen dataclasses, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pruning.errors import PruningError
from pruning.planning.budget import Budget, LatencyBudget, require_budget
from pruning.planning.options import PlanOptions
from pruning.planning.scores import NAMES
from pruning.training.config import TrainConfig, require_setting


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
        require_setting(self.iterations >= 1, f"iterations {self.iterations}: at least 1")
        require_setting(self.score in NAMES, f"score {self.score!r}: one of {', '.join(NAMES)}")
        require_setting(
            self.floor >= 1 <= self.multiple, f"floor {self.floor}, multiple {self.multiple}: at least 1"
        )
        require_setting(
            0 < self.most <= 1, f"largest share dropped in a step {self.most}: above 0, at most 1"
        )

    @property
    def options(self) -> PlanOptions:
        """The options of the plan of every step."""
        return PlanOptions(ranking=self.ranking, floor=self.floor, most=self.most, multiple=self.multiple)


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
        require_setting((self.strength or 0) >= 0, f"sparsity strength {self.strength}: at least 0")
        require_setting(
            not self.sparsify.ema,
            f"decay of the moving average {self.sparsify.ema} in stage 1: 0 (an average has no exact zeros)",
        )
        require_setting(0 <= self.distill <= 1, f"distillation weight {self.distill}: from 0 to 1")
        require_setting(self.temperature > 0, f"distillation temperature {self.temperature}: above 0")

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
