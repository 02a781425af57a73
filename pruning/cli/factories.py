"""Code of the user that a command line names: modules, factories, networks.

It runs inside `users_code`, and only there is an error reported as one of the user's code.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from pruning import checkpoint
from pruning.errors import CheckpointError, PruningError
from pruning.utils.files import read_plain
from pruning.utils.modules import call, copied, device_of
from pruning.utils.tree import Inputs, fresh
from pruning.utils.wrappers import unwrapped, without_prefixes

#: What training scripts call the weights in their files; the first of these is taken.
_WEIGHTS = (
    "state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "model_ema",
    "state_dict_ema", "ema_state_dict", "params_ema", "ema",
)  # fmt: skip

#: Python, torch and this toolkit: a frame elsewhere tells where the user's code went wrong.
_LIBRARIES = tuple(
    Path(file).resolve().parent for file in (contextlib.__file__, torch.__file__, checkpoint.__file__)
)


@contextlib.contextmanager
def users_code(doing: str) -> Iterator[None]:
    """Report any error in the block, which runs code of the user alone, as an error of that code.

    Raises:
        PruningError: the code raised another error than those of this toolkit; the message is one
            line, which begins with `doing` and names the place in the user's file.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise PruningError(f"{doing}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """What went wrong in the user's code, and where, in one line."""
    if "DataLoader worker process" in str(error):  # whose message holds the traceback in the process
        lines = str(error).strip().splitlines()
        places = [line.strip() for line in lines if line.strip().startswith("File ")]
        return f"{lines[-1].strip()} ({places[-1]})" if places else lines[-1].strip()
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(folder in Path(frame.filename).resolve().parents for folder in _LIBRARIES):
            return f"{text} ({frame.filename}, line {frame.lineno}, in {frame.name})"
    return text


def factory(name: str) -> Callable[..., object]:
    """Return what a name stands for: `package.module:factory`, or one of torchvision's classifiers.

    Raises:
        PruningError: there is no such thing; the message names what is similar.
    """
    if ":" not in name:
        models = torchvision_module().models
        names = models.list_models()
        if name not in names:
            raise PruningError(
                f"model {name!r} is none of torchvision's{similar(name, names)}; your own is "
                "package.module:factory, which is called with --model-arg and returns an nn.Module"
            )
        return lambda **arguments: models.get_model(name, **arguments)
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise PruningError(f"{name!r}: expected package.module:factory, such as mine:Net")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # of the user's module
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise PruningError(f"{name!r}: module {module_name!r} cannot be imported: {kind}{error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PruningError(
                f"{name!r}: {module_name} has no {attribute!r}{similar(attribute, list(vars(found)))}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise PruningError(f"{name!r} is a {type(found).__name__}, a function or class was expected")
    return found


def make_model(name: str, arguments: Mapping[str, object], weights: str | Path | None = None) -> nn.Module:
    """Return a network by the name of its factory, with weights from a file where there is one.

    Args:
        name: `package.module:factory`, or one of torchvision's classifiers.
        arguments: keyword arguments of the factory.
        weights: a state dict, or a checkpoint of this toolkit, also of the pruned network.

    Raises:
        PruningError: the factory fails, or returns no module.
        CheckpointError: the weights do not fit.
    """
    model = made_by(name, factory(name), arguments)
    if not isinstance(model, nn.Module):
        raise PruningError(f"{name!r} gave a {type(model).__name__}, an nn.Module was expected")
    if weights is not None:
        load_weights(model, weights)
    return model


def require_runs(
    model: nn.Module, inputs: Inputs, how: str = "on the example inputs", *, training: bool = False
) -> object:
    """Run a bare model on inputs, and return its outputs.

    The model and the random numbers that follow are as without this.

    Args:
        model: a network of the user.
        inputs: what it is called with.
        how: ends the error message "NETWORK does not run HOW".
        training: run it in training mode.

    Raises:
        PruningError: the model raises an error.
    """
    device = device_of(model)
    probe = copied(model).train(training)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.set_grad_enabled(training),
        users_code(f"{type(model).__name__} does not run {how}"),
    ):
        return call(probe, fresh(inputs))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Give a model the weights of a file, in place; those of a pruned network also change its widths."""
    content = read_plain(path)
    kind = type(model).__name__
    if isinstance(content, dict) and "format" in content:
        return checkpoint.restore(path, model, checkpoint.read(path))
    while isinstance(content, dict):
        held = next((content[key] for key in _WEIGHTS if isinstance(content.get(key), dict)), None)
        if held is None:
            break
        content = held
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds no state dict: names with tensors were expected; save model.state_dict()"
        )
    model = unwrapped(model)
    try:
        model.load_state_dict(_named_as(model, content))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"{path} does not fit {kind}: {_sizes_that_differ(model, content) or ' '.join(lines[1:3])[:300]}"
        ) from error


def _named_as(model: nn.Module, content: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict without what wrappers and Lightning put into the names of weights."""
    known = model.state_dict().keys()
    if content.keys() == known:
        return content
    names = {without_prefixes(name): name for name in known}
    content = {key: tensor for key, tensor in content.items() if key != "n_averaged" or key in known}
    plain, inner = (
        {names.get(short, short): tensor for key, tensor in content.items() for short in [shorten(key)]}
        for shorten in (without_prefixes, lambda key: without_prefixes(key).removeprefix("model."))
    )
    return inner if inner.keys() == known else plain


def _sizes_that_differ(model: nn.Module, content: Mapping[str, Tensor]) -> str:
    """The first two tensors of a state dict that have other shapes in the model; empty if none has."""
    known = model.state_dict()
    wrong = [
        f"{name} has shape {tuple(tensor.shape)} in the file, {tuple(known[name].shape)} in the network"
        for name, tensor in content.items()
        if name in known and known[name].shape != tensor.shape
    ]
    return "; ".join(wrong[:2])


def made_by(name: str, make: Callable[..., object], arguments: Mapping[str, object]) -> object:
    """Return what a factory of the user's returns.

    Raises:
        PruningError: the factory fails, or takes no such argument; the message names what is similar.
    """
    taken = parameters(make)
    for key in arguments if taken else ():
        if key not in taken:
            near = similar(key, taken) or f"; it takes {', '.join(taken)}"
            raise PruningError(f"{name} takes no argument {key!r}{near}")
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    with users_code(f"{name}({given}) failed"):
        return make(**arguments)


def parameters(make: Callable[..., object]) -> list[str]:
    """Return the names of the arguments that a factory takes; none where it takes any, or does not say."""
    try:
        found = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return []
    return [] if any(p.kind is p.VAR_KEYWORD for p in found) else [p.name for p in found]


def require_finite(model: nn.Module, path: Path) -> None:
    """Check the weights that a model has from a file.

    Raises:
        CheckpointError: a parameter is NaN or infinite, or a buffer is NaN; the message names it.
    """
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            wrong = tensor.isnan() if kind == "buffer" else ~tensor.isfinite()
            if count := int(wrong.sum()):
                raise CheckpointError(
                    f"{path}: {count:,} of {tensor.numel():,} values of the {kind} {name} are not finite "
                    f"({tensor[wrong].flatten()[0].item()}); training had diverged: give weights from before"
                )


def arguments_of(texts: Iterable[str]) -> dict[str, object]:
    """Read KEY=VALUE pairs; values are Python literals, or else text."""
    found: dict[str, object] = {}
    for text in texts:
        key, given, value = text.partition("=")
        if not given or not key.isidentifier():
            raise PruningError(f"argument {text!r}: expected KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def torchvision_module() -> ModuleType:
    """Return torchvision. Raises `PruningError` where it is not installed."""
    try:
        import torchvision
    except ImportError as error:
        raise PruningError(f"torchvision is needed for this: pip install torchvision ({error})") from error
    return torchvision


def similar(name: str, names: Sequence[str]) -> str:
    """Return a hint at the names that are similar to a given one, for an error message."""
    close = difflib.get_close_matches(name, names, 3)
    return f" (did you mean {', '.join(close)}?)" if close else ""
