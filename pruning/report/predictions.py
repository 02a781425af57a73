"""Find the examples that a pruned classifier and the dense one classify differently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.batches import to_device
from pruning.training.losses import IGNORED, classes_of
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.outputs import logits_of
from pruning.utils.tree import Inputs

#: Largest image that is stored, in pixels; larger ones would take too much space in the run's folder.
MAX_PIXELS = 64 * 64

#: An image (C, H, W) with values from 0 to 255, as nested lists.
Pixels = list[list[list[int]]]


class Example(TypedDict):
    """An example that only one network classifies correctly: its class, both predictions and its image."""

    truth: int
    dense: int
    small: int
    image: Pixels | None


class Differences(TypedDict):
    """The content of a run's `mistakes.json`.

    Attributes:
        confusion: for `dense` and `small`, (classes, classes) counts with true classes in rows.
        count: number of all `lost` and of all `won` examples; only some of them are stored.
        lost: stored examples that only the dense network classifies correctly.
        won: stored examples that only the small network classifies correctly.
    """

    confusion: dict[str, list[list[int]]]
    count: dict[str, int]
    lost: list[Example]
    won: list[Example]


def differing_predictions(
    dense: nn.Module, small: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], most: int = 20
) -> Differences:
    """Compare two classifiers example by example.

    Args:
        dense: the network before pruning; returns logits (N, classes).
        small: the network after pruning, on the same device; returns logits (N, classes).
        batches: pairs (inputs, targets); targets are classes (N,) or probabilities (N, classes). Targets
            of -100 are left out.
        most: largest number of examples to store of each kind.

    Returns:
        Plain data. An example has its image if the inputs are (N, 1, H, W) or (N, 3, H, W) and H · W is
        at most `MAX_PIXELS`, else None.

    Raises:
        PruningError: If the outputs or targets are not those of a classifier.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pruning.report.predictions import differing_predictions
        >>> right, wrong = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(right.weight), nn.init.zeros_(wrong.weight)
        >>> found = differing_predictions(right, wrong, [(torch.eye(2), torch.tensor([0, 1]))])
        >>> found["count"], found["confusion"]["small"]
        ({'lost': 1, 'won': 0}, [[1, 0], [1, 0]])
    """
    confusion: dict[str, Tensor] = {}
    found: dict[str, list[Example]] = {"lost": [], "won": []}
    count = dict.fromkeys(found, 0)
    device = device_of(small)
    with torch.inference_mode(), eval_mode(dense, small):
        for batch in batches:
            inputs, given = to_device(batch, device)
            predicted = {}
            for name, model in (("dense", dense), ("small", small)):
                logits, targets = _checked(call(model, inputs), given)
                counted = (targets != IGNORED).nonzero().flatten()
                classes = logits.shape[1]
                truth, predicted[name] = targets[counted], logits.argmax(1)[counted]
                cells = (truth * classes + predicted[name]).cpu()
                counts = torch.bincount(cells, minlength=classes**2).reshape(classes, classes)
                confusion[name] = confusion.get(name, 0) + counts
            right = {name: classes == truth for name, classes in predicted.items()}
            for kind, only, other in (("lost", "dense", "small"), ("won", "small", "dense")):
                differing = (right[only] & ~right[other]).nonzero().flatten()
                count[kind] += len(differing)
                for i in differing[: most - len(found[kind])].tolist():
                    by_dense, by_small = int(predicted["dense"][i]), int(predicted["small"][i])
                    image = _pixels(inputs, int(counted[i]))
                    found[kind].append(
                        {"truth": int(truth[i]), "dense": by_dense, "small": by_small, "image": image}
                    )
    matrices = {name: counts.tolist() for name, counts in confusion.items()}
    return {"confusion": matrices, "count": count, "lost": found["lost"], "won": found["won"]}


def _checked(logits: object, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, classes) and targets (N,); raise `PruningError` for any others."""
    logits = logits_of(logits)
    targets = classes_of(targets, logits)
    if isinstance(logits, Tensor) and isinstance(targets, Tensor) and (logits.ndim, targets.ndim) == (2, 1):
        return logits, targets
    raise PruningError(
        f"only predictions of classifiers can be compared, with logits (N, classes) and targets (N,); got "
        f"{_described(logits)} and {_described(targets)}"
    )


def _described(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _pixels(inputs: Inputs, number: int) -> Pixels | None:
    """Return one image of a batch, scaled to 0 to 255; None if the inputs are not small images."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    image = inputs[number].float().cpu()
    if image[0].numel() > MAX_PIXELS:
        return None
    image = image - image.min()
    return (image / image.max().clamp(min=1e-9) * 255).round().to(torch.uint8).tolist()
