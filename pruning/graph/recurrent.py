"""The tensors of torch's recurrent layers that hold hidden units.

A layer has one `hidden_size`, so a hidden unit is removed from all its gates, levels and directions:

    weight_ih, weight_hh, bias_ih, bias_hh     rows, one for each gate and unit
    weight_hh                                  columns
    weight_ih of the second level and above    columns, one for each direction and unit

With a projection (`proj_size`) other code sees the projected units alone, the rows of `weight_hr`. These are
then the units that are removed, from the same columns, and the cells stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: torch's recurrent layers.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a layer is of one of torch's own recurrent types, which are followed as a whole."""
    return isinstance(layer, RECURRENT) and type(layer).__module__ == nn.RNNBase.__module__


def is_projected(layer: nn.Module) -> bool:
    """Whether a recurrent layer projects its hidden units, as `nn.LSTM` can."""
    return getattr(layer, "proj_size", 0) > 0


def gates(layer: nn.Module) -> int:
    """Return the number of rows that a unit has in each tensor of a recurrent layer: one for each gate.

    >>> gates(nn.LSTM(3, 4)), gates(nn.GRUCell(3, 4)), gates(nn.RNN(3, 4))
    (4, 3, 1)
    """
    if is_projected(layer):
        return 1
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        return 4
    return 3 if isinstance(layer, nn.GRU | nn.GRUCell) else 1


def gate_tensors(layer: nn.Module) -> list[str]:
    """Return the names of the parameters whose rows are gates of units, or projected units.

    >>> gate_tensors(nn.GRUCell(3, 4, bias=False)), gate_tensors(nn.LSTM(3, 4, proj_size=2))
    (['weight_ih', 'weight_hh'], ['weight_hr_l0'])
    """
    own = (name for name, _ in layer.named_parameters(recurse=False))
    return [name for name in own if name.startswith("weight_hr") == is_projected(layer)]


def hidden_readers(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the weights whose columns are hidden units, each with the number of columns of a unit."""
    for name, _ in layer.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            yield name, 1
        elif name.startswith("weight_ih_l") and name not in ("weight_ih_l0", "weight_ih_l0_reverse"):
            yield name, 2 if getattr(layer, "bidirectional", False) else 1


def columns(width: int, units: Tensor, times: int) -> Tensor:
    """Return the columns of some of `width` hidden units in a weight with `times` columns for each.

    >>> columns(4, torch.tensor([0, 3]), 2)
    tensor([0, 3, 4, 7])
    """
    return torch.cat([units + i * width for i in range(times)])


def narrow_hidden(layer: nn.Module, keep: Tensor) -> None:
    """Keep only the given hidden units, in place.

    >>> layer = nn.LSTM(3, 6, 2, bidirectional=True)
    >>> narrow_hidden(layer, torch.tensor([1, 4]))
    >>> layer, layer.weight_ih_l1.shape
    (LSTM(3, 2, num_layers=2, bidirectional=True), torch.Size([8, 4]))
    """
    size = "proj_size" if is_projected(layer) else "hidden_size"
    width, made, readers = getattr(layer, size), gate_tensors(layer), dict(hidden_readers(layer))
    for name, old in list(layer.named_parameters(recurse=False)):
        kept = old.detach()
        if name in made:
            kept = kept.index_select(0, columns(width, keep, gates(layer)).to(old.device))
        if name in readers:
            kept = kept.index_select(1, columns(width, keep, readers[name]).to(old.device))
        setattr(layer, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    setattr(layer, size, len(keep))
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()  # cuDNN needs the weights in one contiguous block
