"""Knowledge distillation: a loss that also asks for a teacher's outputs."""

from __future__ import annotations

from typing import Any

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


def distillation(
    teacher: nn.Module | None, weight: float, temperature: float = 4.0, loss: Loss = cross_entropy
) -> Loss:
    """A loss that also asks for the teacher's outputs (Hinton et al., arXiv 1503.02531).

    (1 − weight) loss + weight T² KL(softmax(teacher / T) ‖ softmax(student / T)), logits
    along dimension 1.

    Args:
        teacher: gives logits of the student's shape; it is put into eval mode and not trained.
            None where its logits stand beside the targets, as pairs (targets, logits): see `taught`.
        weight: 0 to 1. temperature: T, above 0.

    Raises `PruningError` at the first batch when teacher and student differ in classes.
    """
    if teacher is not None:
        teacher.eval()
    loss = loss_of(loss)

    def both(student: nn.Module, inputs: Any, targets: Any) -> Tensor:
        if teacher is None:
            targets, wanted = targets
        else:
            with torch.no_grad():
                wanted = call(teacher, inputs)
        seen: list[Tensor] = []
        # The student runs once: the hard loss calls it, and its logits are caught here.
        handle = student.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            hard = loss(student, inputs, targets)
        finally:
            handle.remove()
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


def taught(
    teacher: nn.Module, batches: BatchSource, weight: float, temperature: float, loss: Loss = cross_entropy
) -> tuple[BatchSource, Loss]:
    """Batches, and the loss with which they teach what the teacher knows (see `distillation`).

    Where the same inputs come in every epoch, the teacher sees each of them once, here, and its logits
    stand beside the targets. So it is with a list of batches, and with a source that has a method
    `with_outputs`: given a function of inputs it returns the same batches with targets
    (targets, outputs), or None where its inputs change, as augmented images do. Logits that take
    more memory than the inputs are not kept; the teacher then sees every batch of every epoch.
    """

    def logits(inputs: Any) -> Any:
        with torch.no_grad(), eval_mode(teacher):
            return call(teacher, to_device((inputs, None), device_of(teacher))[0])

    def counted(inputs: Any) -> Any:
        bar.update()
        return logits(inputs)

    a_list, with_outputs = type(batches) in (list, tuple), getattr(batches, "with_outputs", None)
    once: BatchSource | None = None
    if a_list or with_outputs is not None:
        with torch.random.fork_rng(devices=[]):  # training is as without this look
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
                    once = with_outputs(counted)
                else:
                    once = [(x, (y, counted(x))) for x, y in map(pair, batches)]
    if once is None:
        return batches, distillation(teacher, weight, temperature, loss)
    return once, distillation(None, weight, temperature, loss)


def _bytes(values: Any) -> int:
    """The memory of all tensors in it."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


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
