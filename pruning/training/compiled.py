"""Train a network that torch.compile has compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from pruning.errors import PruningError


def compiled(model: nn.Module, wanted: bool) -> nn.Module:
    """Return a model compiled by torch.compile, if wanted; both have the same parameters."""
    return cast(nn.Module, torch.compile(model)) if wanted else model


@contextlib.contextmanager
def compile_errors(wanted: bool) -> Iterator[None]:
    """Report in one line that torch.compile fails on a network, within the block.

    Raises:
        PruningError: if it does.
    """
    if not wanted:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
        raise PruningError(
            f"torch.compile fails on this network ({reason}): train with compile=False (--no-compile)"
        ) from error
