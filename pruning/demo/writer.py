"""Write the page: describe the input images (`Images`), check the programs, and write the HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from pruning.demo.lowering import program_of
from pruning.deploy.export import TOLERANCE, folded
from pruning.deploy.runtimes import first_line, relative_difference
from pruning.errors import ExportError, PruningError
from pruning.planning.cost import count
from pruning.utils.files import replace_file
from pruning.utils.html import render
from pruning.utils.modules import copied

#: Width of the pen, in pixels of a 28 x 28 image; tuned on the embedded validation digits.
PEN = 2.4
#: Number of noise images on which the page checks its networks.
NOISE_IMAGES = 3
#: Largest size of all weights in a page, in bytes; browsers do not open much larger files.
MAX_BYTES = 300_000_000


@dataclass(frozen=True)
class Demo:
    """A page that was written.

    Attributes:
        path: path of the file.
        networks: names of its networks.
        size: size of the file in bytes.
        difference: largest difference between a program of the page and its model in PyTorch, as a
            share of the model's largest output.
    """

    path: Path
    networks: tuple[str, ...]
    size: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {' and '.join(self.networks)}, {self.size:,} bytes; the outputs of its programs "
            f"are within {self.difference:.1e} of PyTorch's, relative to the largest (tolerance "
            f"{TOLERANCE:g}). Open it in a browser"
        )


@dataclass(frozen=True)
class Images:
    """The images that the networks of a page take.

    Args:
        shape: (C, H, W), with 1 or 3 channels.
        mean: mean of each channel, for pixels from 0 to 1.
        std: standard deviation of each channel, for pixels from 0 to 1.
        examples: images to click on: pixels (C, H, W), uint8, and the number of the class.

    Raises:
        PruningError: If the number of channels is not 1 or 3, or if `mean` and `std` do not have one
            number per channel, or if a standard deviation is not positive.

    Example:
        >>> import torch
        >>> from pruning.demo.writer import Images
        >>> images = Images((1, 28, 28), mean=[0.5], std=[0.5])
        >>> images.normalized(torch.full((1, 28, 28), 255, dtype=torch.uint8)).unique()
        tensor([1.])
    """

    shape: tuple[int, ...]
    mean: Sequence[float]
    std: Sequence[float]
    examples: Sequence[tuple[Tensor, int]] = ()

    def __post_init__(self) -> None:
        size = "x".join(map(str, self.shape))
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise PruningError(
                f"inputs of {size}: a page can draw images of 1 or 3 channels; give such, as 1x28x28"
            )
        if not len(self.mean) == len(self.std) == self.shape[0] or min(self.std) <= 0:
            raise PruningError(
                f"inputs of {size} need a mean and a positive standard deviation for each channel; given: "
                f"{list(self.mean)} and {list(self.std)}"
            )

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return pixels (C, H, W) as a normalized batch (1, C, H, W), computed as in the page."""
        mean, std = (np.array(each, dtype=np.float64).reshape(-1, 1, 1) for each in (self.mean, self.std))
        return torch.from_numpy(((pixels.numpy() / 255 - mean) / std).astype(np.float32))[None]

    def noise(self) -> list[Tensor]:
        """Return noise images from a fixed seed; demo.js generates the same ones."""
        state, values = 1, []
        for _ in range(NOISE_IMAGES * int(np.prod(self.shape))):
            state = (state * 1664525 + 1013904223) % 2**32
            values.append(state >> 24)
        return list(torch.tensor(values, dtype=torch.uint8).reshape(NOISE_IMAGES, *self.shape))


class Network(TypedDict):
    """The data of a network in the page.

    `weights` is in base64; `expected` holds PyTorch's outputs on the noise images and on the examples.
    """

    name: str
    params: int
    macs: int
    bytes: int
    probabilities: bool
    program: dict[str, object]
    weights: str
    expected: list[list[float]]


def demo(
    networks: Mapping[str, nn.Module],
    path: str | Path,
    images: Images,
    *,
    title: str | None = None,
    classes: Sequence[str] | None = None,
    facts: Mapping[str, object] | None = None,
) -> Demo:
    """Write a page in which several networks classify what the user draws.

    Args:
        networks: classifiers, by the name that the page shows; the main one last. They are not changed.
        path: the file to write; it is replaced if it exists.
        images: description of the networks' input images.
        title: title of the page, by default the names of the networks.
        classes: names of the classes in order, by default their numbers.
        facts: provenance of the networks as plain data, by name; shown at the end of the page.

    Returns:
        The page that was written.

    Raises:
        ExportError: If a network cannot be traced, or has an operation without a rule. The message names
            the operation.
        PruningError: If a network is not a classifier of such images, or if the numbers of classes
            differ. Nothing is written in either case.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from pruning.demo.writer import Images, demo
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = demo({"tiny": net}, f"{folder}/tiny.html", Images((1, 8, 8), [0.5], [0.5]))
        ...     page.networks, page.path.stat().st_size == page.size
        (('tiny',), True)
    """
    inputs = [images.normalized(pixels) for pixels in (*images.noise(), *(x for x, _ in images.examples))]
    converted = [_convert(name, model, inputs) for name, model in networks.items()]
    shown = [network for network, _ in converted]
    names = _class_names(shown, images, classes)
    channels, height, width = images.shape
    values = {
        "title": title or " beside ".join(reversed(list(networks))),
        "digits": channels == 1 and names == [str(i) for i in range(10)],
        "several": len(shown) > 1,
        "colored": channels == 3,
        "width": width,
        "height": height,
        "facts": [(name, json.dumps(fact, indent=2)) for name, fact in (facts or {}).items()],
        "data": _data(shown, images, names),
    }
    page = render(Path(__file__).with_name("demo.html"), values).encode()
    replace_file(path, page)
    return Demo(
        Path(path), tuple(networks), len(page), max([0.0, *(difference for _, difference in converted)])
    )


def _data(networks: list[Network], images: Images, classes: list[str]) -> dict[str, object]:
    """Return the data that the page's script reads."""
    return {
        "input": {"shape": list(images.shape), "mean": list(images.mean), "std": list(images.std)},
        "classes": classes,
        "networks": networks,
        "noise": NOISE_IMAGES,
        "examples": [
            {"pixels": _encode(pixels.contiguous().numpy().tobytes()), "truth": truth}
            for pixels, truth in images.examples
        ],
        "tolerance": TOLERANCE,
        "pen": PEN,
    }


def _class_names(networks: Sequence[Network], images: Images, classes: Sequence[str] | None) -> list[str]:
    """Check the total size of the weights and the numbers of classes, and return the class names."""
    weights = sum(network["bytes"] for network in networks)
    if weights > MAX_BYTES:
        raise PruningError(
            f"{weights:,} bytes of weights are too many for a page, which holds at most {MAX_BYTES:,}: give "
            "fewer or smaller networks"
        )
    sizes = {network["name"]: len(network["expected"][0]) for network in networks}
    given = [f"{name}: {size}" for name, size in sizes.items()]
    if classes is not None:
        given.append(f"names: {len(classes)}")
    different = {*sizes.values(), *(() if classes is None else (len(classes),))}
    if len(different) > 1:
        raise PruningError(
            f"the numbers of classes differ: {', '.join(given)}; give networks with the same classes, "
            "and one name per class"
        )
    names = list(classes) if classes is not None else [str(i) for i in range(*different)]
    if any(truth >= len(names) for _, truth in images.examples):
        raise PruningError(
            f"the test images have more classes than the networks ({len(names)}); give the data that the "
            "networks were trained on"
        )
    return names


def _convert(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Network, float]:
    """Return the data of a network, and the largest relative difference of its program's outputs."""
    reference = copied(model).cpu().float().eval().requires_grad_(False)
    try:
        with torch.no_grad():
            expected = [reference(x) for x in inputs]
    except Exception as error:  # the user's model can fail in any way
        raise PruningError(
            f"{name} does not run on inputs of shape {tuple(inputs[0].shape[1:])}: {first_line(error)}; "
            "give the shape that it takes"
        ) from error
    first = expected[0]
    if not isinstance(first, Tensor) or first.ndim != 2 or first.shape[1] < 2:
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise PruningError(
            f"{name} is not a classifier: outputs (N, classes) were expected, it returns {got}"
        )
    ready = folded(reference, [inputs[0]])
    program = program_of(ready, inputs[0])
    difference = max(
        relative_difference(y.flatten(), program(x)) for x, y in zip(inputs, expected, strict=True)
    )
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{name}: the outputs of its program differ from the model's by {difference:.1e} of the largest "
            f"(tolerance {TOLERANCE:g}). Does the model take a Python value from a tensor? "
            "Compute with tensors there"
        )
    cost = count(ready, inputs[0])
    network = Network(
        name=name,
        params=cost.params,
        macs=cost.macs,
        bytes=len(program.weights),
        probabilities=program.probabilities,
        program=program.to_json(),
        weights=_encode(program.weights),
        expected=[[float(f"{value:.9g}") for value in y.flatten().tolist()] for y in expected],
    )
    return network, difference


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()
