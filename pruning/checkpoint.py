"""Checkpoints: one plain dict, loaded with `weights_only=True`, that rebuilds its network.

    {"format": 1, "class": "models.YourNet:YourNet", "arguments": {...},
     "layers": {"features.conv1": {"out_channels": 3, ...}, ...}, "folded": [...],
     "not_in_place": [...], "sizes": {"block1": {"width": 14}, ...}, "state_dict": {...},
     "buffers": {...}, "provenance": {...}}

The network is made by calling the class with the arguments, then every layer is given the
channel counts in `layers`: so a pruned network loads whether or not its class can build
narrow widths. `sizes` are those that modules' own code views or splits channels by. `buffers` are those
with persistent=False, which a state dict leaves out: they hold channels, too. Loading needs torch and
the class, nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import CheckpointError
from pruning.graph.layers import is_registered, rule_for
from pruning.load_pruned import rebuild, takes
from pruning.surgery.width_attributes import changed_attributes
from pruning.utils.files import read_plain, replace_file

FORMAT = 1


def save(
    path: str | Path,
    model: nn.Module,
    *,
    arguments: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a model so that `load` gives it back with bit-identical outputs.

    The file appears whole or not at all.

    Args:
        arguments: plain data that the model's class is called with; by default the
            model's attribute `config`, where that is a mapping with which the class can be called,
            and else no argument.
        provenance: plain data on how the model was made (see `provenance`).

    Raises `CheckpointError` when the file cannot be written, or holds what is not plain data.
    """
    kind = type(model)
    if arguments is None:
        config = getattr(model, "config", None)
        arguments = config if isinstance(config, Mapping) and takes(kind, config) else {}
    content = {
        "format": FORMAT,
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "arguments": dict(arguments),
        **describe(model),
        "provenance": dict(provenance or {}),
    }
    write(path, content)


def load(
    path: str | Path,
    factory: Callable[..., nn.Module] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The network of a checkpoint, in eval mode.

    Args:
        factory: makes the unpruned network when called with the stored arguments, or with none
            where it cannot take those; needed where the class cannot be imported or takes others.

    Raises `CheckpointError` for a file that is missing, damaged, foreign or from a newer
    version, for a class that is not an importable `nn.Module`, and where more than channels
    differs from what it makes. Nothing in the file is executed besides the constructor of that class.
    """
    content = read(path)
    make, arguments = factory or _find_class(path, content["class"]), content["arguments"]
    if factory is not None and not takes(factory, arguments):
        arguments = {}
    try:
        model = make(**arguments)
    except Exception as error:  # of the user's class
        raise CheckpointError(
            f"{path}: {content['class']} could not be made with {arguments}: "
            f"{type(error).__name__}: {error}. Give a factory that makes the unpruned network"
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{path}: the factory gave a {type(model).__name__}, not an nn.Module")
    fit(path, model, content)
    return model.to(device).eval()


def fit(path: str | Path, model: nn.Module, content: Mapping[str, Any]) -> None:
    """Give a freshly made dense network the widths and weights of a checkpoint's content, in place.

    Raises `CheckpointError` where they do not fit it.
    """
    try:
        rebuild(model, content)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {reason}. Was the class changed since it was "
            "saved, or is the factory another one?"
        ) from error


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, checked; see `load` for what is raised."""
    content = read_plain(path)
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(
            f"{path} is not a checkpoint of this toolkit: it has no format version. Weights alone need the "
            "network they are of (--model)"
        )
    if not isinstance(content["format"], int) or content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']!r}, this version reads up to {FORMAT}: update the toolkit"
        )
    missing = {"class", "arguments", "layers", "folded", "state_dict", "provenance"} - content.keys()
    if missing:
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    kinds = {"class": str, "folded": list, **dict.fromkeys(("arguments", "layers", "state_dict"), dict)}
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            raise CheckpointError(
                f"{path} is damaged: its {key} is a {type(content[key]).__name__}, not a {kind.__name__}"
            )
    return content


def write(path: str | Path, content: Any) -> None:
    """Write plain data and tensors: to a temporary file that then takes the name."""
    path = Path(path)
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="cpu")
    except (pickle.PickleError, AttributeError, TypeError) as error:  # what cannot be pickled raises any
        raise CheckpointError(
            f"{path} was not written: only tensors and plain data can be stored ({error})"
        ) from error
    replace_file(path, buffer.getvalue())


def describe(model: nn.Module) -> dict[str, Any]:
    """A model's channel counts, folded norms and weights, as plain data and tensors."""
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        rule = rule_for(layer)
        if rule is not None and not is_registered(layer):  # of those, `sizes` has what pruning changed
            counts = {rule.out_count: getattr(layer, rule.out_count)}
            for attribute in filter(None, (rule.in_count, rule.parts)):
                counts[attribute] = getattr(layer, attribute)
            layers[name] = {key: list(n) if isinstance(n, tuple) else n for key, n in counts.items()}
    everywhere = list(model.named_modules(remove_duplicate=False))  # a module may have several names
    folded = [name for name, layer in everywhere if type(layer) is nn.Identity]
    not_in_place = [name for name, layer in model.named_modules() if getattr(layer, "inplace", None) is False]
    everything = model.named_modules()
    sizes = {name: changed for name, module in everything if (changed := changed_attributes(module))}
    # What a module's `get_extra_state` gives may be anything; `write` refuses what is not plain data.
    state = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
    buffers = {
        name: buffer.cpu()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in state
    }
    return {
        "layers": layers,
        "folded": folded,
        "not_in_place": not_in_place,
        "sizes": sizes,
        "state_dict": state,
        "buffers": buffers,
    }


def _find_class(path: str | Path, name: Any) -> type[nn.Module]:
    module_name, _, qualified = str(name).partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except Exception as error:  # of the user's module
        raise CheckpointError(
            f"{path}: its class {name!r} cannot be imported ({type(error).__name__}: {error}). "
            "Run from where it can, or give a factory"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"{path} was refused: {name!r} is not a class of networks (nn.Module)")
    return found


def write_loader(folder: str | Path) -> Path:
    """Put `load_pruned.py` into a folder: a file that loads its checkpoints without this toolkit."""
    path = Path(folder) / "load_pruned.py"
    replace_file(path, Path(__file__).with_name("load_pruned.py").read_bytes())
    return path


def provenance(**facts: Any) -> dict[str, Any]:
    """How a checkpoint was made: command, commit, versions, and whatever is given besides."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "torch-pruning", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": " ".join(["python", *(_relative(part) for part in sys.argv)]),
        "commit": _commit(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        **facts,
    }


def _relative(argument: str) -> str:
    """A path below the current folder, as one would type it there; anything else as it is."""
    path = Path(argument)
    below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if below else argument


def _commit() -> str:
    """The commit that is checked out, marked when the tree differs from it; empty outside git."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("-dirty" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
