"""What the three stages of `slim` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from pruning.planning.budget import Budget
from pruning.stages.config import SlimConfig
from pruning.stages.given import Given
from pruning.stages.progress import Progress
from pruning.stages.prune import StepSettings
from pruning.stages.scales import ChannelScales
from pruning.surgery.batchnorm import equalize
from pruning.training.batches import Batch, BatchSource, length
from pruning.training.config import TrainConfig
from pruning.training.loop import fit
from pruning.training.losses import Loss, Validate
from pruning.utils.modules import fresh_weights
from pruning.utils.tree import Inputs

#: Steps after which less than 1 % of a running average with torch's momentum of 0.1 is older.
SHORT_EPOCH = 50


@dataclass
class Pipeline:
    """The data that the three stages share, and the network in its current state.

    Attributes:
        model: the dense model that `slim` was given, and `given` what is known of it.
        network: the network in training; each stage replaces it.
        batches: training batches; their targets may include the teacher's outputs.
        loss: training loss; with a teacher it includes distillation.
        score: function from a model to its validation score.
        target: the budget, as counts.
        settings: settings of every pruning step.
        removed: whole layers that the next pruning step removes.
        meets: name of the stage, while the networks that are validated meet the budget.
    """

    model: nn.Module
    given: Given
    network: nn.Module
    example_inputs: Inputs
    batches: BatchSource
    loss: Loss
    score: Validate
    config: SlimConfig
    target: Budget
    settings: StepSettings
    progress: Progress
    log: Callable[[str], None]
    removed: tuple[str, ...] = ()
    meets: str = ""

    @property
    def statistics(self) -> Sequence[Batch]:
        """Return the batches on which BatchNorm's statistics are taken anew for every validation.

        There are none for an untrained network with long epochs: its running statistics are those of the
        epoch's last steps.
        """
        is_short = (length(self.batches) or 0) < SHORT_EPOCH
        return self.settings.calibration if self.given.trained or is_short else ()

    def validate(self, network: nn.Module) -> float:
        """Return the validation score of a network; of those that meet the budget, the best is kept."""
        score = self.score(network)
        if self.meets:
            self.progress.consider(self.meets, score, network)
        return score

    def noted(self, score: float, advice: str) -> str:
        """Return advice for the line of a stage that ends far below the given network; else nothing."""
        below = self.given.shortfall(score)
        return f"; {100 * below:.1f} points below the given network: {advice}" if below else ""

    def scales(self, network: nn.Module) -> ChannelScales:
        """Read the scales of a network's channels."""
        return ChannelScales(network, self.settings.traced(network, self.example_inputs))

    def equalized(self, network: nn.Module) -> nn.Module:
        """Return an equivalent network whose BatchNorm channels have scales of equal size."""
        every = replace(self.settings, ignored=())
        return equalize(network, every.traced(network, self.example_inputs), self.example_inputs)

    def initialized(self, pruned: nn.Module) -> nn.Module:
        """Return a pruned network with the weights from which stage 3 trains it."""
        return fresh_weights(pruned) if self.config.restart else self.equalized(pruned)

    def train(
        self, network: nn.Module, config: TrainConfig, label: str, stage: int | None = None
    ) -> nn.Module:
        """Train a network in place; the training of a numbered stage is recorded and resumable."""
        return fit(
            network,
            self.batches,
            config,
            loss=self.loss,
            validate=self.validate,
            keep_best=self.given.trained,
            keep_start=self.given.trained,
            on_epoch=None if stage is None else self.progress.recorder(stage, label, network),
            statistics=self.statistics,
            label=label,
            resume=None if stage is None else self.progress.resume(stage),
        )
