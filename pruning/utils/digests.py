"""Digests of models and data, by which stored results are recognized."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pruning.utils.tree import tensors


def add_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Add the values of a tensor to a digest."""
    digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())


def add_state(digest: hashlib._Hash, state: Mapping[str, Tensor]) -> None:
    """Add the names and the values of a state dict to a digest."""
    for name, tensor in state.items():
        digest.update(name.encode())
        add_tensor(digest, tensor)


def digest_of(batches: Iterable[object]) -> str:
    """Return a digest of the shapes, types and values of all tensors in nested batches.

    >>> digest_of([torch.zeros(2)]) == digest_of([torch.zeros(2)]) != digest_of([torch.zeros(1, 2)])
    True
    """
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in tensors(batch):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            add_tensor(digest, tensor)
    return digest.hexdigest()
