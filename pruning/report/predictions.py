"""What a pruned classifier gets wrong that the dense one got right, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.batches import to_device
from pruning.training.losses import IGNORED, classes_of
from pruning.utils.modules import call, device_of, eval_mode

#: Larger images are not kept: they would make the run's folder large.
MOST_PIXELS = 64 * 64


def mistakes(
    dense: nn.Module, small: nn.Module, batches: Iterable[tuple[Any, Any]], most: int = 20
) -> dict[str, Any]:
    """Compare two classifiers example by example, as plain data.

    Args:
        batches: (inputs, targets), targets (N,); logits lie along dimension 1.
        most: examples kept of each kind.

    Returns `confusion`, by network a matrix (classes, classes) of counts with the truth in rows;
    and the examples that only the dense one (`lost`) and only the small one (`won`) gets
    right: `{"truth", "dense", "small"}` each, with the `image` as (C, H, W) values from 0 to 255
    where the inputs are small images.

    Raises `PruningError` for outputs that are not those of a classifier.
    """
    counts: dict[str, Tensor] = {}
    found: dict[str, list[dict[str, Any]]] = {"lost": [], "won": []}
    how_many = dict.fromkeys(found, 0)
    device = device_of(small)
    with torch.inference_mode(), eval_mode(dense, small):
        for batch in batches:
            inputs, given = to_device(batch, device)
            chosen = {}
            for name, model in (("dense", dense), ("small", small)):
                logits = call(model, inputs)
                targets = classes_of(given, logits)
                if not isinstance(logits, Tensor) or logits.ndim != 2 or targets.ndim != 1:
                    raise PruningError("mistakes are compared of classifiers: one label an example")
                counted = (targets != IGNORED).nonzero().flatten()
                classes = logits.shape[1]
                truth, chosen[name] = targets[counted], logits.argmax(1)[counted]
                places = (truth * classes + chosen[name]).cpu()
                seen = torch.bincount(places, minlength=classes**2).reshape(classes, classes)
                counts[name] = counts.get(name, 0) + seen
            right = {name: guess == truth for name, guess in chosen.items()}
            for kind, only, other in (("lost", "dense", "small"), ("won", "small", "dense")):
                at = (right[only] & ~right[other]).nonzero().flatten()
                how_many[kind] += len(at)
                for i in at[: most - len(found[kind])].tolist():
                    example = {"truth": int(truth[i])}
                    example.update({name: int(guess[i]) for name, guess in chosen.items()})
                    found[kind].append({**example, "image": _pixels(inputs, int(counted[i]))})
    return {
        "confusion": {name: count.tolist() for name, count in counts.items()},
        "count": how_many,
        **found,
    }


def _pixels(inputs: Any, number: int) -> list[Any] | None:
    """One image of a batch in 256 shades; None for what is no small image."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    image = inputs[number].float().cpu()
    if image[0].numel() > MOST_PIXELS:
        return None
    image = image - image.min()
    return (image / image.max().clamp(min=1e-9) * 255).round().to(torch.uint8).tolist()
