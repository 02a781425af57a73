"""Choose the peak learning rates of all stages of `slim`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pruning.errors import PruningError
from pruning.stages.pipeline import Pipeline
from pruning.stages.prune import prune_step
from pruning.training.batches import length
from pruning.training.range_test import range_test, rate_of_longer, recovery_rate
from pruning.utils import distributed

#: Stage 3 of a trained network takes at most this multiple of the rate of an untrained one.
MOST = 1.5


def choose_rates(state: Pipeline) -> None:
    """Say what is known of the given network, and set the rates of all stages."""
    given, config, progress = state.given, state.config, state.progress
    is_new = progress.resume(0) is None and progress.stage == 0
    line = f"given network: {given}"
    if given.trained and given.rate is None and not config.has_rates:
        gentle = range_test(state.model, state.settings.calibration, config.sparsify, loss=state.loss)
        rate = recovery_rate(
            _pruned_at_once(state), state.settings.calibration, config.prune.recover, loss=state.loss
        )
        gentle = min(gentle, rate)
        gentle, rate = distributed.broadcast((gentle, rate))
        state.given = progress.record(replace(given, gentle=gentle, rate=rate))
        line += f"; range tests find peak rates of {gentle:.2g} in stage 1, {rate:.2g} after it"
    state.config = config.with_rates(state.given.gentle, state.given.rate, _rate_of_stage_3(state))
    if state.given.rate is not None:
        line += f" and {state.config.finetune.peak:.2g} in stage 3"
    if is_new:
        state.log(line)


def _rate_of_stage_3(state: Pipeline) -> float | None:
    """Return the rate of stage 3, which is longer than the trials that found that of stage 2."""
    if state.given.rate is None:
        return None
    untrained = state.config.with_rates().finetune
    steps = untrained.epochs * ((length(state.batches) or 0) // untrained.accumulate)
    return rate_of_longer(state.given.rate, steps, most=MOST * untrained.peak)


def _pruned_at_once(state: Pipeline) -> nn.Module:
    """Return the given network pruned to the budget in one step, not trained; unpruned if it takes more."""
    settings = state.settings
    score = "taylor" if settings.score == "sensitivity" else settings.score  # which takes long
    whole = replace(settings, score=score, options=replace(settings.options, most=1.0))
    with torch.random.fork_rng(devices=[]):
        try:
            step = prune_step(state.model, state.example_inputs, state.target, whole)
        except PruningError:  # it takes the removal of whole layers to meet the budget
            return state.model
        return state.equalized(step.model)
