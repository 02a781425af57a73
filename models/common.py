"""How the networks with BatchNorm everywhere begin, and how some of them end."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def initialise(model: nn.Module, scale: float) -> None:
    """Draw the weights anew, in place, and set every BatchNorm scale γ to `scale`.

    He's normal weights, whose size follows the inputs of one output: of a depthwise
    convolution these are its own channel's alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, scale)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def average_head(channels: int, classes: int) -> nn.Sequential:
    """Of networks whose blocks end before their activation: norm, ReLU, mean over the image, classifier."""
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(channels, classes),
        )
    )
