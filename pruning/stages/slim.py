"""The three stages as one pipeline, which can be interrupted at any time and resumed.

>>> import torch
>>> from pruning.stages.config import PruneConfig, SlimConfig
>>> from pruning.training import TrainConfig
>>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
>>> batches = [(torch.randn(16, 4), torch.arange(16) % 2)]
>>> one = TrainConfig(epochs=1)
>>> config = SlimConfig(Budget(channels=3), sparsify=one, prune=PruneConfig(1, one), finetune=one)
>>> slim(net, batches, config=config, validate=batches, log=lambda line: None).model[0].out_features
3
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from pruning.graph.groups import Ignored
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.width_sweep import Batch
from pruning.stages.config import SlimConfig
from pruning.stages.feasibility import feasible
from pruning.stages.finetune import finetune
from pruning.stages.given import Given, assess
from pruning.stages.layer_search import LayerSearch
from pruning.stages.pipeline import Pipeline
from pruning.stages.progress import Progress
from pruning.stages.prune import Step, StepSettings, prune_step
from pruning.stages.rates import choose_rates
from pruning.stages.run import Run
from pruning.stages.slim_arguments import settings_of, two_examples, validation_of
from pruning.stages.sparsify import sparsify
from pruning.training.batches import BatchSource
from pruning.training.distillation import with_teacher
from pruning.training.loop import require_trainable
from pruning.training.losses import (
    Loss,
    Validate,
    cross_entropy,
)
from pruning.utils.entries import Also
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs
from pruning.utils.wording import number_of
from pruning.utils.wrappers import unwrapped

#: Number of training batches used for calibration if no calibration batches are given.
CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Slimmed:
    """The result of `slim`.

    Attributes:
        model: the small model, BatchNorm not folded: the best of the run within the budget.
        sparsified: the model after stage 1.
        epochs: number of epochs trained, including those of trials.
        given: the model that `slim` was given, and `reference` what is known of it.
        stage: the stage that made the small model.
        score: validation score of the small model.
    """

    model: nn.Module
    sparsified: nn.Module
    epochs: int
    given: nn.Module
    reference: Given
    stage: str
    score: float

    @property
    def dense(self) -> nn.Module:
        """Return the dense network to compare with: the given one if it was trained, else that of stage 1."""
        return self.given if self.reference.trained else self.sparsified


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
    outputs: Outputs = None,
    also: Iterable[Also] = (),
    run: Run | None = None,
    log: Callable[[str], None] = print,
) -> Slimmed:
    """Slim a network in three stages under a budget (Network Slimming, Liu et al., ICCV 2017).

    1. Train with a pull on the scales of channels; a trained network at rates of a range test, paced.
    2. If asked, remove whole layers; then repeatedly remove the least important channels and train.
    3. Fine-tune, or train from newly initialized weights, and keep the best epoch.

    Args:
        model: the dense model, trained or not; it is not changed.
        batches, loss: see `fit`. example_inputs: by default two training examples.
        ignored, outputs, also: see `trace`.
        config, budget: the settings, or only the budget. target: result of `feasible`, if known.
        validate: maps a model to its validation score, higher is better; or batches for the accuracy.
        calibration: batches for the scores; by default the first `CALIBRATION_BATCHES` of training.
        teacher: teacher for `config.distill`; by default the given model if it is trained, else stage 1's.
        run: stores the state after every epoch, from which the pipeline resumes. log: receives its lines.

    Returns the best network within the budget, in eval mode, with the network after stage 1 and the score.

    Raises:
        PruningError: before any training, if the budget cannot be met or a setting is invalid.
        TrainingDiverged: if the loss is no longer finite.

    >>> slim(model, batches, budget=Budget(macs="40%"), validate=validation).model  # doctest: +SKIP
    """
    model, ignored, also = unwrapped(model), tuple(ignored), tuple(also)
    config = settings_of(model, config, budget, batches)
    score, examples = validation_of(model, validate)
    calibration = list(itertools.islice(batches, CALIBRATION_BATCHES) if calibration is None else calibration)
    example_inputs = two_examples(model, batches) if example_inputs is None else example_inputs
    progress = Progress(run, model)
    target = progress.target or target or feasible(
        model, example_inputs, config, ignored=ignored, teacher=teacher, outputs=outputs, also=also
    )  # fmt: skip
    require_trainable(model, config.trainings, batches)
    progress.state["target"] = target.limits()
    settings = StepSettings(
        config.prune.score, calibration, loss, ignored, config.prune.options, outputs=outputs, also=also
    )
    given = progress.given or progress.record(assess(model, score, examples, calibration, loss))
    state = Pipeline(model, given, progress.network, example_inputs, batches, loss, score, config, target,
                     settings, progress, log)  # fmt: skip
    return _stages(state, teacher)


def _stages(state: Pipeline, teacher: nn.Module | None) -> Slimmed:
    """Run the stages that the run has not finished yet."""
    choose_rates(state)
    _sparsify(state)
    _add_teacher(state, teacher)
    _find_superfluous_layers(state)
    _prune(state)
    _finetune(state)
    return _result(state)


def _sparsify(state: Pipeline) -> None:
    """Stage 1: train with a pull on the scales; a channel whose scale becomes 0 can be removed."""
    if state.progress.stage > 0:
        return
    label, config, progress, log = "stage 1, sparsify", state.config, state.progress, state.log
    scales, strength, train = state.scales(state.network), config.strength, config.sparsify
    if progress.resume(0) is None:
        progress.begin(scales, state.target, state.given)
        if state.given.trained and not state.target.excess(scales.dense):
            progress.consider("the given network", state.given.score, state.network)
    pace = None
    if strength is None and not scales.pulled_groups:
        log(f"{label}: no prunable group has scales or weights to shrink, so {_without_scales(state)}")
        strength, train = 0.0, replace(train, epochs=0 if state.given.trained else train.epochs)
    elif strength is None and state.given.trained:
        pace = config.prune.floor or config.prune.multiple
    sparsify(
        state.network,
        state.batches,
        train,
        state.example_inputs,
        strength=strength,
        budget=state.target,
        pace=pace,
        traced=scales.trace,
        loss=state.loss,
        validate=state.validate,
        on_epoch=progress.recorder(0, label, state.network),
        statistics=state.statistics,
        label=label,
        resume=progress.resume(0),
    )
    scales, validation = state.scales(state.network), state.validate(state.network)
    note = state.noted(
        validation, f"train it for more epochs (now {train.epochs}) or at a lower rate (now {train.peak:.2g})"
    )
    log(f"{label}: {progress.end_sparsify(state.network, scales, validation)}{note}")


def _without_scales(state: Pipeline) -> str:
    return "there is nothing to train" if state.given.trained else "it trains without a pull"


def _add_teacher(state: Pipeline, teacher: nn.Module | None) -> None:
    """Add the teacher's outputs to the batches and the loss of stages 2 and 3, if that is asked."""
    config = state.config
    if not config.distill:
        return
    teacher = teacher or (state.model if state.given.trained else state.progress.dense)
    state.batches, state.loss = with_teacher(
        teacher, state.batches, config.distill, config.temperature, state.loss,
        features=config.distill_features, changing=config.prune.recover.mixes or config.finetune.mixes,
    )  # fmt: skip


def _find_superfluous_layers(state: Pipeline) -> None:
    """If asked, find whole layers whose removal raises the validation score at the same budget."""
    if not state.config.prune.layers or state.progress.stage > 0:
        return
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


def _prune(state: Pipeline) -> None:
    """Stage 2: prune in equal ratios towards the budget, and train after each step."""
    config, progress = state.config.prune, state.progress
    for iteration in range(max(1, progress.stage), config.iterations + 1):
        label = f"stage 2, iteration {iteration}/{config.iterations}"
        line = progress.line
        if progress.resume(iteration) is None:
            if _has_nothing_to_do(state, iteration):
                state.log(f"{label}: not run, the network is within its budget already")
                progress.state["skipped"] = progress.state.get("skipped", 0) + 1
                continue
            step = _pruning_step(state, iteration)
            state.network, state.removed = step.model, ()
            # Scales of equal size train better, but bn_scale needs the trained scales in the next step.
            if config.score != "bn_scale":
                state.network = state.equalized(state.network)
            state.meets = _meets(state, label, iteration)
            line = progress.note_step(label, step, state.validate(state.network))
        state.meets = _meets(state, label, iteration)
        state.network = state.train(state.network, config.recover, label, iteration)
        score = state.validate(state.network)
        note = state.noted(
            score,
            f"recover for more epochs (now {config.recover.epochs}), in more iterations (now "
            f"{config.iterations}) or at another rate (now {config.recover.peak:.2g})",
        )
        state.log(f"{label}: {line}, {score:.4f} after training{note}")


def _has_nothing_to_do(state: Pipeline, iteration: int) -> bool:
    """Return whether the network, if it is trained, meets the budget of an iteration without a step."""
    iterations = state.config.prune.iterations
    if not state.given.trained or (
        isinstance(state.config.budget, LatencyBudget) and iteration == iterations
    ):
        return False
    share = state.target.share(state.progress.start, iteration, iterations)
    return not share.excess(state.scales(state.network).dense) and not state.removed


def _meets(state: Pipeline, label: str, iteration: int) -> str:
    """Return the label of an iteration if its network meets the budget, else nothing."""
    is_last = iteration == state.config.prune.iterations
    if is_last or not state.given.trained or isinstance(state.config.budget, LatencyBudget):
        return label if is_last else ""
    return "" if state.target.excess(state.scales(state.network).dense) else label


def _pruning_step(state: Pipeline, iteration: int) -> Step:
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
        dense=state.model if is_last and isinstance(budget, LatencyBudget) else None,
    )


def _finetune(state: Pipeline) -> None:
    """Stage 3: train the pruned network, and keep its best epoch."""
    label, config, progress = "stage 3, fine-tune", state.config.finetune, state.progress
    state.meets = label
    last = state.config.prune.iterations + 1
    if progress.resume(last) is None:
        state.network = state.initialized(state.network)
    state.network = finetune(
        state.network,
        state.batches,
        config,
        loss=state.loss,
        validate=state.validate,
        keep_start=state.given.trained and not state.config.restart,
        on_epoch=progress.recorder(last, label, state.network),
        statistics=state.statistics,
        label=label,
        resume=progress.resume(last),
    )
    score = state.validate(state.network)
    note = state.noted(
        score,
        f"fine-tune for more epochs (now {config.epochs}) or at another rate (now {config.peak:.2g}), or "
        "allow a larger budget",
    )
    state.log(f"{label}: {number_of(config.epochs, 'epoch')}, best validation {score:.4f}{note}")


def _result(state: Pipeline) -> Slimmed:
    """Return the best network of the run that meets the budget, whichever stage made it."""
    config, progress, best = state.config, state.progress, state.progress.best
    assert best is not None  # stage 3 ends with a validation
    if best.stage != state.meets:
        state.network = best.network
        state.log(f"the best network within the budget is that of {best.stage}: validation {best.score:.4f}")
        progress.note(stage="result", made_by=best.stage, validation=best.score)
    elif state.given.trained:
        progress.note(stage="result", made_by=best.stage, validation=best.score)
    iterations = config.prune.iterations - progress.state.get("skipped", 0)
    epochs = config.sparsify.epochs + iterations * config.prune.recover.epochs + config.finetune.epochs
    return Slimmed(
        state.network,
        progress.dense,
        epochs + progress.state.get("trial_epochs", 0),
        state.model,
        state.given,
        best.stage,
        best.score,
    )
