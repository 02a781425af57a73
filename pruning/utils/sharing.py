"""Copies of a model that hold the model's own tensors."""

from __future__ import annotations

from torch import nn

from pruning.utils.modules import copied


def sharing(model: nn.Module, buffers: bool = False) -> nn.Module:
    """Return a copy that holds the model's own parameters, for changes that replace parameters by others.

    It takes a fraction of the time of `copied`. Parameters from which others are computed are copied, as
    these are set in place.

    Args:
        buffers: whether the buffers are the model's own as well, for passes that do not change them.

    >>> layer = nn.Linear(2, 2)
    >>> sharing(layer).weight is layer.weight
    True
    """
    kept: dict[int, object] = {}
    for module in model.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        held = [*module._parameters.values(), *(module._buffers.values() if buffers else ())]
        kept.update((id(tensor), tensor) for tensor in held if tensor is not None)
    return copied(model, kept)
