"""Torch's kernels for whole layers of attention, which compute without the code of the modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Let attention and encoder layers of torch run their own code, not kernels for whole layers.

    The kernels skip hooks, and encoders take nested tensors for them, which layers with hooks refuse.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
