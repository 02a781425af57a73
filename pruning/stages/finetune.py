"""Stage 3: recover accuracy, with a teacher or without."""

from __future__ import annotations

from typing import Any

from torch import nn

from pruning.stages.run import Progress, Run
from pruning.training.batches import BatchSource
from pruning.training.config import TrainConfig
from pruning.training.distillation import with_teacher
from pruning.training.fake_quantize import Rounding
from pruning.training.loop import fit
from pruning.training.losses import Validate, cross_entropy


def finetune(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    distill: float = 0.9,
    temperature: float = 4.0,
    int8: bool = False,
    **options: Any,
) -> nn.Module:
    """Train a pruned model in place, and end with its best epoch on the validation split.

    Args:
        batches, config: as `fit` takes them.
        teacher: gives the soft targets, with weight `distill`, at a `temperature`; None trains
            without. It sees inputs that are the same in every epoch once (see `with_teacher`).
        int8: train and validate it as rounded to 8 bits (`Rounding`), for an int8 export.
        options: further arguments of `fit`; without `validate` the last epoch is kept.

    Returns the model in eval mode.
    """
    loss = options.pop("loss", cross_entropy)
    if teacher is not None and distill:
        batches, loss = with_teacher(teacher, batches, distill, temperature, loss)
    options = {"keep_best": "validate" in options, **options}
    if not int8:
        return fit(model, batches, config, loss=loss, **options)
    with Rounding(model) as rounding:
        return fit(model, batches, config, loss=loss, extra=rounding, **options)


def tune(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    validate: Validate,
    run: Run | None = None,
    **options: Any,
) -> nn.Module:
    """Stage 3 alone, resumable: fine-tune a copy of a pruned model, and keep its best epoch.

    Where no epoch is as good as the model was, it stays as it was.

    Args:
        run: keeps the state after every epoch, and goes on from it.
        options: further arguments of `finetune`.
    """
    progress = Progress(run, model)
    small = progress.network
    inside = progress.options(0, "fine-tune", small)
    return finetune(small, batches, config, validate=validate, keep_start=True, **inside, **options)
