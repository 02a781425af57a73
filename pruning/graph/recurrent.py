"""The tensors of torch's recurrent layers that hold hidden units.

A layer has one `hidden_size`, so a hidden unit is removed from all its gates, levels and directions:

    weight_ih, weight_hh, bias_ih, bias_hh     rows, one for each gate and unit
    weight_hh                                  columns
    weight_ih of the second level and above    columns, one for each direction and unit
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


def has_hidden_channels(layer: nn.Module) -> bool:
    """Whether hidden units of a recurrent layer are its output channels; not so with a projection."""
    return is_recurrent(layer) and not getattr(layer, "proj_size", 0)


def gates(layer: nn.Module) -> int:
    """Return the number of gates of a recurrent layer.

    >>> gates(nn.LSTM(3, 4)), gates(nn.GRUCell(3, 4)), gates(nn.RNN(3, 4))
    (4, 3, 1)
    """
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        return 4
    return 3 if isinstance(layer, nn.GRU | nn.GRUCell) else 1


def gate_tensors(layer: nn.Module) -> list[str]:
    """Return the names of the parameters whose rows are gates.

    >>> gate_tensors(nn.GRUCell(3, 4, bias=False))
    ['weight_ih', 'weight_hh']
    """
    return [name for name, _ in layer.named_parameters(recurse=False) if not name.startswith("weight_hr")]


def hidden_readers(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the weights whose columns are hidden units, each with the number of columns of a unit."""
    for name in gate_tensors(layer):
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
    width = layer.hidden_size
    assert isinstance(width, int)
    readers = dict(hidden_readers(layer))
    for name in gate_tensors(layer):
        old = layer.get_parameter(name)
        kept = old.detach().index_select(0, columns(width, keep, gates(layer)).to(old.device))
        if name in readers:
            kept = kept.index_select(1, columns(width, keep, readers[name]).to(old.device))
        setattr(layer, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    layer.hidden_size = len(keep)  # type: ignore[assignment]
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()  # cuDNN needs the weights in one contiguous block
