"""Weights that a layer computes from other parameters: parametrizations, and torch's older hooks.

Such a weight is narrowed by computing it, narrowing the result, and choosing parameters that give it. For
weight norm (Salimans and Kingma, arXiv 1602.07868), w = g v / ‖v‖, these are v = w and g = ‖w‖. Spectral norm
is a module of its own (`pruning.graph.spectral`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pruning.graph.spectral import has_spectral_hook, spectral_norm


def _weight_norm(layer: nn.Module, name: str) -> WeightNorm | None:
    """Return the hook of `torch.nn.utils.weight_norm` that computes a tensor of a layer."""
    hooks = (hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm))
    return next((hook for hook in hooks if hook.name == name), None)


def is_computed(layer: nn.Module, name: str) -> bool:
    """Whether a layer computes one of its tensors in a way that can be inverted or tried.

    >>> is_computed(nn.Linear(3, 4), "weight")
    False
    """
    hooked = _weight_norm(layer, name) is not None or has_spectral_hook(layer, name)
    return hooked or parametrize.is_parametrized(layer, name)


def sources(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the parameters, by their names within the layer, from which it computes a tensor."""
    if parametrize.is_parametrized(layer, name):
        prefix = f"parametrizations.{name}."
    elif is_computed(layer, name):
        prefix = f"{name}_"
    else:
        return {}
    return {key: value for key, value in layer.named_parameters() if key.startswith(prefix)}


def computed_value(layer: nn.Module, name: str) -> Tensor:
    """Return a tensor that a layer computes, from the parameters that it has now.

    The older weight norm computes the weight in each forward pass; until then the attribute holds that of
    the pass before, for example of before the parameters were loaded.

    >>> layer = nn.utils.weight_norm(nn.Linear(3, 4))
    >>> _ = layer.weight_g.data.mul_(2)
    >>> torch.allclose(layer.weight, layer.weight_v)
    True
    >>> torch.allclose(computed_value(layer, "weight"), 2 * layer.weight_v)
    True
    """
    if (spectral := spectral_norm(layer, name)) is not None:
        return spectral.weight()
    hook = _weight_norm(layer, name)
    value = getattr(layer, name) if hook is None else hook.compute_weight(layer)
    assert isinstance(value, Tensor)
    return value.detach()


def refresh_computed(model: nn.Module) -> None:
    """Set the weights that layers compute by torch's older hooks, as the next pass in eval mode would."""
    for layer in model.modules():
        for hook in [*layer._forward_pre_hooks.values()]:
            if isinstance(hook, WeightNorm | SpectralNorm):
                setattr(layer, hook.name, computed_value(layer, hook.name))


def set_computed(layer: nn.Module, name: str, value: Tensor) -> None:
    """Let a layer compute this tensor, of any shape, in place.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    >>> narrower = layer.weight.detach()[:2]
    >>> set_computed(layer, "weight", narrower)
    >>> torch.allclose(layer.weight, narrower)
    True
    """
    if (spectral := spectral_norm(layer, name)) is not None:
        spectral.set_weight(value)
        return
    hook = _weight_norm(layer, name)
    if hook is None:
        setattr(layer, name, value)
        return
    norm = torch.norm_except_dim(value, 2, hook.dim)
    for suffix, tensor in {"_g": norm, "_v": torch.where(norm == 0, 1.0, value)}.items():
        old = layer.get_parameter(name + suffix)
        setattr(layer, name + suffix, nn.Parameter(tensor, requires_grad=old.requires_grad))
    setattr(layer, name, value)


def can_be_narrowed(layer: nn.Module, names: list[str]) -> bool:
    """Whether a layer can compute the given ones of its tensors without a slice along each dimension."""
    for name in filter(lambda name: is_computed(layer, name), names):
        if _weight_norm(layer, name) is not None or spectral_norm(layer, name) is not None:
            continue  # these are exact
        trial = copy.deepcopy(layer).eval()
        try:
            with torch.no_grad():
                value = getattr(trial, name).detach().clone()
                for dim, size in enumerate(value.shape):
                    value = value.narrow(dim, 0, max(1, size - 1))
                value = value.contiguous()
                set_computed(trial, name, value)
                again = getattr(trial, name)
            exact = again.shape == value.shape and torch.allclose(again, value, rtol=1e-4, atol=1e-6)
        except Exception:  # of a parametrization without an inverse, whatever it raises
            exact = False
        if not exact:
            return False
    return True
