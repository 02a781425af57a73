"""The inputs with which `export` calls a model, and their dynamic dimensions, as flags name them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning.cli import build
from pruning.cli.factories import require_runs
from pruning.cli.sources import Data
from pruning.deploy.signature import argument_names
from pruning.errors import PruningError
from pruning.utils.tree import Inputs, map_tensors, tensors


def dynamic_of(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return the dimensions that --dynamic names, by input.

    Raises:
        PruningError: a text is not NAME:DIM.

    >>> dynamic_of(["x:2", "ids:1", "x:3"])
    {'x': [2, 3], 'ids': [1]}
    """
    found: dict[str, list[int]] = {}
    for text in texts:
        matched = re.fullmatch(r"(\w+):(\d+)", text)
        if matched is None:
            raise PruningError(f"--dynamic {text!r}: expected an input and a dimension, such as x:2")
        found.setdefault(matched[1], []).append(int(matched[2]))
    return found


def tensors_of(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors that --input names: noise; zeros and ones where the type holds whole numbers.

    Raises:
        PruningError: a text is not NAME:SIZES or NAME:SIZES:TYPE, or a name occurs twice.

    >>> {name: (x.shape, x.dtype) for name, x in tensors_of(["ids:2x7:int64"]).items()}
    {'ids': (torch.Size([2, 7]), torch.int64)}
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for text in texts:
        matched = re.fullmatch(r"(\w+):([1-9]\d*(?:[xX][1-9]\d*)*)(?::(\w+))?", text)
        dtype = getattr(torch, (matched and matched[3]) or "float32", None)
        if matched is None or not isinstance(dtype, torch.dtype):
            raise PruningError(
                f"--input {text!r}: expected a name, sizes with the batch and, unless it is float32, a type: "
                "x:2x64 or ids:2x7:int64"
            )
        if matched[1] in found:
            raise PruningError(f"--input {text!r}: {matched[1]} is given twice; give each input once")
        shape = [int(size) for size in matched[2].lower().split("x")]
        found[matched[1]] = _noise(shape, dtype, generator)
    return found


def _noise(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)


def example_inputs(
    args: argparse.Namespace,
    model: nn.Module,
    texts: Sequence[str],
    content: Mapping[str, Any],
    data: Data | None,
) -> Inputs:
    """Return inputs on which the model runs: of --input, of the checkpoint, or of the data.

    Raises:
        PruningError: flags contradict one another, name no argument of the model, or the model does not
            run on the inputs; the message says what to give.
    """
    given = tensors_of(texts)
    if given:
        if build.input_shape(args) is not None:
            raise PruningError("--input and --input-shape both say what the inputs are: give one of them")
        names = argument_names(model)
        for name in given:
            if name not in names:
                raise PruningError(
                    f"--input {name}: {type(model).__name__}.forward has no such argument; "
                    f"it takes: {', '.join(names)}"
                )
        require_runs(model, given, f"on --input {' '.join(texts)} (types other than float32: ids:2x7:int64)")
        return given
    several = _several(content, data) if build.input_shape(args) is None else None
    if several is not None:
        require_runs(model, several)
        return several
    shape = build.image_shape(args, content, data)
    single = torch.zeros(2, *shape, dtype=build.stored_dtype(content))
    require_runs(model, single, f"on inputs of shape {shape}{_cure(model)}")
    return single


def _several(content: Mapping[str, Any], data: Data | None) -> Inputs | None:
    """Return the inputs of the data, or of the checkpoint, if they are several or have names."""
    if data is not None and not isinstance(data.examples, Tensor):
        examples: Inputs = map_tensors(lambda x: x.cpu(), data.examples)
        return examples if isinstance(examples, Mapping) or len(tensors(examples)) > 1 else None
    stored = content["provenance"].get("inputs") or []
    if len(stored) < 2 and not any("name" in each for each in stored):
        return None
    generator = torch.Generator().manual_seed(0)
    made = [_noise([2, *each["shape"]], getattr(torch, each["dtype"]), generator) for each in stored]
    if all("name" in each for each in stored):
        return {each["name"]: x for each, x in zip(stored, made, strict=True)}
    return made


def _cure(model: nn.Module) -> str:
    """Return how to give several inputs, for models that take several."""
    names = argument_names(model)
    if len(names) < 2:
        return ""
    return f" (several inputs: --input {names[0]}:2x64 {names[1]}:2x7:int64)"
