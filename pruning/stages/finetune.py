"""Stage 3: recover accuracy, with a teacher or without."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pruning.errors import PruningError
from pruning.stages.run import Progress, Run
from pruning.training.batches import BatchSource
from pruning.training.config import TrainConfig
from pruning.training.distillation import with_teacher
from pruning.training.fake_quantize import Rounding
from pruning.training.loop import Epoch, Stateful, TrainingState, fit
from pruning.training.losses import Loss, Validate, cross_entropy


def finetune(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    distill: float = 0.9,
    temperature: float = 4.0,
    int8: bool = False,
    loss: Loss = cross_entropy,
    validate: Validate | None = None,
    keep_best: bool | None = None,
    keep_start: bool = False,
    before_epoch: Callable[[int], None] | None = None,
    after_step: Callable[[float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    extra: Stateful | None = None,
    label: str = "",
    resume: TrainingState | None = None,
) -> nn.Module:
    """Train a pruned model in place, and keep its best epoch on the validation split.

    Args:
        teacher: gives soft targets with weight `distill` at a `temperature` (see `distillation`).
        int8: train and validate with weights and activations rounded to 8 bits (see `Rounding`).
        keep_best: by default, whether there is `validate`; without it the last epoch is kept.
        extra: not together with `int8`, whose ranges take its place.
        batches, config, loss, validate, keep_start, before_epoch, after_step, on_epoch, label,
            resume: see `fit`.

    Returns:
        The model in eval mode.

    >>> import torch
    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2)]
    >>> finetune(nn.Linear(3, 2), batches, TrainConfig(epochs=1)).training
    False
    """
    if teacher is not None and distill:
        batches, loss = with_teacher(teacher, batches, distill, temperature, loss)
    if int8 and extra is not None:
        raise PruningError("int8 keeps the ranges of activations in extra: give no other")

    def train(state: Stateful | None) -> nn.Module:
        return fit(
            model, batches, config, loss=loss, validate=validate,
            keep_best=validate is not None if keep_best is None else keep_best, keep_start=keep_start,
            before_epoch=before_epoch, after_step=after_step, on_epoch=on_epoch,
            extra=state, label=label, resume=resume,
        )  # fmt: skip

    if not int8:
        return train(extra)
    with Rounding(model) as rounding:
        return train(rounding)


def tune(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    validate: Validate,
    run: Run | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.9,
    temperature: float = 4.0,
    int8: bool = False,
    loss: Loss = cross_entropy,
) -> nn.Module:
    """Fine-tune a copy of a pruned model, resumable, and keep its best epoch.

    Where no epoch is as good as the given weights, these are kept.

    Args:
        validate: from a model to a validation_score, higher is better.
        run: saves the state after every epoch, and resumes from it.
        batches, config, teacher, distill, temperature, int8, loss: see `finetune`.

    Returns:
        The copy in eval mode.

    >>> import torch
    >>> net, batches = nn.Linear(3, 2), [(torch.randn(8, 3), torch.arange(8) % 2)]
    >>> unchanged = lambda model: float(torch.equal(model.weight, net.weight))
    >>> unchanged(tune(net, batches, TrainConfig(epochs=1), validate=unchanged))
    1.0
    """
    progress = Progress(run, model)
    small = progress.network
    return finetune(
        small,
        batches,
        config,
        teacher=teacher,
        distill=distill,
        temperature=temperature,
        int8=int8,
        loss=loss,
        validate=validate,
        keep_start=True,
        on_epoch=progress.recorder(0, "fine-tune", small),
        label="fine-tune",
        resume=progress.resume(0),
    )
