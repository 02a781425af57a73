"""The channels-last memory format, in which torch computes most convolutions faster on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from pruning.errors import PruningError
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.tree import Inputs, fresh

#: Formats by the number of dimensions of a convolution's weight.
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@contextlib.contextmanager
def channels_last(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Hold the weights of 2-D and 3-D convolutions in the channels-last format within the block, if wanted.

    Their outputs then have this format too. Afterwards the weights have their former format.

    Raises:
        PruningError: if the model's code, run within the block, fails because of the format.

    >>> net = nn.Conv2d(3, 4, 5)
    >>> with channels_last(net):
    ...     net.weight.stride()
    (75, 1, 15, 3)
    >>> net.weight.stride()
    (75, 25, 5, 1)
    """
    every = model.parameters() if wanted else ()
    weights = [weight for weight in every if weight.ndim in _FORMATS and weight.is_contiguous()]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=_FORMATS[weight.ndim])
    try:
        yield
    except RuntimeError as error:
        if not wanted or "view size is not compatible" not in str(error):
            raise
        raise PruningError(
            "the model's code reshapes the output of a convolution by view, which fails in the channels-last "
            "format: use reshape there, or leave out channels_last (--channels-last)"
        ) from error
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


def runs_channels_last(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether a model on the CPU has convolutions, and its code runs in the channels-last format.

    Code that reshapes the output of a convolution by `view` does not.

    >>> runs_channels_last(nn.Conv2d(3, 4, 5), torch.zeros(1, 3, 8, 8))
    True
    >>> runs_channels_last(nn.Linear(3, 4), torch.zeros(1, 3))
    False
    """
    if device_of(model).type != "cpu" or not any(p.ndim in _FORMATS for p in model.parameters()):
        return False
    with channels_last(model), torch.no_grad(), eval_mode(model):
        try:
            call(model, fresh(inputs))
        except RuntimeError:
            return False
    return True
