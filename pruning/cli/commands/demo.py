"""`python -m pruning demo`: make one HTML page on which a network classifies drawings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.command_flags import DemoFlags
from pruning.cli.factories import require_runs
from pruning.cli.named_images import BUILT_IN
from pruning.cli.sources import Data
from pruning.demo import Images, demo
from pruning.errors import PruningError
from pruning.utils.modules import thread_count

#: Most test images to click on, and most batches that are searched for them.
EXAMPLES, SEARCHED = 10, 20


def execute(args: argparse.Namespace) -> None:
    flags = read_flags(DemoFlags, args)
    network, content = build.network_with(args, args.checkpoint), build.described(args, args.checkpoint)
    against = None if flags.against is None else build.network_with(args, flags.against)
    data = build.data_of(args)
    output = flags.output or args.checkpoint.with_suffix(".html")
    for path in filter(None, (args.checkpoint, flags.against)):
        if output.exists() and output.samefile(path):
            raise PruningError(f"--output {output} is a checkpoint; give another name")
    images = _images(args, content, data)
    require_runs(network, torch.zeros(2, *images.shape), f"on inputs of shape {images.shape}")
    name = _name(args, content, network)
    models, facts, title = {name: network}, {name: content["provenance"]}, name
    if against is not None and flags.against is not None:
        stored = build.described(args, flags.against)
        other = _name(args, stored, against)
        names = ("dense", "pruned") if other == name else (other, name)
        title = f"{name}, pruned and dense" if other == name else f"{name} beside {other}"
        models = dict(zip(names, (against, network), strict=True))
        facts = dict(zip(names, (stored["provenance"], content["provenance"]), strict=True))
    classes = flags.classes or content["provenance"].get("classes")
    if not classes and data is not None:
        classes = list(data.classes) or None
    with thread_count(1):
        made = {name: each for name, each in facts.items() if each}
        print(demo(models, output, images, title=title, classes=classes, facts=made))


def _images(args: argparse.Namespace, content: Mapping[str, Any], data: Data | None) -> Images:
    """What the network takes, as flags, its checkpoint or the data say."""
    size = build.image_shape(args, content, data)
    scales = build.normalization(args, content) or _usual(content, data)
    if scales is None:
        raise PruningError(
            f"{args.checkpoint} does not say how its images were normalized: give --mean and --std "
            "(0 and 1 for pixels as they are)"
        )
    images = Images(size, scales["mean"], scales["std"])
    return images if data is None else replace(images, examples=_examples(images, data))


def _usual(content: Mapping[str, Any], data: Data | None) -> dict[str, Any] | None:
    """The normalization of the data which the checkpoint or --data names."""
    for name in (content["provenance"].get("dataset"), data.name if data is not None else None):
        if name in BUILT_IN:
            return {"mean": BUILT_IN[name].mean, "std": BUILT_IN[name].std}
    if data is not None and data.preprocessing is not None:
        return {"mean": data.preprocessing.mean, "std": data.preprocessing.std}
    return None


def _name(args: argparse.Namespace, content: Mapping[str, Any], model: nn.Module) -> str:
    """What a network is called: by its factory where that is known, else by its class."""
    made = content["provenance"].get("model") or {}
    named = args.model or (made.get("name") if isinstance(made, dict) else None)
    return named.rpartition(":")[2] if named else type(model).__name__


def _examples(images: Images, data: Data) -> list[tuple[Tensor, int]]:
    """The first test image of each class, as pixels."""
    found: dict[int, Tensor] = {}
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (images.mean, images.std))
    for number, (inputs, targets) in enumerate(data.test if data.test is not None else data.validation):
        if number == SEARCHED or len(found) == EXAMPLES:
            break
        if not isinstance(inputs, Tensor) or tuple(inputs.shape[1:]) != images.shape:
            got = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise PruningError(
                f"data {data.name!r} gives {got}, the network takes {images.shape}: give data of this shape"
            )
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise PruningError(
                f"data {data.name!r} gives targets {shape}: a page shows an image of each class, and needs "
                "one class an image; leave out --data"
            )
        for x, truth in zip(inputs, targets.tolist(), strict=True):
            if truth not in found and len(found) < EXAMPLES:
                found[truth] = x * std + mean
    if any(x.min() < -0.01 or x.max() > 1.01 for x in found.values()):
        raise PruningError(
            f"data {data.name!r}: by this mean and standard deviation its pixels are not from 0 to 1; are "
            "--mean and --std those of the data?"
        )
    return [((255 * x).round().clamp(0, 255).to(torch.uint8), truth) for truth, x in sorted(found.items())]
