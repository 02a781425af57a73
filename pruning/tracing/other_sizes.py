"""Example inputs of other sizes: images of another height and width, sequences of another length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pruning.utils.tree import Inputs, map_tensors, tensors

#: Other sizes to try in place of one.
_RESIZED: tuple[Callable[[int], int], ...] = (
    lambda size: max(size + 1, size * 3 // 2),
    lambda size: size * 2,
    lambda size: size * 3,
    lambda size: size + 32,
    lambda size: size + 1,
    lambda size: size // 2,
)


def inputs_of_other_sizes(inputs: Inputs) -> Iterator[Inputs]:
    """Yield inputs in which other dimensions than those of the batch and the channels have other sizes.

    Elements are repeated, so that tokens stay valid. Of images (N, C, H, W), height and width change; of
    sequences, the dimension after the batch, or else the last one. A model need not take such inputs.

    >>> [tuple(x.shape) for x in inputs_of_other_sizes(torch.zeros(1, 3, 32, 48))][:2]
    [(1, 3, 48, 72), (1, 3, 64, 96)]
    """
    held = tensors(inputs)
    images = [x for x in held if x.ndim > 3]
    if images:
        choices = [{size for x in images for size in x.shape[2:]}]
    else:
        choices = [{x.shape[d] for x in held if x.ndim > 1} for d in (1, -1)]
        choices = choices[: 1 + any(x.ndim == 3 for x in held)]
    for sizes in choices if held else ():
        for resized in _RESIZED:
            new = {size: resized(size) for size in sizes}
            if all(new.values()):
                yield map_tensors(partial(_resized, new=new), inputs)


def _resized(tensor: Tensor, new: dict[int, int]) -> Tensor:
    """Return a tensor with other sizes, by size, along the dimensions after the batch (and the channels)."""
    for dim in range(2 if tensor.ndim > 3 else 1, tensor.ndim):
        size = tensor.shape[dim]
        if size in new:
            places = torch.arange(new[size], device=tensor.device) % size
            tensor = tensor.index_select(dim, places)
    return tensor
