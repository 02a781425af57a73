"""Checkpoints: one plain dict, loaded with `weights_only=True`, from which a network is rebuilt.

    {"format": 1, "class": "models.YourNet:YourNet", "arguments": {...},
     "layers": {"features.conv1": {"out_channels": 3, ...}, ...}, "folded": [...],
     "not_in_place": [...], "sizes": {"block1": {"width": 14}, ...}, "state_dict": {...},
     "buffers": {...}, "provenance": {...}}

Loading calls the class with the arguments, and sets the channel counts of every layer from `layers`: a
pruned network loads even if its class cannot build narrow layers. `folded` names the modules that are
`nn.Identity`, `branches` those that return zeros, with the number of their outputs. `sizes` are the
attributes by which a module's own code views or splits channels. `buffers` are those with persistent=False,
which a state dict omits although they may hold channels. Loading needs only torch and the class
(`pruning/load_pruned.py`).
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
from pruning.graph.layers import is_inferred, is_registered, rule_for
from pruning.load_pruned import REMOVED, NoBranch, rebuild, takes
from pruning.surgery.width_attributes import changed_attributes
from pruning.utils.files import read_plain, replace_file
from pruning.utils.wrappers import unwrapped

FORMAT = 1

#: Numbers that a module stores in attributes, by name of the attribute.
Attributes = dict[str, int | list[int]]

#: The required entries of a checkpoint, with their types. Later versions have added others.
_ENTRIES: dict[str, type] = {
    "class": str,
    "folded": list,
    "arguments": dict,
    "layers": dict,
    "state_dict": dict,
    "provenance": object,
}


def save(
    path: str | Path,
    model: nn.Module,
    *,
    arguments: Mapping[str, object] | None = None,
    provenance: Mapping[str, object] | None = None,
) -> None:
    """Write a model so that `load` returns it with bit-identical outputs.

    The file is replaced atomically: after an error or a crash, the old file remains.

    Args:
        path: of the file; missing folders are created.
        model: it is not changed. Of DataParallel, `torch.compile` and other wrappers, the model inside is
            stored.
        arguments: plain data with which to call the model's class; by default the model's attribute
            `config` if that is a mapping that the class takes, else no arguments.
        provenance: plain data on how the model was made (see `provenance`).

    Raises:
        CheckpointError: if the file cannot be written, or the model's state is not plain data.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "net.pth"
    >>> model, inputs = nn.Linear(4, 3).eval(), torch.rand(2, 4)
    >>> save(path, model, arguments={"in_features": 4, "out_features": 3})
    >>> torch.equal(load(path)(inputs), model(inputs))
    True
    """
    model = unwrapped(model)
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
    """Load the network of a checkpoint, in eval mode.

    Nothing in the file is executed; the only code that runs is the constructor of the stored class.

    Args:
        path: of a file that `save` wrote.
        factory: function that returns the dense network, called with the stored arguments if it takes
            them, else with none. Required if the class cannot be imported, or cannot be called with
            the stored arguments.
        device: of the network.

    Raises:
        CheckpointError: if the file is missing, damaged, no checkpoint or from a newer version, if the
            class is not an importable `nn.Module`, and if the network differs from the stored one in
            more than its channels.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "net.pth"
    >>> save(path, nn.Linear(4, 3))
    >>> load(path, lambda: nn.Linear(4, 5))
    Linear(in_features=4, out_features=3, bias=True)
    """
    content = read(path)
    make, arguments = factory or find_class(path, content["class"]), content["arguments"]
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
        raise CheckpointError(
            f"{path}: the factory gave a {type(model).__name__}, not an nn.Module; give one that returns the "
            "unpruned network"
        )
    restore(path, model, content)
    return model.to(device).eval()


def restore(path: str | Path, model: nn.Module, content: Mapping[str, object]) -> None:
    """Give a newly made unpruned network the widths and weights of a checkpoint, in place.

    Args:
        path: of the checkpoint, for error messages. content: what `read` returned.

    Raises:
        CheckpointError: where they do not fit the network.
    """
    try:
        rebuild(unwrapped(model), content)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {reason}. Was the class changed since it was "
            "saved, or is the factory another one?"
        ) from error


def read(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint file, checked.

    Raises:
        CheckpointError: for a file that is missing, damaged, foreign or from a newer version.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(
            f"{path} is not a checkpoint of this toolkit: it has no format version. For a file of weights, "
            "also name their network (--model)"
        )
    if not isinstance(content["format"], int) or content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']!r}, this version reads up to {FORMAT}: update the toolkit"
        )
    missing = _ENTRIES.keys() - content.keys()
    if missing:
        raise CheckpointError(
            f"{path} is incomplete: it lacks {', '.join(sorted(missing))}; save the network again"
        )
    for key, kind in _ENTRIES.items():
        if not isinstance(content[key], kind):
            raise CheckpointError(
                f"{path} is damaged: its {key} is a {type(content[key]).__name__}, not a {kind.__name__}; "
                "save the network again"
            )
    return content


def write(path: str | Path, content: object) -> None:
    """Write tensors and plain data to a file, atomically.

    Raises:
        CheckpointError: if the file cannot be written, or the content is not plain data.
    """
    path = Path(path)
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="cpu")
    except (pickle.PickleError, AttributeError, TypeError) as error:  # of pickle
        raise CheckpointError(
            f"{path} was not written: only tensors and plain data can be stored ({error}); "
            "leave other objects out of what is saved"
        ) from error
    replace_file(path, buffer.getvalue())


def describe(model: nn.Module) -> dict[str, object]:
    """Return a model's channel counts, folded norms and weights, as plain data and tensors."""
    # `get_extra_state` of a module may return any object; `write` rejects all but plain data.
    state = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
    everywhere = list(model.named_modules(remove_duplicate=False))  # a module may have several names
    return {
        "layers": _channel_counts(model),
        "folded": [name for name, layer in everywhere if type(layer) is nn.Identity],
        "branches": {name: layer.outputs for name, layer in everywhere if isinstance(layer, NoBranch)},
        "removed": {
            name: list(getattr(module, REMOVED))
            for name, module in model.named_modules()
            if hasattr(module, REMOVED)
        },
        "not_in_place": [
            name for name, layer in model.named_modules() if getattr(layer, "inplace", None) is False
        ],
        "sizes": {
            name: changed for name, module in model.named_modules() if (changed := changed_attributes(module))
        },
        "state_dict": state,
        "buffers": {
            name: buffer.cpu()
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name not in state
        },
    }


def _channel_counts(model: nn.Module) -> dict[str, Attributes]:
    """Return the channel counts of torch's layers; those of registered layers are stored in `sizes`."""
    layers: dict[str, Attributes] = {}
    for name, layer in model.named_modules():
        rule = rule_for(layer)
        if rule is not None and not is_registered(layer) and not is_inferred(layer):
            attributes = filter(None, (rule.out_count, rule.in_count, rule.parts))
            counts = {attribute: getattr(layer, attribute) for attribute in attributes}
            layers[name] = {key: list(n) if isinstance(n, tuple) else n for key, n in counts.items()}
    return layers


def find_class(path: str | Path, name: str) -> type[nn.Module]:
    """Import the class of a checkpoint by its name, `module:Class`."""
    module_name, _, qualified = name.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises
        raise CheckpointError(
            f"{path}: its class {name!r} cannot be imported ({type(error).__name__}: {error}). "
            "Run from a folder where it can be imported, or give a factory"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(
            f"{path} was refused: {name!r} is not a subclass of nn.Module; give a factory for its network"
        )
    return found


def write_loader(folder: str | Path) -> Path:
    """Copy `load_pruned.py`, which loads checkpoints without this toolkit, into a folder; return its path."""
    path = Path(folder) / "load_pruned.py"
    replace_file(path, Path(__file__).with_name("load_pruned.py").read_bytes())
    return path


def provenance(**facts: object) -> dict[str, object]:
    """Return a record of how a checkpoint was made: command, commit, versions, threads, given facts.

    >>> facts = provenance(seed=1)
    >>> sorted(facts)
    ['command', 'commit', 'seed', 'threads', 'versions']
    """
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
    """Make an absolute path below the current folder relative to it; return other text unchanged."""
    path = Path(argument)
    below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if below else argument


def _commit() -> str:
    """Return the checked-out commit, with -dirty if tracked files are modified; empty outside git."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("-dirty" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
