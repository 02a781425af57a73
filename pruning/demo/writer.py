"""Writes the page: what networks take (`Images`), the check of their programs, and the HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.demo.lowering import program_of
from pruning.deploy.export import TOLERANCE, folded
from pruning.deploy.runtimes import difference, first_line
from pruning.errors import ExportError, PruningError
from pruning.planning.cost import count
from pruning.utils.files import replace_file
from pruning.utils.html import render
from pruning.utils.modules import copied

#: Thickness of the pen in pixels of 28 x 28 images. Chosen on the embedded validation digits.
PEN = 2.4
#: How many images of noise the page checks itself with.
NOISE = 3
#: Most bytes of weights: browsers do not open much longer files.
LARGEST = 300_000_000


@dataclass(frozen=True)
class Demo:
    """A page that was written. `difference` is the largest of its programs' from PyTorch, `size` in bytes."""

    path: Path
    networks: tuple[str, ...]
    size: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {' and '.join(self.networks)}, {self.size:,} bytes; the page's operations give "
            f"PyTorch's outputs to {self.difference:.1e} of the largest (tolerance {TOLERANCE:g}). "
            "Open it in a browser"
        )


@dataclass(frozen=True)
class Images:
    """What networks take: shape (C, H, W), the normalisation by channel, and images to click on.

    `examples` are pairs of pixels (C, H, W), uint8, and the number of their class.
    """

    shape: tuple[int, ...]
    mean: Sequence[float]
    std: Sequence[float]
    examples: Sequence[tuple[Tensor, int]] = ()

    def __post_init__(self) -> None:
        size = "x".join(map(str, self.shape))
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise PruningError(
                f"inputs of {size}: a page can draw images of 1 or 3 channels, such as 1x28x28"
            )
        if not len(self.mean) == len(self.std) == self.shape[0] or min(self.std) <= 0:
            raise PruningError(
                f"inputs of {size} need a mean and a positive standard deviation for each channel; given: "
                f"{list(self.mean)} and {list(self.std)}"
            )

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (C, H, W) as the networks take them, (1, C, H, W); the page computes the same."""
        mean, std = (np.array(each, dtype=np.float64).reshape(-1, 1, 1) for each in (self.mean, self.std))
        return torch.from_numpy(((pixels.numpy() / 255 - mean) / std).astype(np.float32))[None]

    def noise(self) -> list[Tensor]:
        """Pixels at random, always the same: demo.js draws them likewise."""
        state, found = 1, []
        for _ in range(NOISE * int(np.prod(self.shape))):
            state = (state * 1664525 + 1013904223) % 2**32
            found.append(state >> 24)
        return list(torch.tensor(found, dtype=torch.uint8).reshape(NOISE, *self.shape))


def demo(
    networks: Mapping[str, nn.Module],
    path: str | Path,
    images: Images,
    *,
    title: str | None = None,
    classes: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Demo:
    """Write a page in which networks say what is drawn, side by side.

    Args:
        networks: classifiers by the name they are shown with, the main one last; left as
            they are.
        path: replaced where it exists.
        title: of the page, by default the networks' names.
        classes: their names in order, by default their numbers.
        facts: plain data on how each was made, shown at the end.

    Raises `ExportError` when a network cannot be traced or has an operation without a rule, which is
    named; `PruningError` for what is no classifier. Then nothing is written.
    """
    inputs = [images.normalised(pixels) for pixels in (*images.noise(), *(x for x, _ in images.examples))]
    worst, shown = 0.0, []
    for name, model in networks.items():
        found, apart = _network(name, model, inputs)
        worst = max(worst, apart)
        shown.append(found)
    weights = sum(each["bytes"] for each in shown)
    if weights > LARGEST:
        raise PruningError(f"{weights:,} bytes of weights are too many for a page, which holds {LARGEST:,}")
    sizes = {len(each["expected"][0]) for each in shown}
    if len(sizes) > 1 or (classes is not None and {len(classes)} != sizes):
        given = [*(f"{each['name']}: {len(each['expected'][0])}" for each in shown)]
        given += [f"names: {len(classes)}"] if classes is not None else []
        raise PruningError(f"the numbers of classes differ: {', '.join(given)}")
    names = list(classes) if classes is not None else [str(i) for i in range(*sizes)]
    if any(truth >= len(names) for _, truth in images.examples):
        raise PruningError(f"the test images have more classes than the networks, {len(names)}")
    data = {
        "input": {"shape": list(images.shape), "mean": list(images.mean), "std": list(images.std)},
        "classes": names,
        "networks": shown,
        "noise": NOISE,
        "examples": [
            {"pixels": _encoded(pixels.contiguous().numpy().tobytes()), "truth": truth}
            for pixels, truth in images.examples
        ],
        "tolerance": TOLERANCE,
        "pen": PEN,
    }
    page = _page(title or " beside ".join(reversed(list(networks))), images, data, facts or {}).encode()
    replace_file(path, page)
    return Demo(Path(path), tuple(networks), len(page), worst)


def _network(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], float]:
    """What the page holds of a network, and how far its program is from it."""
    whole = copied(model).cpu().float().eval().requires_grad_(False)
    try:
        with torch.no_grad():
            expected = [whole(x) for x in inputs]
    except Exception as error:  # of the user's model
        raise PruningError(
            f"{name} does not run on inputs of shape {tuple(inputs[0].shape[1:])}: {first_line(error)}"
        ) from error
    first = expected[0]
    if not isinstance(first, Tensor) or first.ndim != 2 or first.shape[1] < 2:
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise PruningError(f"{name} is no classifier: outputs (N, classes) were expected, it gives {got}")
    ready = folded(whole, [inputs[0]])
    program = program_of(ready, inputs[0])
    apart = max(difference(y.flatten(), program(x)) for x, y in zip(inputs, expected, strict=True))
    if not apart <= TOLERANCE:
        raise ExportError(
            f"{name}: its operations differ from the model by {apart:.1e} of the largest output (tolerance "
            f"{TOLERANCE:g}). Does the model take a Python value from a tensor?"
        )
    cost = count(ready, inputs[0])
    found = {
        "name": name,
        "params": cost.params,
        "macs": cost.macs,
        "bytes": len(program.weights),
        "probabilities": program.probabilities,
        "program": program.to_json(),
        "weights": _encoded(program.weights),
        "expected": [[float(f"{value:.9g}") for value in y.flatten().tolist()] for y in expected],
    }
    return found, apart


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _page(title: str, images: Images, data: Mapping[str, Any], facts: Mapping[str, object]) -> str:
    """Fill the template of the page."""
    channels, height, width = images.shape
    values = {
        "title": title,
        "digits": data["classes"] == [str(i) for i in range(10)] and channels == 1,
        "several": len(data["networks"]) > 1,
        "coloured": channels == 3,
        "width": width,
        "height": height,
        "facts": [(name, json.dumps(fact, indent=2)) for name, fact in facts.items()],
        "data": data,
    }
    return render(Path(__file__).with_name("demo.html"), values)
