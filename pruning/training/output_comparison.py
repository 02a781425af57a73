"""Compare the outputs and the features of a network with those of its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.errors import PruningError
from pruning.training.losses import classes_of, logits_for
from pruning.utils.outputs import held, named_outputs

#: How outputs are compared: as logits of classes, as values, or as the targets and names tell.
Comparison: TypeAlias = Literal["auto", "logits", "values"]


def comparable(output: object) -> dict[str, Tensor]:
    """Return the tensors of an output that are compared with a teacher's, by name.

    These are its logits, if it is a tensor or holds `logits`; otherwise all floating-point tensors with at
    least one dimension.

    >>> list(comparable({"logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 8)}))
    ['logits']
    >>> list(comparable([torch.zeros(2, 3), torch.zeros(2, 8), torch.zeros(2).long()]))
    ['0', '1']
    """
    logits = output if isinstance(output, Tensor) else held(output, "logits")
    if isinstance(logits, Tensor):
        return {"logits": logits}
    return {name: x for name, x in named_outputs(output).items() if x.is_floating_point() and x.ndim}


def require_comparable(student: object, teacher: object) -> None:
    """Check that the outputs of a student can be compared with its teacher's.

    Raises:
        PruningError: if one of them has no tensor to compare, or if names or shapes differ.
    """
    mine, theirs = comparable(student), comparable(teacher)
    if not mine or not theirs:
        raise PruningError(
            f"distillation needs outputs that can be compared: the student returns a {type(student).__name__}"
            f", the teacher a {type(teacher).__name__}, without floating-point tensors in one of them. Train "
            "without distillation: distill=0"
        )
    if mine.keys() != theirs.keys():
        raise PruningError(
            f"the student returns {', '.join(mine)}, the teacher {', '.join(theirs)}: distillation needs a "
            "teacher with the same outputs; give one, or train with distill=0"
        )
    for name, x in mine.items():
        if x.shape != theirs[name].shape:
            shown = "" if len(mine) == 1 else f" {name!r}"
            raise PruningError(
                f"the teacher's outputs{shown} have shape {tuple(theirs[name].shape)}, the student's "
                f"{tuple(x.shape)}: distillation needs a teacher with the same classes; give one, or "
                "train with distill=0"
            )


def soft_loss(
    student: object, teacher: object, targets: object, temperature: float, compare: Comparison = "auto"
) -> Tensor:
    """Return the mean difference between the outputs of a student and its teacher's.

    Of logits it is T² KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the examples and, in
    dense outputs, over the positions; of other values `relative_error`.

    Args:
        student, teacher: outputs: tensors, or nested containers of tensors.
        targets: targets of the batch. With `auto`, a tensor is logits if the cross entropy of these targets
            could be taken with it, and so are the `logits` that an output holds.
        temperature: T.
        compare: `logits` or `values` decides for all outputs.

    Raises:
        PruningError: see `require_comparable`.
    """
    require_comparable(student, teacher)
    theirs = comparable(teacher)
    terms = []
    for name, x in comparable(student).items():
        dim = class_dimension(student, x, targets, compare)
        if dim is None:
            terms.append(relative_error(x, theirs[name]))
        else:
            terms.append(_divergence(x, theirs[name], dim, temperature))
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean()


def relative_error(values: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors, divided by the mean square of the second.

    >>> relative_error(torch.full((2, 3), 3.0), torch.full((2, 3), 2.0))
    tensor(0.2500)
    """
    reference = reference.detach()
    scale = reference.square().mean().clamp(min=torch.finfo(reference.dtype).tiny)
    return (values - reference).square().mean() / scale


def _divergence(logits: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    if logits.ndim > 2:  # the mean is over all positions
        logits, teacher = (x.movedim(dim, -1).flatten(0, -2) for x in (logits, teacher))
        dim = 1
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim),
        F.log_softmax(teacher / temperature, dim),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def class_dimension(output: object, x: Tensor, targets: object, compare: Comparison) -> int | None:
    """Return the dimension of the classes of an output; None if its values are compared."""
    if compare == "values":
        return None
    is_held = not isinstance(output, Tensor) and isinstance(held(output, "logits"), Tensor)
    if compare == "logits" or is_held:
        # Containers hold the logits of tokens as (N, tokens, classes).
        dim = x.ndim - 1 if is_held and x.ndim == 3 else min(1, x.ndim - 1)
        return dim if x.ndim > 1 and x.shape[dim] > 1 else None
    try:
        if not isinstance(targets, Tensor):
            return None
        logits_for(classes_of(targets, x), x)
    except PruningError:
        return None
    return 1


def feature_names(features: Mapping[str, str] | tuple[str, ...] | list[str]) -> dict[str, str]:
    """Return the modules of a student with those of its teacher, from names or texts STUDENT=TEACHER.

    >>> feature_names(["layer3", "layer4=blocks.7"])
    {'layer3': 'layer3', 'layer4': 'blocks.7'}
    """
    if isinstance(features, Mapping):
        return dict(features)
    found = {}
    for text in features:
        mine, equals, theirs = text.partition("=")
        found[mine] = theirs if equals else mine
    return found
