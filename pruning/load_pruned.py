"""Loads a pruned network with torch and the network's class alone.

    from load_pruned import load_pruned
    model = load_pruned("small.pth", lambda: torchvision.models.resnet18(num_classes=10))

It needs no toolkit. A checkpoint is a plain dict: class and arguments of the dense network, counts, weights.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def load_pruned(path: Any, factory: Callable[..., nn.Module] | None = None, device: Any = "cpu") -> nn.Module:
    """The network of a checkpoint, in eval mode; one that does not fit raises ValueError.

    `factory` makes the dense network, with the stored arguments if it takes them; by default the class does.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    found: Any = factory
    if factory is None:
        module, _, name = content["class"].partition(":")
        found = operator.attrgetter(name)(importlib.import_module(module))
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"{content['class']!r} is not a class of networks; give a factory")
    model = found(**(content["arguments"] if factory is None or takes(factory, content["arguments"]) else {}))
    try:
        rebuild(model, content)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model.to(device).eval()


def takes(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a factory can be called with these arguments."""
    try:
        return inspect.signature(factory).bind(**arguments) is not None
    except (TypeError, ValueError):
        return False


def rebuild(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Give a dense network the counts, where they are not more, and weights of a checkpoint, in place."""
    passed_on = 0  # what a layer received that is gone as a whole; the next one receives it now
    for name in content["folded"]:  # a norm that is part of the layer before it, or such a layer
        gone, (owner, _, attribute) = model.get_submodule(name), name.rpartition(".")
        passed_on = max(passed_on, getattr(gone, "in_channels", 0), getattr(gone, "in_features", 0))
        setattr(model.get_submodule(owner), attribute, nn.Identity())
    for name in content.get("not_in_place", ()):
        setattr(model.get_submodule(name), "inplace", False)  # noqa: B010 - nn.Module declares none
    sized = content.get("sizes", {})  # what a module's own code views or splits channels by
    for name, counts in (*content["layers"].items(), *sized.items()):
        module = model.get_submodule(name)
        for attribute, count in counts.items():
            made, before = getattr(module, attribute), passed_on if attribute[:3] == "in_" else 0
            most, given = ([n] if isinstance(n, int) else list(n) for n in (made, count))
            fits = (g == m or 0 < g <= max(m, before) for g, m in zip(given, most, strict=False))
            if len(most) != len(given) or not all(fits):
                raise ValueError(f"{name}.{attribute} is stored as {count}, the factory makes {made}")
            setattr(module, attribute, count if isinstance(made, int) else type(made)(count))
        if name in sized:
            setattr(module, "_pruned_sizes", sorted(counts))  # noqa: B010 - for the next checkpoint
    became: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
    for name, stored in content["state_dict"].items():
        if isinstance(stored, Tensor):  # and not what a module's `get_extra_state` gave
            _make_room(model, name, stored, name.rpartition(".")[0] in content["layers"], became)
    versioned = model.state_dict()  # some classes ask for the versions that it carries
    versioned.clear()
    versioned.update(content["state_dict"])
    model.load_state_dict(versioned)
    for name, stored in content.get("buffers", {}).items():  # those with persistent=False
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner).register_buffer(attribute, stored.clone(), persistent=False)


def _make_room(model: nn.Module, name: str, stored: Tensor, counted: bool, became: dict[Tensor, Any]) -> None:
    """Let a parameter or buffer have a stored shape and type; what is tied stays so where the values are."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    made: Any = {**module._buffers, **module._parameters}.get(attribute)
    shape = tuple(made.shape) if made is not None else tuple(stored.shape)
    sizes = _sizes(module, attribute) if counted else ()
    given, expected = tuple(stored.shape), sizes + shape[len(sizes) :]
    fewer = stored.ndim == len(shape) and all(map(int.__le__, stored.shape, shape))
    if given != expected and (sizes or not fewer):
        raise ValueError(f"{name} is stored as {given}, not {expected}: the factory makes {shape}")
    twins = became.setdefault(stored if made is None else made, [])
    room = next((t for s, t in twins if s.dtype == stored.dtype and torch.equal(s, stored)), None)
    if room is None:
        unchanged = not twins and made is not None and (shape, made.dtype) == (stored.shape, stored.dtype)
        room = made if unchanged else torch.empty_like(stored)
    if attribute in module._parameters and not isinstance(room, nn.Parameter):
        room = nn.Parameter(room, made.requires_grad if made is not None else stored.is_floating_point())
    if attribute in module._parameters or attribute in module._buffers:  # else `load_state_dict` refuses it
        setattr(module, attribute, room)
    twins.append((stored, room))


def _sizes(layer: Any, attribute: str) -> Any:
    """The first sizes of a layer's tensor, by its channel counts; none where they do not tell."""
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
