"""The network that results from slimming LeNet-5: narrower, and with pooling before ReLU."""

from __future__ import annotations

from torch import nn

from models.LeNet5 import LeNet5
from models.pooling import HalvingMaxPool
from models.rebuild import rebuilt


class YourNet(LeNet5):
    """LeNet-5 with pooling before ReLU: the same outputs, with ReLU on a quarter of the values.

    `models.pooling` pools large batches faster, with the same outputs.

    Slimming starts from this class at LeNet-5's widths with `batch_norm=True`, and saves the narrow
    network with BatchNorm folded into the layers before it.
    """

    pool_before_activation = True
    pooling = HalvingMaxPool

    @classmethod
    def like(cls, slimmed: nn.Module) -> YourNet:
        """Build a YourNet with the widths and weights of a pruned LeNet-5.

        The BatchNorm layers of `slimmed` must be either all folded or all in place; hidden layers
        may have been removed. Raises TypeError for another class of network.
        """
        if not isinstance(slimmed, LeNet5):
            raise TypeError(f"a {type(slimmed).__name__} cannot become a YourNet, only a LeNet5 can")
        convolutions = sum(isinstance(layer, nn.Conv2d) for layer in slimmed.features)
        widths = {"conv": slimmed.widths[:convolutions], "hidden": slimmed.widths[convolutions:]}
        return rebuilt(cls, slimmed, **{**slimmed.config, **widths})
