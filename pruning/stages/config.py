"""Settings of the stages: frozen dataclasses that check their values on construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pruning.errors import PruningError
from pruning.planning.budget import Budget, LatencyBudget, require_budget
from pruning.planning.options import RANKINGS, SCORES, PlanOptions
from pruning.training.config import OPTIMIZERS, TrainConfig
from pruning.utils.settings import Setting, Stage, require_valid, stored

#: Peak learning rates of an untrained network in stages 1 and 2; `OPTIMIZERS` has those of stage 3.
SPARSIFY_RATE, RECOVER_RATE = 0.1, 0.05


@dataclass(frozen=True)
class PruneConfig:
    """Stage 2: remove channels in several iterations. Each field states its meaning and bounds.

    Raises:
        PruningError: a setting is out of its bounds.
    """

    GROUP: ClassVar[str] = "stage 2"

    iterations: Annotated[
        int,
        Setting("pruning steps, each of which reduces the cost by the same ratio", metavar="N", least=1),
    ]
    recover: Annotated[
        TrainConfig,
        Stage(
            "recover",
            when="after each pruning step",
            unset={"lr": str(RECOVER_RATE)},
        ),
    ]
    score: Annotated[str, Setting("importance of a channel", choices=SCORES)] = "taylor"
    layers: Annotated[
        bool,
        Setting("also remove whole layers, if a trial without them scores higher at the same budget"),
    ] = False
    ranking: Annotated[
        str,
        Setting(
            "global compares the scores of all groups, group removes the same share of every group",
            choices=RANKINGS,
        ),
    ] = "global"
    floor: Annotated[
        int | None,
        Setting("fewest channels that every group keeps (default: --multiple)", metavar="N", least=1),
    ] = None
    most: Annotated[
        float,
        Setting("largest share of a group's channels removed in one step", metavar="SHARE", above=0, most=1),
    ] = 1.0
    multiple: Annotated[
        int,
        Setting(
            "round widths to multiples of N channels; the full width and a given floor are also allowed",
            metavar="N",
            least=1,
        ),
    ] = 1
    alike: Annotated[
        tuple[str, ...],
        Setting(
            "groups that match one of these patterns get one width: '*/heads'",
            metavar="PATTERN",
            later="setting",
        ),
    ] = ()

    def __post_init__(self) -> None:
        require_valid(self)
        _ = self.options  # checks the patterns
        object.__setattr__(self, "alike", tuple(self.alike))  # the command line gives a list

    @property
    def options(self) -> PlanOptions:
        """Return the planning options, which are the same in every step."""
        return PlanOptions(
            ranking=self.ranking,
            floor=self.floor,
            most=self.most,
            multiple=self.multiple,
            alike=self.alike,
        )


#: Default settings of the stages.
_SPARSIFY = TrainConfig(8, weight_decay=1e-3)
_PRUNE = PruneConfig(5, TrainConfig(2, weight_decay=1e-3))
_FINETUNE = TrainConfig(40, weight_decay=1e-3)


@dataclass(frozen=True)
class SlimConfig:
    """The three stages of slimming. Each field states its meaning and bounds.

    The defaults are the settings with which this project prunes its main example; only the budget has
    no default. Peak learning rates that are not given are those of an untrained network (`SPARSIFY_RATE`,
    `RECOVER_RATE`, `OPTIMIZERS`; of other optimizers their own default), or, of a trained one, the result of
    a range test.

    Raises:
        PruningError: a setting is out of its bounds, or `sparsify.ema` is not 0.

    >>> SlimConfig(Budget(macs="50%")).epochs
    58
    """

    budget: Budget | LatencyBudget
    sparsify: Annotated[TrainConfig, Stage("sparsify", group="stage 1", unset={"lr": str(SPARSIFY_RATE)})] = (
        _SPARSIFY
    )
    prune: Annotated[PruneConfig, Stage(group="stage 2")] = _PRUNE
    finetune: Annotated[
        TrainConfig,
        Stage(
            "finetune",
            group="stage 3",
            last=True,
            unset={"lr": ", ".join(f"{rate} with {name}" for name, rate in OPTIMIZERS.items())},
        ),
    ] = _FINETUNE
    strength: Annotated[
        float | None,
        Setting(
            "strength of the L1 penalty on BatchNorm scales; auto finds it from the budget, "
            "0 trains without it",
            name="sparsity",
            metavar="LAMBDA",
            least=0,
            none="auto",
            group="stage 1",
        ),
    ] = None
    distill: Annotated[
        float,
        Setting(
            "weight of the teacher's outputs in the loss, from stage 2 on; 0 trains without a teacher",
            metavar="WEIGHT",
            least=0,
            most=1,
            group="training",
        ),
    ] = 0.0
    temperature: Annotated[
        float,
        Setting(
            "temperature that divides the logits of the teacher and the network before they are compared",
            metavar="T",
            least=1e-3,
            group="training",
        ),
    ] = 4.0
    distill_features: Annotated[
        tuple[str, ...],
        Setting(
            "modules whose outputs are compared with the teacher's, too: layer3, or STUDENT=TEACHER where "
            "the names differ; where widths differ, a projection is learned",
            metavar="NAME",
            group="training",
            later="setting",
        ),
    ] = ()
    restart: Annotated[
        bool,
        Setting(
            "train stage 3 and the trials of whole layers from newly initialized weights: stage 2 then "
            "determines only the widths; for small networks",
            group="stage 3",
        ),
    ] = False

    rate: Annotated[
        float | None,
        Setting(
            "peak learning rate of every stage without one of its own; stage 2 takes half of it (default: of "
            "a trained network, found by a range test; of an untrained one, those of the stages)",
            metavar="RATE",
            above=0,
            group="training",
            later="setting",
        ),
    ] = None

    def __post_init__(self) -> None:
        require_budget(self.budget)
        require_valid(self)
        if self.sparsify.ema:
            raise PruningError(
                f"SlimConfig.sparsify.ema {self.sparsify.ema}: expected 0, because averaged weights have no "
                "exact zeros, which stage 1 needs; set it to 0"
            )
        object.__setattr__(self, "distill_features", tuple(self.distill_features))
        if self.distill_features and (self.prune.recover.compile or self.finetune.compile):
            raise PruningError(
                "SlimConfig.distill_features are read by hooks, which compiled networks leave out: expected "
                "compile=False"
            )
        if self.distill_features and not self.distill:
            raise PruningError(
                "SlimConfig.distill_features are compared with a teacher's, and distill is 0: expected a "
                "weight above 0"
            )

    @classmethod
    def within(cls, budget: Budget | LatencyBudget) -> SlimConfig:
        """Return the default settings for a budget."""
        return cls(budget)

    @property
    def counts(self) -> Budget:
        """Return the budget of counts; raise `PruningError` if it is a latency budget."""
        if isinstance(self.budget, LatencyBudget):
            raise PruningError(f"expected a Budget of params, MACs or channels, got {self.budget}")
        return self.budget

    @property
    def epochs(self) -> int:
        """Return the total number of epochs of all stages."""
        return self.sparsify.epochs + self.prune.iterations * self.prune.recover.epochs + self.finetune.epochs

    def with_rates(
        self, gentle: float | None = None, rate: float | None = None, last: float | None = None
    ) -> SlimConfig:
        """Return the settings with a peak learning rate for every stage that has none.

        Args:
            gentle, rate, last: peak learning rates found for a trained network, in stage 1, after it, and
                in stage 3 (by default `rate`); None for an untrained one. The setting `rate` precedes them.

        >>> config = SlimConfig(Budget(macs="50%"))
        >>> [stage.lr for stage in (config.with_rates().sparsify, config.with_rates(0.01, 0.03).finetune)]
        [0.1, 0.03]
        """
        sparsify, recover, finetune = (training.own_rate for training in self.trainings)
        rates = (
            SPARSIFY_RATE if sparsify is None else sparsify,
            RECOVER_RATE if recover is None else recover / 2,
            OPTIMIZERS[str(self.finetune.optimizer)] if finetune is None else finetune,
        )
        if self.rate is not None:
            rates = (self.rate, self.rate / 2, self.rate)
        elif gentle is not None and rate is not None:
            # Fresh weights, or steps of another size, need another rate.
            is_other = self.restart or self.finetune.optimizer != self.sparsify.optimizer
            rates = (gentle, rate / 2, rates[2] if is_other else last or rate)
        rated = [
            stage if stage.lr is not None else replace(stage, lr=lr)
            for stage, lr in zip(self.trainings, rates, strict=True)
        ]
        prune = replace(self.prune, recover=rated[1])
        return replace(self, sparsify=rated[0], prune=prune, finetune=rated[2])

    @property
    def has_rates(self) -> bool:
        """Return whether every stage has a peak learning rate, so that none needs to be found."""
        return self.rate is not None or all(stage.lr is not None for stage in self.trainings)

    @property
    def trainings(self) -> tuple[TrainConfig, TrainConfig, TrainConfig]:
        """Return the trainings of the three stages."""
        return self.sparsify, self.prune.recover, self.finetune

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain data; those that earlier versions did not have only if given."""
        found = stored(self)
        stages = (found["sparsify"], found["prune"]["recover"], found["finetune"])
        for stage, config in zip(stages, self.trainings, strict=True):
            stage["warmup"] = config.rise
        return found
