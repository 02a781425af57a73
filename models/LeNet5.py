"""LeNet-5 as the assignment defines it, with its widths as arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn


class LeNet5(nn.Module):
    """Convolutions, each followed by 2 x 2 pooling, then fully connected layers.

    The default is the reference network: conv 1-6 (3 x 3), pool, conv 6-16 (3 x 3), pool,
    fc 400-120-84-10; 60,074 params, 199,968 MACs.

    Args:
        conv: channels of each convolution; may be empty.
        hidden: units of each hidden fully connected layer; may be empty.
        batch_norm: add BatchNorm after every hidden layer, which then has no bias.
        kernel_size: kernel size of every convolution (no padding).
        image_shape: (channels, height, width) of an input image.
        classes: size of the output.

    Takes (N, *image_shape), returns logits (N, classes). Layers are named `features.conv1`,
    `features.bn1`, … and `classifier.fc1`, `classifier.bn1`, …

    Raises ValueError for a width below 1 or an image too small for the convolutions.
    """

    pool_before_activation = False
    # staticmethod: otherwise Python would bind the callable as a method and pass it the network.
    pooling: Callable[[], nn.Module] = staticmethod(partial(nn.MaxPool2d, 2))

    def __init__(
        self,
        conv: Sequence[int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
        *,
        batch_norm: bool = False,
        kernel_size: int = 3,
        image_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
    ):
        super().__init__()
        if min((*conv, *hidden, classes)) < 1:
            raise ValueError(f"widths {tuple(conv)}, {tuple(hidden)}, {classes}: each must be at least 1")
        #: The arguments that rebuild this network; checkpoints store them.
        self.config = {
            "conv": list(conv),
            "hidden": list(hidden),
            "batch_norm": batch_norm,
            "kernel_size": kernel_size,
            "image_shape": list(image_shape),
            "classes": classes,
        }
        channels, height, width = image_shape

        features: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (inputs, outputs) in enumerate(pairwise((channels, *conv)), start=1):
            features[f"conv{number}"] = nn.Conv2d(inputs, outputs, kernel_size, bias=not batch_norm)
            if batch_norm:
                features[f"bn{number}"] = nn.BatchNorm2d(outputs)
            activation = (f"relu{number}", nn.ReLU()), (f"pool{number}", self.pooling())
            features.update(reversed(activation) if self.pool_before_activation else activation)
            height, width = (height - kernel_size + 1) // 2, (width - kernel_size + 1) // 2
        if min(height, width) < 1:
            raise ValueError(f"images of {tuple(image_shape)} are too small for {len(conv)} convolutions")

        inputs = (conv[-1] if conv else channels) * height * width
        classifier: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number, (inputs_, outputs) in enumerate(pairwise((inputs, *hidden)), start=1):
            classifier[f"fc{number}"] = nn.Linear(inputs_, outputs, bias=not batch_norm)
            if batch_norm:
                classifier[f"bn{number}"] = nn.BatchNorm1d(outputs)
            classifier[f"relu{number}"] = nn.ReLU()
        classifier[f"fc{len(hidden) + 1}"] = nn.Linear(hidden[-1] if hidden else inputs, classes)

        self.features = nn.Sequential(features)
        self.classifier = nn.Sequential(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    @property
    def widths(self) -> tuple[int, ...]:
        """Current channels of each convolution, then units of each hidden layer."""
        convolutions = (m.out_channels for m in self.features if isinstance(m, nn.Conv2d))
        linears = [m.out_features for m in self.classifier if isinstance(m, nn.Linear)]
        return (*convolutions, *linears[:-1])
