"""Check and complete the arguments of `slim`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from torch import nn

from pruning.errors import PruningError
from pruning.planning.budget import Budget, LatencyBudget
from pruning.stages.config import SlimConfig
from pruning.training.batches import Batch, BatchSource, first_batch, to_device
from pruning.training.losses import Validate, accuracy, validation_score, why_not_classifier
from pruning.utils.batch import find_batch
from pruning.utils.modules import device_of, require_module
from pruning.utils.tree import Inputs


def two_examples(model: nn.Module, batches: BatchSource) -> Inputs:
    """Return the inputs of the first two examples of the first batch."""
    inputs = to_device(first_batch(batches), device_of(model))[0]
    return find_batch(model, inputs).first(inputs, 2)


def settings_of(
    model: nn.Module, config: SlimConfig | None, budget: Budget | LatencyBudget | None, batches: BatchSource
) -> SlimConfig:
    """Return the settings given by `config` or `budget`; reject batches that can be read only once."""
    require_module(model)
    if (config is None) == (budget is None):
        given = "neither" if config is None else "both"
        raise PruningError(f"slim needs either a config or a budget, got {given}: give exactly one")
    if isinstance(batches, Iterator):
        raise PruningError(
            f"training batches are a {type(batches).__name__}, an iterator that can be read only once: give "
            "a list or a DataLoader, which can be read in every epoch"
        )
    return config or SlimConfig.within(budget or Budget())


def validation_of(
    model: nn.Module, validate: Validate | Iterable[Batch]
) -> tuple[Validate, Iterable[Batch] | None]:
    """Return `validate` as a function, and its batches; reject those that accuracy cannot be computed on."""
    if callable(validate):
        return partial(validation_score, validate), None
    if not isinstance(validate, Iterable) or isinstance(validate, Iterator):
        raise PruningError(
            f"validate is a {type(validate).__name__}: give a function of the model, or batches that can be "
            "read after every epoch (a list or a DataLoader)"
        )
    reason = why_not_classifier(model, validate)
    if reason is not None:
        raise PruningError(reason)
    return partial(validation_score, lambda network: accuracy(network, validate)), validate
