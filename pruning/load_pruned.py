"""Loads a pruned network with torch and the network's class alone.

    from load_pruned import load_pruned
    model = load_pruned("small.pth", lambda: torchvision.models.resnet18(num_classes=10))

This file stands on its own: it may be copied beside a checkpoint and used where the toolkit
is not installed. The checkpoint is one plain dict, read with `weights_only=True`: its class and
the arguments that make the dense network, the channel counts of every layer, and the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def load_pruned(
    path: Any, factory: Callable[..., nn.Module] | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The network of a checkpoint, in eval mode.

    Args:
        factory: makes the dense network when called with the stored arguments; by default
            the stored class is imported.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if factory is None:
        module, _, name = content["class"].partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"{content['class']!r} is not a class of networks; give a factory")
        factory = found
    model = factory(**content["arguments"])
    rebuild(model, content)
    return model.to(device).eval()


def rebuild(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Give a freshly made dense network the channel counts and weights of a checkpoint, in place.

    Raises AttributeError, RuntimeError or ValueError where they do not fit it.
    """
    for name in content["folded"]:  # a norm that is part of the layer before it
        _put(model, name, nn.Identity())
    for name in content.get("not_in_place", ()):
        setattr(model.get_submodule(name), "inplace", False)  # noqa: B010 - nn.Module declares none
    for name, counts in content["layers"].items():
        layer = model.get_submodule(name)
        for attribute, count in counts.items():
            if not hasattr(layer, attribute):
                raise ValueError(f"layer {name!r} is now a {type(layer).__name__} without {attribute}")
            setattr(layer, attribute, tuple(count) if isinstance(count, list) else count)
    state = content["state_dict"]
    for name, wanted in state.items():
        _make_room(model, name, wanted)
    versioned = model.state_dict()  # some classes ask for the versions that it carries
    versioned.clear()
    versioned.update(state)
    model.load_state_dict(versioned)


def _make_room(model: nn.Module, name: str, wanted: Tensor) -> None:
    """Let a parameter or buffer have a stored tensor's shape and type; folding may have added it."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    present = getattr(module, attribute, None)
    if isinstance(present, Tensor) and (present.shape, present.dtype) == (wanted.shape, wanted.dtype):
        return
    if attribute in module._parameters:
        trained = present.requires_grad if isinstance(present, Tensor) else wanted.is_floating_point()
        setattr(module, attribute, nn.Parameter(torch.empty_like(wanted), requires_grad=trained))
    elif attribute in module._buffers:
        setattr(module, attribute, torch.empty_like(wanted))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
