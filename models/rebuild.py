"""Rebuild a pruned network from its widths as an instance of a given class."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def rebuilt(make: type[Network], slimmed: nn.Module, **arguments: Any) -> Network:
    """Return `make(**arguments)` with the weights of `slimmed`, which has the same layers in the same order.

    The result has the device and dtype of these weights. Layers that pruning has replaced by
    identities are omitted.
    """
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d)
    arguments["batch_norm"] = any(isinstance(layer, batch_norm) for layer in slimmed.modules())
    net = make(**arguments).to(next(slimmed.parameters()))
    for mine, theirs in zip(_with_weights(net), _with_weights(slimmed), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return net.train(slimmed.training)


def _with_weights(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if not list(m.children()) and m.state_dict()]
