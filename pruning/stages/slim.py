"""The three stages as one pipeline that can be stopped at any moment and resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.latency import even_scores, plan_latency
from pruning.planning.search import plan_within
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.stages.finetune import finetune
from pruning.stages.layer_search import Trial, superfluous_layers
from pruning.stages.prune import prune
from pruning.stages.run import Progress, Run
from pruning.stages.sparsify import ScalePull, sparsify
from pruning.surgery.batchnorm import equalize
from pruning.surgery.layer_removal import removable, without_layer
from pruning.tracing.trace import require_groups, trace
from pruning.training.batches import BatchSource, first_batch, to_device
from pruning.training.distillation import require_same_logits, with_teacher
from pruning.training.loop import fit
from pruning.training.losses import (
    Loss,
    Validate,
    accuracy,
    cross_entropy,
    validation_score,
    why_not_classifier,
)
from pruning.training.optimizers import require_small
from pruning.utils.modules import call, device_of, eval_mode, fresh_weights
from pruning.utils.tree import Inputs, first_examples, fresh


@dataclass(frozen=True)
class Slimmed:
    """What `slim` ends with.

    Attributes:
        model: the small model, BatchNorm in place. dense: the model that stage 1 ended with.
        epochs: trained in all, those of trials included.
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
    validate: Validate | Iterable[tuple[Any, Any]],
    budget: Budget | LatencyBudget | None = None,
    target: Budget | None = None,
    calibration: Sequence[tuple[Any, Any]] | None = None,
    teacher: nn.Module | None = None,
    loss: Loss = cross_entropy,
    ignored: Iterable[Ignored] = (),
    run: Run | None = None,
    log: Callable[[str], None] = print,
) -> Slimmed:
    """Network Slimming in three stages (Liu et al., ICCV 2017), under a budget.

    1. Train with an L1 pull on the BatchNorm scales.
    2. Several times: remove the least important channels, train a little. Before that,
       where asked for, whole layers go that the network is better without.
    3. Train what is left, or what has its widths and fresh weights, and keep its best epoch on the
       validation split.

    Args:
        model: the dense model, trained or not; it is left as it is.
        batches: training batches.
        example_inputs: to trace and check with; by default two of the first batch.
        config: the settings; by default those of `SlimConfig.within(budget)`.
        validate: from a model to its accuracy (or another figure, higher is better), or
            batches of a validation split, on which a classifier's accuracy is taken.
        budget: what the result may cost, in place of a config. Under a budget of latency the
            stages first aim at the MACs of a network that meets it, found by measuring; the last
            pruning step then meets the budget itself.
        target: what `feasible` gave, where it was asked before; it is not asked again then.
        calibration: batches for the scores; the same ones each time. By default the first
            `CALIBRATION_BATCHES` training batches.
        teacher: for `config.distill`; by default the model that stage 1 ends with.
        ignored: layers whose channels all stay.
        run: keeps the state after every epoch, and goes on from it.
        log: receives one line per stage and pruning step.

    Raises `PruningError` before anything is trained for what `feasible` refuses.
    """
    if (config is None) == (budget is None):
        raise PruningError("slim needs either a config or a budget")
    config = config or SlimConfig.within(budget or Budget())
    if isinstance(batches, Iterator):
        raise PruningError(
            "training batches are read anew in every epoch: give a list or a DataLoader, not an iterator"
        )
    device, validate = device_of(model), _validation(model, validate)
    if calibration is None:
        calibration = list(itertools.islice(batches, CALIBRATION_BATCHES))
    if example_inputs is None:
        first, _ = to_device(first_batch(batches), device)
        example_inputs = first_examples(first, 2)
    ignored = tuple(ignored)
    last = config.prune.iterations + 1
    progress = Progress(run, model)
    if "target" in progress.state:
        target = Budget(**progress.state["target"])
    elif target is None:
        target = feasible(model, example_inputs, config, ignored=ignored, teacher=teacher)
    progress.state["target"] = target.limits()
    small = progress.network
    inside: dict[str, Any] = {"batches": batches, "validate": validate}

    if progress.at == 0:
        label = "stage 1, sparsify"
        if progress.resume(0) is None:
            progress.begin(trace(small, example_inputs, ignored), target)
        small = sparsify(
            small,
            config=config.sparsify,
            example_inputs=example_inputs,
            strength=_strength(small, example_inputs, ignored, config, log),
            budget=target,
            ignored=ignored,
            loss=loss,
            **inside,
            **progress.options(0, label, small),
        )
        pull = ScalePull(small, trace(small, example_inputs, ignored), strength=0.0)
        log(f"{label}: {progress.end_sparsify(small, pull, validate(small))}")

    teacher = (teacher or progress.dense) if config.distill else None
    soft_loss = loss
    if teacher:
        inside["batches"], soft_loss = with_teacher(
            teacher, batches, config.distill, config.temperature, loss
        )

    step_options: dict[str, Any] = {
        "score": config.prune.score,
        "calibration": calibration,
        "loss": loss,
        "ignored": ignored,
        **config.prune.limits,
    }

    def begin(pruned: nn.Module) -> nn.Module:
        """What stage 3 trains, of a pruned model."""
        if config.restart:
            return fresh_weights(pruned)
        return equalize(pruned, trace(pruned, example_inputs), example_inputs)

    train: Callable[..., nn.Module] = partial(fit, config=config.prune.recover, loss=soft_loss, **inside)
    removed: tuple[str, ...] = ()
    if config.prune.layers and progress.at == 0:
        brief = replace(config.finetune, epochs=-(-config.finetune.epochs // 10), ema=0.0)
        try_out: Callable[..., nn.Module] = partial(fit, config=brief, loss=soft_loss, **inside)
        trial = Trial(small, example_inputs, target, begin, try_out, validate, step_options)
        removed, rest, trials = superfluous_layers(trial, progress.note, log)
        left = ScalePull(rest, trace(rest, example_inputs, ignored), strength=0.0).left()
        progress.state["start"] = asdict(left)
        progress.state["trial_epochs"] = brief.epochs * trials

    for iteration in range(max(1, progress.at), last):
        label = f"stage 2, iteration {iteration}/{config.prune.iterations}"
        line = progress.line
        if progress.resume(iteration) is None:
            share = target.share(progress.start, iteration, config.prune.iterations)
            if isinstance(config.budget, LatencyBudget) and iteration == last - 1:
                step = prune(
                    small, example_inputs, config.budget, remove=removed, dense=model, **step_options
                )
            else:
                towards = target if iteration < last - 1 else None
                step = prune(small, example_inputs, share, remove=removed, towards=towards, **step_options)
            # Channels of one size train better, unless their scales are what scores the next step.
            small, removed = step.model, ()
            if config.prune.score != "bn_scale":
                small = equalize(small, trace(small, example_inputs), example_inputs)
            line = progress.note_step(label, step, validate(small))
        small = train(small, **progress.options(iteration, label, small))
        log(f"{label}: {line}, {validate(small):.4f} after training")

    label = "stage 3, fine-tune"
    if progress.resume(last) is None:
        small = begin(small)
    small = finetune(
        small,
        config=config.finetune,
        loss=soft_loss,
        **inside,
        **progress.options(last, label, small),
    )
    log(f"{label}: {config.finetune.epochs} epochs, best validation {validate(small):.4f}")
    return Slimmed(small, progress.dense, config.epochs + progress.state.get("trial_epochs", 0))


def _validation(model: nn.Module, validate: Validate | Iterable[tuple[Any, Any]]) -> Validate:
    """`validate` as a function; batches on which no accuracy can be taken are refused at once."""
    if callable(validate):
        return partial(validation_score, validate)
    if not isinstance(validate, Iterable) or isinstance(validate, Iterator):
        raise PruningError(
            f"validate is a {type(validate).__name__}: a function of the model, or batches that can be read "
            "anew after every epoch (a list or a DataLoader), were expected"
        )
    reason = why_not_classifier(model, validate)
    if reason is not None:
        raise PruningError(reason)
    return partial(validation_score, lambda network: accuracy(network, validate))


def _strength(
    model: nn.Module,
    inputs: Inputs,
    ignored: Iterable[Ignored],
    config: SlimConfig,
    log: Callable[[str], None],
) -> float | None:
    """λ of stage 1; 0 where there is nothing to pull on."""
    if config.strength is None and not ScalePull(model, trace(model, inputs, ignored), 0.0).scales:
        log("stage 1, sparsify: no prunable group has BatchNorm scales, so it trains without a pull")
        return 0.0
    return config.strength


#: Training batches on which channels are scored where no others are given.
CALIBRATION_BATCHES = 16


def feasible(
    model: nn.Module,
    example_inputs: Inputs,
    config: SlimConfig,
    *,
    ignored: Iterable[Ignored] = (),
    teacher: nn.Module | None = None,
) -> Budget:
    """The budget in counts, if `slim` can go all the way with these settings; it trains nothing.

    Raises `PruningError` for a budget that is out of reach (see `reachable`), a teacher whose
    outputs cannot be compared with the model's, an optimizer for smaller networks than the one
    asked for, and layers that fresh weights cannot be drawn for.
    """
    if teacher is not None and config.distill:
        with torch.no_grad(), eval_mode(model, teacher):
            require_same_logits(*(call(net, fresh(example_inputs)) for net in (model, teacher)))
    target = reachable(model, example_inputs, config.budget, ignored, config.prune)
    if config.finetune.optimizer == "soap":
        require_small(model.parameters(), target.limits().get("params"))
    if config.restart:
        with torch.random.fork_rng(devices=[]):
            fresh_weights(model)
    return target


def reachable(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget,
    ignored: Iterable[Ignored] = (),
    config: PruneConfig | None = None,
) -> Budget:
    """The budget in counts, if some widths of the model meet it.

    With the floors and multiples of a `config`; and where it allows whole layers to go, also
    if the budget would be met without all of those that can. A budget of latency becomes the
    MACs of a network that meets it, all groups narrowed alike as far as that pays.

    Raises `PruningError` when none do; it says what the least is.
    """
    traced = trace(model, example_inputs, ignored)
    cost_model = CostModel(model, traced)
    limits: dict[str, Any] = {"floor": config.floor, "multiple": config.multiple} if config else {}
    if isinstance(budget, LatencyBudget):
        scores = even_scores(model, traced.groups)
        plan, _ = plan_latency(model, example_inputs, traced, scores, budget, **limits)
        return Budget(macs=cost_model(plan.widths).macs)
    target = budget.resolve(cost_model(cost_model.full))
    while True:
        arbitrary = {name: torch.ones(group.channels) for name, group in traced.groups.items()}
        try:
            plan_within(target, traced, cost_model, arbitrary, **limits)
            return target
        except PruningError:
            candidates = (
                list(removable(model, traced, example_inputs).values()) if config and config.layers else []
            )
            if not candidates:
                require_groups(model, traced)
                raise
        model = without_layer(model, traced, candidates[-1], [example_inputs])
        traced = trace(model, example_inputs, ignored)
        cost_model = CostModel(model, traced)
