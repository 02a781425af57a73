"""The three stages as one pipeline, which can be interrupted at any time and resumed.

>>> import torch
>>> from pruning.stages.config import PruneConfig
>>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
>>> batches = [(torch.randn(16, 4), torch.arange(16) % 2)]
>>> one = TrainConfig(epochs=1)
>>> config = SlimConfig(Budget(channels=3), sparsify=one, prune=PruneConfig(1, one), finetune=one)
>>> slim(net, batches, config=config, validate=batches, log=lambda line: None).model[0].out_features
3
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.width_sweep import Batch
from pruning.stages.config import SlimConfig
from pruning.stages.feasibility import feasible
from pruning.stages.finetune import finetune
from pruning.stages.layer_search import LayerSearch
from pruning.stages.prune import Step, StepSettings, prune_step
from pruning.stages.run import Progress, Run
from pruning.stages.scales import ChannelScales
from pruning.stages.sparsify import sparsify
from pruning.surgery.batchnorm import equalize
from pruning.tracing.trace import trace
from pruning.training.batches import BatchSource, first_batch, to_device
from pruning.training.config import TrainConfig
from pruning.training.distillation import with_teacher
from pruning.training.loop import fit
from pruning.training.losses import (
    Loss,
    Validate,
    accuracy,
    cross_entropy,
    validation_score,
    why_not_classifier,
)
from pruning.utils.batch import find_batch
from pruning.utils.modules import device_of, fresh_weights
from pruning.utils.tree import Inputs
from pruning.utils.wrappers import unwrapped

#: Number of training batches used for calibration if no calibration batches are given.
CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Slimmed:
    """The result of `slim`.

    Attributes:
        model: the small model, BatchNorm not folded.
        dense: the model after stage 1.
        epochs: number of epochs trained, including those of trials.
    """

    model: nn.Module
    dense: nn.Module
    epochs: int


def slim(
    model: nn.Module,
    batches: BatchSource,
    example_inputs: Inputs | None = None,
    config: SlimConfig | None = None,
    *,
    validate: Validate | Iterable[Batch],
    budget: Budget | LatencyBudget | None = None,
    target: Budget | None = None,
    calibration: Sequence[Batch] | None = None,
    teacher: nn.Module | None = None,
    loss: Loss = cross_entropy,
    ignored: Iterable[Ignored] = (),
    run: Run | None = None,
    log: Callable[[str], None] = print,
) -> Slimmed:
    """Slim a network in three stages under a budget (Network Slimming, Liu et al., ICCV 2017).

    1. Train with an L1 penalty on the BatchNorm scales.
    2. If asked, remove whole layers; then repeatedly remove the least important channels and train.
    3. Fine-tune, or train from newly initialized weights, and keep the best epoch.

    Args:
        model: the dense model, trained or not; it is not changed.
        batches, loss: training batches (a list or a DataLoader) and loss, see `fit`.
        example_inputs, ignored: see `trace`; the inputs are by default two examples of the first batch.
        config, budget: the settings; or only the budget, for the settings `SlimConfig.within(budget)`.
        validate: maps a model to its validation score, higher is better; or batches for the accuracy.
        target: result of `feasible`, if it was called before.
        calibration: batches for the scores; by default the first `CALIBRATION_BATCHES` of training.
        teacher: teacher for `config.distill`; by default the model after stage 1.
        run: stores the state after every epoch; if it holds a state, the pipeline resumes from it.
        log: function that receives one line per stage and pruning step.

    Raises `PruningError` before any training if `feasible` does.
    """
    model, ignored, config = unwrapped(model), tuple(ignored), _settings(config, budget, batches)
    validate = _validation(model, validate)
    if calibration is None:
        calibration = list(itertools.islice(batches, CALIBRATION_BATCHES))
    if example_inputs is None:
        example_inputs = _two_examples(model, to_device(first_batch(batches), device_of(model))[0])
    progress = Progress(run, model)
    target = progress.target or target
    target = target or feasible(model, example_inputs, config, ignored=ignored, teacher=teacher)
    progress.state["target"] = target.limits()
    state = _Pipeline(
        model, progress.network, example_inputs, batches, loss, validate, config, target,
        StepSettings(config.prune.score, calibration, loss, ignored, config.prune.options), progress, log,
    )  # fmt: skip

    if progress.stage == 0:
        _sparsify(state)
    if config.distill:
        _add_teacher(state, teacher or progress.dense)
    if config.prune.layers and progress.stage == 0:
        _find_superfluous_layers(state)
    _prune(state)
    _finetune(state)
    return Slimmed(state.network, progress.dense, config.epochs + progress.state.get("trial_epochs", 0))


@dataclass
class _Pipeline:
    """The data that the three stages share, and the network in its current state.

    Attributes:
        given: the dense model that `slim` was given.
        network: the network in training; each stage replaces it.
        batches: training batches; their targets may include the teacher's outputs.
        loss: training loss; with a teacher it includes distillation.
        target: the budget, as counts.
        settings: settings of every pruning step.
        removed: whole layers that the next pruning step removes.
    """

    given: nn.Module
    network: nn.Module
    example_inputs: Inputs
    batches: BatchSource
    loss: Loss
    validate: Validate
    config: SlimConfig
    target: Budget
    settings: StepSettings
    progress: Progress
    log: Callable[[str], None]
    removed: tuple[str, ...] = ()

    def scales(self, network: nn.Module) -> ChannelScales:
        """Read the BatchNorm scales of a network."""
        return ChannelScales(network, trace(network, self.example_inputs, self.settings.ignored))

    def equalized(self, network: nn.Module) -> nn.Module:
        """Return an equivalent network whose BatchNorm channels have scales of equal size."""
        return equalize(network, trace(network, self.example_inputs), self.example_inputs)

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
            on_epoch=None if stage is None else self.progress.recorder(stage, label, network),
            label=label,
            resume=None if stage is None else self.progress.resume(stage),
        )


def _sparsify(state: _Pipeline) -> None:
    """Stage 1: train with an L1 penalty on the scales; a channel whose scale becomes 0 can be removed."""
    label, config, progress = "stage 1, sparsify", state.config, state.progress
    scales, strength = state.scales(state.network), config.strength
    if progress.resume(0) is None:
        progress.begin(scales, state.target)
    if strength is None and not scales.norms:
        state.log(f"{label}: no prunable group has BatchNorm scales, so it trains without a pull")
        strength = 0.0
    sparsify(
        state.network,
        state.batches,
        config.sparsify,
        state.example_inputs,
        strength=strength,
        budget=state.target,
        ignored=state.settings.ignored,
        loss=state.loss,
        validate=state.validate,
        on_epoch=progress.recorder(0, label, state.network),
        label=label,
        resume=progress.resume(0),
    )
    scales, validation = state.scales(state.network), state.validate(state.network)
    state.log(f"{label}: {progress.end_sparsify(state.network, scales, validation)}")


def _add_teacher(state: _Pipeline, teacher: nn.Module) -> None:
    """Add the teacher's outputs to the batches and the loss of stages 2 and 3."""
    config = state.config
    state.batches, state.loss = with_teacher(
        teacher, state.batches, config.distill, config.temperature, state.loss
    )


def _find_superfluous_layers(state: _Pipeline) -> None:
    """Before stage 2: find whole layers whose removal raises the validation score at the same budget."""
    finetune_config, progress = state.config.finetune, state.progress
    brief = replace(finetune_config, epochs=-(-finetune_config.epochs // 10), ema=0.0)
    search = LayerSearch(
        state.network,
        state.example_inputs,
        state.target,
        state.settings,
        begin=state.initialized,
        train=lambda network, label: state.train(network, brief, label),
        validate=state.validate,
        note=progress.note,
        log=state.log,
    )
    state.removed, network, trials = search.run()
    progress.state["start"] = asdict(state.scales(network).left())
    progress.state["trial_epochs"] = brief.epochs * trials


def _prune(state: _Pipeline) -> None:
    """Stage 2: prune in equal ratios towards the budget, and train after each step."""
    config, progress = state.config.prune, state.progress
    for iteration in range(max(1, progress.stage), config.iterations + 1):
        label = f"stage 2, iteration {iteration}/{config.iterations}"
        line = progress.line
        if progress.resume(iteration) is None:
            step = _pruning_step(state, iteration)
            state.network, state.removed = step.model, ()
            # Scales of equal size train better, but bn_scale needs the trained scales in the next step.
            if config.score != "bn_scale":
                state.network = state.equalized(state.network)
            line = progress.note_step(label, step, state.validate(state.network))
        state.network = state.train(state.network, config.recover, label, iteration)
        state.log(f"{label}: {line}, {state.validate(state.network):.4f} after training")


def _pruning_step(state: _Pipeline, iteration: int) -> Step:
    """Prune to this iteration's share of the budget; the last iteration meets the budget itself."""
    iterations, budget = state.config.prune.iterations, state.config.budget
    is_last = iteration == iterations
    share = state.target.share(state.progress.start, iteration, iterations)
    return prune_step(
        state.network,
        state.example_inputs,
        budget if is_last and isinstance(budget, LatencyBudget) else share,
        state.settings,
        remove=state.removed,
        towards=None if is_last else state.target,
        dense=state.given if is_last and isinstance(budget, LatencyBudget) else None,
    )


def _finetune(state: _Pipeline) -> None:
    """Stage 3: train the pruned network, and keep its best epoch."""
    label, config, progress = "stage 3, fine-tune", state.config.finetune, state.progress
    last = state.config.prune.iterations + 1
    if progress.resume(last) is None:
        state.network = state.initialized(state.network)
    state.network = finetune(
        state.network,
        state.batches,
        config,
        loss=state.loss,
        validate=state.validate,
        on_epoch=progress.recorder(last, label, state.network),
        label=label,
        resume=progress.resume(last),
    )
    state.log(f"{label}: {config.epochs} epochs, best validation {state.validate(state.network):.4f}")


def _two_examples(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the first two examples of a batch."""
    return find_batch(model, inputs).first(inputs, 2)


def _settings(
    config: SlimConfig | None, budget: Budget | LatencyBudget | None, batches: BatchSource
) -> SlimConfig:
    """Return the settings given by `config` or `budget`; reject batches that can be read only once."""
    if (config is None) == (budget is None):
        given = "neither" if config is None else "both"
        raise PruningError(f"slim needs either a config or a budget, got {given}: give exactly one")
    if isinstance(batches, Iterator):
        raise PruningError(
            f"training batches are a {type(batches).__name__}, an iterator that can be read only once: give "
            "a list or a DataLoader, which can be read in every epoch"
        )
    return config or SlimConfig.within(budget or Budget())


def _validation(model: nn.Module, validate: Validate | Iterable[Batch]) -> Validate:
    """Return `validate` as a function; reject batches on which accuracy cannot be computed."""
    if callable(validate):
        return partial(validation_score, validate)
    if not isinstance(validate, Iterable) or isinstance(validate, Iterator):
        raise PruningError(
            f"validate is a {type(validate).__name__}: give a function of the model, or batches that can be "
            "read after every epoch (a list or a DataLoader)"
        )
    reason = why_not_classifier(model, validate)
    if reason is not None:
        raise PruningError(reason)
    return partial(validation_score, lambda network: accuracy(network, validate))
