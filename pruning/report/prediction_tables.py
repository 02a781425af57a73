"""Prepare the predictions of two networks for the report: images that one gets wrong, a confusion matrix."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pruning.report.figures import png

#: Largest number of classes in a confusion matrix.
MAX_CLASSES = 30


class Thumbnails(NamedTuple):
    """Images embedded in the page, each as PNG in base64 with a text below it, and their caption."""

    images: list[tuple[str, str]]
    caption: str


class Confusion(NamedTuple):
    """A confusion matrix: names of the classes, and rows of (count, strength of the color in percent)."""

    classes: list[str]
    rows: list[list[tuple[int, int]]]


def class_names(provenance: Mapping[str, object], count: int) -> list[str]:
    """Return the names of the classes as the provenance of the result has them, else their numbers."""
    names = provenance.get("classes")
    if isinstance(names, Sequence) and len(names) == count:
        return [str(name) for name in names]
    return [str(i) for i in range(count)]


def wrong_predictions(found: Mapping[str, Any], classes: Sequence[str], dense: str) -> list[Thumbnails]:
    """Return the images of `mistakes.json`, which only one of two networks classifies correctly.

    Args:
        found: the content of `mistakes.json`.
        classes: names of the classes.
        dense: what the dense network is called.
    """
    called = {"dense": dense, "small": "small"}
    shown = []
    for kind, right, wrong in (("lost", "dense", "small"), ("won", "small", "dense")):
        kept = [example for example in found[kind] if example["image"]]
        if kept:
            images = [
                (base64.b64encode(png(example["image"])).decode(),
                 f"{classes[example['truth']]}, not {classes[example[wrong]]}")
                for example in kept
            ]  # fmt: skip
            caption = (
                f"Validation images that only the {called[right]} network classifies correctly "
                f"({len(kept)} of {found['count'][kind]}), with the true class and the class that the "
                f"{called[wrong]} network predicts."
            )
            shown.append(Thumbnails(images, caption))
    return shown


def confusion_matrix(found: Mapping[str, Any], classes: Sequence[str]) -> Confusion | None:
    """Return the small network's confusion matrix, in which only wrong predictions are colored."""
    counts = found["confusion"]["small"]
    if len(counts) > MAX_CLASSES:
        return None
    wrong = [[0 if i == j else n for j, n in enumerate(row)] for i, row in enumerate(counts)]
    most = max(1, *(n for row in wrong for n in row))
    rows = [
        [(count, round(100 * n / most)) for count, n in zip(*pair, strict=True)]
        for pair in zip(counts, wrong, strict=True)
    ]
    return Confusion(list(classes), rows)
