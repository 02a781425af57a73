"""Weight initialization and the classifier head that several networks share."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def initialize(model: nn.Module, scale: float) -> None:
    """Initialize the weights in place, and set every BatchNorm scale γ to `scale`.

    Convolutions use He's normal initialization with the fan-in of one output: for a depthwise
    convolution these are the inputs of its own channel only.
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
    """Build the head of pre-activation networks: BatchNorm, ReLU, global average pooling, classifier."""
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(channels, classes),
        )
    )
