"""Stage 3: recover accuracy, with a teacher or without."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.config import TrainConfig
from pruning.errors import PruningError
from pruning.graph import call
from pruning.rounding import Rounding
from pruning.training import BatchSource, Loss, cross_entropy, fit, loss_of


def distillation(
    teacher: nn.Module, weight: float, temperature: float = 4.0, loss: Loss = cross_entropy
) -> Loss:
    """A loss that also asks for the teacher's outputs (Hinton et al., arXiv 1503.02531).

    (1 − weight) loss + weight T² KL(softmax(teacher / T) ‖ softmax(student / T)), logits
    along dimension 1.

    Args:
        teacher: gives logits of the student's shape; it is put into eval mode and not trained.
        weight: 0 to 1. temperature: T, above 0.

    Raises `PruningError` at the first batch when teacher and student differ in classes.
    """
    teacher.eval()
    loss = loss_of(loss)

    def both(student: nn.Module, inputs: Any, targets: Any) -> Tensor:
        seen: list[Tensor] = []
        # The student runs once: the hard loss calls it, and its logits are caught here.
        handle = student.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            hard = loss(student, inputs, targets)
        finally:
            handle.remove()
        with torch.no_grad():
            wanted = call(teacher, inputs)
        logits = seen[-1]
        require_same_logits(logits, wanted)
        soft = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(wanted / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * hard + weight * temperature**2 * soft

    return both


def require_same_logits(student: Any, teacher: Any) -> None:
    """Raise `PruningError` unless the outputs of a student can be compared with its teacher's."""
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        raise PruningError(
            f"distillation is for models that give logits: the student gives a {type(student).__name__}, "
            f"the teacher a {type(teacher).__name__}. Train without it: distill=0"
        )
    if student.shape != teacher.shape:
        raise PruningError(
            f"the teacher's outputs have shape {tuple(teacher.shape)}, the student's "
            f"{tuple(student.shape)}: distillation needs a teacher with the same classes"
        )


def finetune(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    distill: float = 0.9,
    int8: bool = False,
    **options: Any,
) -> nn.Module:
    """Train a pruned model in place, and end with its best epoch on the validation split.

    Args:
        batches, config: as `fit` takes them.
        teacher: gives the soft targets, with weight `distill`; None trains without.
        int8: train and validate it as rounded to 8 bits (`Rounding`), for an int8 export.
        options: further arguments of `fit`; without `validate` the last epoch is kept.

    Returns the model in eval mode.
    """
    loss = options.pop("loss", cross_entropy)
    if teacher is not None and distill:
        loss = distillation(teacher, distill, loss=loss)
    options = {"keep_best": "validate" in options, **options}
    if not int8:
        return fit(model, batches, config, loss=loss, **options)
    with Rounding(model) as rounding:
        return fit(model, batches, config, loss=loss, extra=rounding, **options)
