"""Stage 3: fine-tune a pruned model, with or without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import nn

from pruning.errors import PruningError
from pruning.stages.progress import Progress
from pruning.stages.run import Run
from pruning.training.batches import Batch, BatchSource
from pruning.training.config import TrainConfig
from pruning.training.distillation import with_teacher
from pruning.training.fake_quantize import Rounding
from pruning.training.loop import Epoch, fit
from pruning.training.losses import Loss, Validate, cross_entropy
from pruning.training.output_comparison import Comparison
from pruning.training.state import Stateful, TrainingState


def finetune(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    distill: float = 0.9,
    temperature: float = 4.0,
    features: Sequence[str] = (),
    compare: Comparison = "auto",
    int8: bool = False,
    loss: Loss = cross_entropy,
    validate: Validate | None = None,
    keep_best: bool | None = None,
    keep_start: bool = False,
    before_epoch: Callable[[int], None] | None = None,
    after_step: Callable[[float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    extra: Stateful | None = None,
    statistics: Sequence[Batch] = (),
    label: str = "",
    resume: TrainingState | None = None,
) -> nn.Module:
    """Train a pruned model in place, and keep the weights of its best epoch on the validation split.

    Args:
        teacher, features, compare: see `distillation`; distill: weight of the teacher in the loss, 0 to 1.
        temperature: divides the logits of both networks before they are compared.
        int8: train and validate with weights and activations rounded to 8 bits (see `Rounding`).
        keep_best: keep the best epoch instead of the last; by default True if `validate` is given.
        extra: see `fit`; not with `int8`, which stores its ranges there. batches, config, loss, validate,
            keep_start, before_epoch, after_step, on_epoch, statistics, label, resume: see `fit`.

    Returns the model in eval mode. Raises `PruningError` for what it cannot train, and `TrainingDiverged`.

    >>> import torch
    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2)]
    >>> finetune(nn.Linear(3, 2), batches, TrainConfig(epochs=1)).training
    False
    """
    if teacher is not None and distill:
        batches, loss = with_teacher(
            teacher, batches, distill, temperature, loss, features=features, compare=compare,
            changing=config.mixes,
        )  # fmt: skip
    if int8:
        _require_rounding(config, extra)
    with Rounding(model) if int8 else nullcontext(extra) as extra:
        return fit(
            model, batches, config, loss=loss, validate=validate,
            keep_best=validate is not None if keep_best is None else keep_best, keep_start=keep_start,
            before_epoch=before_epoch, after_step=after_step, on_epoch=on_epoch, extra=extra,
            statistics=statistics, label=label, resume=resume,
        )  # fmt: skip


def _require_rounding(config: TrainConfig, extra: Stateful | None) -> None:
    if config.compile:
        raise PruningError("int8=True rounds by hooks, which compiled networks leave out: set compile=False")
    if extra is not None:
        raise PruningError("int8=True stores the ranges of activations in extra: leave extra out")


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
    features: Sequence[str] = (),
    compare: Comparison = "auto",
    int8: bool = False,
    loss: Loss = cross_entropy,
) -> nn.Module:
    """Fine-tune a copy of a pruned model and keep its best epoch; a run makes this resumable.

    If every epoch scores lower than the given weights, the given weights are kept.

    Args:
        validate: function from a model to its validation score; higher is better.
        run: stores the state after every epoch; if it holds a state, training resumes from it.
        batches, config, teacher, distill, temperature, features, compare, int8, loss: see `finetune`.

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
        features=features,
        compare=compare,
        int8=int8,
        loss=loss,
        validate=validate,
        keep_start=True,
        on_epoch=progress.recorder(0, "fine-tune", small),
        label="fine-tune",
        resume=progress.resume(0),
    )
