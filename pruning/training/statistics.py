"""Take the running statistics of BatchNorm anew for a validation, without changing the training."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from pruning.surgery.batchnorm import recalibrate
from pruning.training.batches import Batch, to_device
from pruning.utils.modules import buffers_kept, device_of
from pruning.utils.tree import fresh

#: Largest number of batches that are read to take the statistics of BatchNorm.
STATISTICS_BATCHES = 16


@contextlib.contextmanager
def fresh_statistics(
    model: nn.Module, batches: Iterable[Batch], most: int = STATISTICS_BATCHES
) -> Iterator[nn.Module]:
    """Give every BatchNorm the statistics of the present weights within the block, then restore them.

    In training, running statistics are averages over the past steps, so they are those of earlier weights:
    after few steps, or while scales become 0, a network may validate at chance that is as good as ever. A
    checkpoint to keep is copied within the block. The weights, the modes and the random generators do not
    change.

    Args:
        model: the model to validate, or the moving average of its weights.
        batches: training batches (inputs, targets): a list or a DataLoader.
        most: largest number of batches to read.

    Yields the model.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> batches = [(torch.randn(64, 3) + 5, torch.zeros(64))]
    >>> with fresh_statistics(model, batches):
    ...     bool((model[1].running_mean != 0).all())
    True
    >>> bool((model[1].running_mean == 0).all())
    True
    """
    with buffers_kept(model):
        take_statistics(model, batches, most)
        yield model


def take_statistics(model: nn.Module, batches: Iterable[Batch], most: int = STATISTICS_BATCHES) -> nn.Module:
    """Take the statistics of every BatchNorm anew, as `fresh_statistics` does, and keep them.

    Returns the model.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        device = device_of(model)
        with torch.random.fork_rng(devices=[]):  # reading batches must not change the draws of training
            few = (fresh(to_device(batch, device)[0]) for batch in itertools.islice(batches, most))
            recalibrate(model, few)
    return model
