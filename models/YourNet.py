"""The network that slimming makes of LeNet-5: narrower, and in the cheaper order."""

from __future__ import annotations

from torch import nn

from models.LeNet5 import LeNet5
from models.pooling import HalvingMaxPool
from models.rebuild import rebuilt


class YourNet(LeNet5):
    """LeNet-5 with pooling before ReLU, which computes the same on a quarter of the values.

    Large batches are pooled by `models.pooling`, with the same outputs.

    Slimming starts from it at LeNet-5's widths with `batch_norm=True`. What it saves is
    the narrow network with BatchNorm folded into the layers before it.
    """

    pool_before_activation = True
    pooling = HalvingMaxPool

    @classmethod
    def like(cls, slimmed: nn.Module) -> YourNet:
        """A YourNet built from the widths of a pruned LeNet-5, with its weights.

        `slimmed` has its BatchNorm layers either all folded or all in place; hidden layers may
        have been removed. Raises TypeError for another kind of network.
        """
        if not isinstance(slimmed, LeNet5):
            raise TypeError(f"a {type(slimmed).__name__} cannot become a YourNet, only a LeNet5 can")
        convolutions = sum(isinstance(layer, nn.Conv2d) for layer in slimmed.features)
        widths = {"conv": slimmed.widths[:convolutions], "hidden": slimmed.widths[convolutions:]}
        return rebuilt(cls, slimmed, **{**slimmed.config, **widths})
