"""Load a pruned network with torch and the network's class alone.

    from load_pruned import load_pruned
    model = load_pruned("small.pth", lambda: torchvision.models.resnet18(num_classes=10))

This file needs no toolkit. A checkpoint is a plain dict: class and arguments of the dense network,
channel counts, weights.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def load_pruned(
    path: str | os.PathLike[str],
    factory: Callable[..., nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load the network of a checkpoint, in eval mode.

    Args:
        path: of a file that `pruning.save` wrote.
        factory: makes the dense network, with the stored arguments if it takes them; by default the
            stored class.
        device: of the network.

    Raises:
        ValueError: where the checkpoint does not fit the network.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if factory is None:
        model = _stored_class(content["class"])(**content["arguments"])
    else:
        model = factory(**(content["arguments"] if takes(factory, content["arguments"]) else {}))
    try:
        rebuild(model, content)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model.to(device).eval()


def _stored_class(name: str) -> type[nn.Module]:
    """Import a class by its name, `module:Class`."""
    module, _, attribute = name.partition(":")
    found: object = operator.attrgetter(attribute)(importlib.import_module(module))
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name!r} is not a class of networks; give a factory")
    return found


def takes(factory: Callable[..., object], arguments: Mapping[str, object]) -> bool:
    """Tell whether a factory can be called with these keyword arguments."""
    try:
        return inspect.signature(factory).bind(**arguments) is not None
    except (TypeError, ValueError):
        return False


def rebuild(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Give a dense network the channel counts and weights of a checkpoint, in place.

    Counts must not be larger than the dense network's; an input may be, where the layer before is gone.

    Raises:
        AttributeError, KeyError, RuntimeError, TypeError, ValueError: where they do not fit.
    """
    passed_on = _replace_by_identities(model, content["folded"])
    for name in content.get("not_in_place", ()):
        setattr(model.get_submodule(name), "inplace", False)  # noqa: B010 - nn.Module declares none
    sized = content.get("sizes", {})  # sizes that a module's own code views or splits channels by
    for name, counts in (*content["layers"].items(), *sized.items()):
        _set_counts(model.get_submodule(name), name, counts, passed_on)
        if name in sized:
            setattr(model.get_submodule(name), "_pruned_sizes", sorted(counts))  # noqa: B010 - for `save`
    replaced: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
    for name, stored in content["state_dict"].items():
        if isinstance(stored, Tensor):  # a module's `get_extra_state` may give other objects
            _resize(model, name, stored, name.rpartition(".")[0] in content["layers"], replaced)
    versioned = model.state_dict()  # carries version numbers that some classes ask for
    versioned.clear()
    versioned.update(content["state_dict"])
    model.load_state_dict(versioned)
    for name, stored in content.get("buffers", {}).items():  # those with persistent=False
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner).register_buffer(attribute, stored.clone(), persistent=False)


def _replace_by_identities(model: nn.Module, names: Iterable[str]) -> int:
    """Replace folded norms and removed layers; return the largest number of inputs of a removed layer.

    The layer behind a removed one receives these inputs instead of its own.
    """
    inputs = 0
    for name in names:
        removed, (owner, _, attribute) = model.get_submodule(name), name.rpartition(".")
        inputs = max(inputs, getattr(removed, "in_channels", 0), getattr(removed, "in_features", 0))
        setattr(model.get_submodule(owner), attribute, nn.Identity())
    return inputs


def _set_counts(module: nn.Module, name: str, counts: Mapping[str, int | list[int]], passed_on: int) -> None:
    """Set a module's channel counts; inputs may be up to `passed_on`, other counts not grow."""
    for attribute, count in counts.items():
        made, limit = getattr(module, attribute), passed_on if attribute[:3] == "in_" else 0
        dense, given = ([n] if isinstance(n, int) else list(n) for n in (made, count))
        fits = (g == m or 0 < g <= max(m, limit) for g, m in zip(given, dense, strict=False))
        if len(dense) != len(given) or not all(fits):
            raise ValueError(f"{name}.{attribute} is stored as {count}, the factory makes {made}")
        setattr(module, attribute, count if isinstance(made, int) else type(made)(count))


def _resize(
    model: nn.Module,
    name: str,
    stored: Tensor,
    in_layer: bool,
    replaced: dict[Tensor, list[tuple[Tensor, Tensor]]],
) -> None:
    """Give a parameter or buffer the shape and type of a stored tensor.

    Tensors that are tied in the dense network stay tied where the stored values are equal.

    Args:
        in_layer: whether the tensor belongs to a layer whose channel counts are stored.
        replaced: by the dense network's tensor, the stored tensors and those that replace it.
    """
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    made = {**module._buffers, **module._parameters}.get(attribute)
    shape = tuple(made.shape) if made is not None else tuple(stored.shape)
    sizes = _sizes(module, attribute) if in_layer else ()
    given, expected = tuple(stored.shape), sizes + shape[len(sizes) :]
    fewer = stored.ndim == len(shape) and all(map(int.__le__, stored.shape, shape))
    if given != expected and (sizes or not fewer):
        raise ValueError(f"{name} is stored as {given}, not {expected}: the factory makes {shape}")
    twins = replaced.setdefault(stored if made is None else made, [])
    tensor = next((t for s, t in twins if s.dtype == stored.dtype and torch.equal(s, stored)), None)
    if tensor is None:
        unchanged = not twins and made is not None and (shape, made.dtype) == (stored.shape, stored.dtype)
        tensor = made if unchanged and made is not None else torch.empty_like(stored)
    if attribute in module._parameters and not isinstance(tensor, nn.Parameter):
        trained = made.requires_grad if made is not None else stored.is_floating_point()
        tensor = nn.Parameter(tensor, trained)
    if attribute in module._parameters or attribute in module._buffers:  # else `load_state_dict` refuses it
        setattr(module, attribute, tensor)
    twins.append((stored, tensor))


def _sizes(layer: Any, attribute: str) -> tuple[int, ...]:
    """Return the first sizes of a layer's tensor that its channel counts determine; () where none."""
    if attribute in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
        return (len(getattr(layer, attribute)), layer.input_size)
    if attribute not in ("weight", "bias", "running_mean", "running_var"):
        return ()
    if hasattr(layer, "num_embeddings") or hasattr(layer, "normalized_shape"):
        return getattr(layer, "normalized_shape", None) or (layer.num_embeddings, layer.embedding_dim)
    counts = ("out_channels", "out_features", "num_features", "num_channels", "num_parameters")
    out = next(getattr(layer, count) for count in counts if hasattr(layer, count))
    into = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
    if attribute == "weight" and getattr(layer, "transposed", False):
        out, into = into, out
    return (out, into // getattr(layer, "groups", 1)) if attribute == "weight" and into else (out,)
