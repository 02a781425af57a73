"""Knowledge distillation: a loss that compares the model's logits with those of a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.training.batches import BatchSource, first_batch, length, pair, to_device
from pruning.training.losses import Loss, cross_entropy, loss_of
from pruning.utils import distributed
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.tree import Inputs


def distillation(
    teacher: nn.Module | None, weight: float, temperature: float = 4.0, loss: Loss = cross_entropy
) -> Loss:
    """Return a loss that also compares the logits with a teacher's (Hinton et al., arXiv 1503.02531).

    It is (1 − weight) loss + weight T² KL(softmax(teacher / T) ‖ softmax(student / T)), with the
    classes along dimension 1.

    Args:
        teacher: network that returns logits of the student's shape; it is put into eval mode and not
            trained. With None the targets must be pairs (targets, teacher's logits); see `with_teacher`.
        weight: weight of the teacher's logits in the loss, 0 to 1.
        temperature: T, above 0.
        loss: loss of the student's outputs and the targets, see `fit`.

    Returns:
        A function of (model, inputs, targets). It raises `PruningError` if the outputs of teacher and
        student are not logits of the same shape.

    >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> loss = distillation(teacher, weight=0.5)
    >>> loss(student, torch.rand(8, 4), torch.arange(8) % 3).shape
    torch.Size([])
    """
    if teacher is not None:
        teacher.eval()
    hard_loss = loss_of(loss)

    def distilled(student: nn.Module, inputs: Inputs, targets: object) -> Tensor:
        if teacher is None:
            targets, teacher_logits = pair(targets)
        else:
            with torch.no_grad():
                teacher_logits = call(teacher, inputs)
        outputs: list[Tensor] = []
        # The student runs once: `hard_loss` calls it, and a hook stores its logits.
        handle = student.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            hard = hard_loss(student, inputs, targets)
        finally:
            handle.remove()
        logits = outputs[-1]
        require_same_logits(logits, teacher_logits)
        soft = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(teacher_logits / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * hard + weight * temperature**2 * soft

    return distilled


def with_teacher(
    teacher: nn.Module, batches: BatchSource, weight: float, temperature: float, loss: Loss = cross_entropy
) -> tuple[BatchSource, Loss]:
    """Return batches and a loss for distillation; the teacher's logits are computed only once if possible.

    If every epoch yields the same inputs, this function runs the teacher on them and stores its logits
    with the targets. That is so for a list of batches, and for a source with a method
    `with_outputs(function)`. The method applies the function to the inputs of every batch, and returns
    the batches with targets (targets, outputs), or None if the inputs change between epochs, as
    augmented images do. If the logits take more memory than the inputs, they are not stored, and the
    teacher runs on every batch of every epoch.

    Args:
        batches: the training batches.
        teacher, weight, temperature, loss: see `distillation`.
    """

    def logits(inputs: Inputs) -> Tensor:
        with torch.no_grad(), eval_mode(teacher):
            return call(teacher, to_device((inputs, None), device_of(teacher))[0])

    def counted_logits(inputs: Inputs) -> Tensor:
        bar.update()
        return logits(inputs)

    is_list, with_outputs = type(batches) in (list, tuple), getattr(batches, "with_outputs", None)
    stored: BatchSource | None = None
    if is_list or with_outputs is not None:
        with torch.random.fork_rng(devices=[]):  # reading a batch here must not change training's draws
            inputs = first_batch(batches)[0]
        if _bytes(logits(inputs)) <= _bytes(inputs):
            with tqdm(
                total=length(batches),
                desc="teacher",
                unit="batch",
                disable=distributed.rank() > 0 or None,
                leave=False,
            ) as bar:
                if with_outputs is not None:
                    stored = with_outputs(counted_logits)
                else:
                    stored = [(x, (y, counted_logits(x))) for x, y in map(pair, batches)]
    if stored is None:
        return batches, distillation(teacher, weight, temperature, loss)
    return stored, distillation(None, weight, temperature, loss)


def _bytes(values: object) -> int:
    """Return the total memory of the tensors in nested values, in bytes."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def require_same_logits(student: object, teacher: object) -> None:
    """Check that the outputs of a student can be compared with its teacher's.

    Raises:
        PruningError: if they are not tensors of the same shape.
    """
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        raise PruningError(
            f"distillation needs models that return logits: the student returns a {type(student).__name__}, "
            f"the teacher a {type(teacher).__name__}. Train without distillation: distill=0"
        )
    if student.shape != teacher.shape:
        raise PruningError(
            f"the teacher's outputs have shape {tuple(teacher.shape)}, the student's "
            f"{tuple(student.shape)}: distillation needs a teacher with the same classes; give one, or "
            "train with distill=0"
        )
