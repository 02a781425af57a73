"""The network that slimming makes of LeNet-5: narrower, and in the cheaper order."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.LeNet5 import LeNet5


class YourNet(LeNet5):
    """LeNet-5 with pooling before ReLU, which computes the same on a quarter of the values.

    Slimming starts from it at LeNet-5's widths with `batch_norm=True`. What it saves is
    the narrow network with BatchNorm folded into the layers before it.
    """

    pool_before_activation = True

    @classmethod
    def like(cls, slimmed: nn.Module) -> YourNet:
        """A YourNet built from the widths of a pruned LeNet-5, with its weights.

        `slimmed` has its BatchNorm layers either all folded or all in place. Raises TypeError
        for another kind of network.
        """
        if not isinstance(slimmed, LeNet5):
            raise TypeError(f"a {type(slimmed).__name__} cannot become a YourNet, only a LeNet5 can")
        config: dict[str, Any] = dict(slimmed.config)
        convolutions = len(config["conv"])
        batch_norm = any(".bn" in name for name in slimmed.state_dict())
        widths = {"conv": slimmed.widths[:convolutions], "hidden": slimmed.widths[convolutions:]}
        net = cls(**{**config, **widths, "batch_norm": batch_norm})
        net.load_state_dict(slimmed.state_dict())
        return net.train(slimmed.training)
