"""The reference LeNet-5, the networks that slimming starts from, and networks for 32 x 32 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.CompactNet import CompactNet
from models.DenseNet import DenseNet, densenet40
from models.LeNet5 import LeNet5
from models.MobileNetV2 import MobileNetV2, mobilenet_v2
from models.PreResNet import PreResNet, resnet20, resnet56, resnet164
from models.VGG import VGG, vgg16, vgg19
from models.YourNet import YourNet

#: The dense networks that `train_yournet.py` can start from, by name. Each takes `image_shape`
#: and `classes`; all have BatchNorm, whose scales stage 1 penalizes.
STARTS: dict[str, Callable[..., YourNet | CompactNet]] = {
    "lenet5": lambda **data: YourNet(batch_norm=True, **data),
    "lenet5-wide": lambda **data: YourNet((12, 32), batch_norm=True, **data),
    "lenet5-caffe": lambda **data: YourNet((20, 50), (500,), kernel_size=5, batch_norm=True, **data),
    "mlp": lambda **data: YourNet((), (500, 300), batch_norm=True, **data),
    "compact": lambda **data: CompactNet(((8, 8), (16, 16), (16,)), batch_norm=True, **data),
    "separable": lambda **data: CompactNet(
        ((8,), (12, 12, 12, 12)), separable=True, padded=True, slope=0.2, batch_norm=True, **data
    ),
}


def start(name: str, image_shape: Sequence[int] = (1, 28, 28), classes: int = 10) -> YourNet | CompactNet:
    """Build a dense network to slim by its name in `STARTS`."""
    return STARTS[name](image_shape=image_shape, classes=classes)


__all__ = [
    "STARTS",
    "VGG",
    "CompactNet",
    "DenseNet",
    "LeNet5",
    "MobileNetV2",
    "PreResNet",
    "YourNet",
    "densenet40",
    "mobilenet_v2",
    "resnet20",
    "resnet56",
    "resnet164",
    "start",
    "vgg16",
    "vgg19",
]
