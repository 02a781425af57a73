"""Train a model: the training loop, losses, optimizers, distillation and fake quantization.

`distillation` is defined in the file of the same name.
"""

from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.training.batches import BatchSource
    from pruning.training.config import TrainConfig
    from pruning.training.fake_quantize import Rounding
    from pruning.training.loop import Epoch, fit
    from pruning.training.losses import accuracy, cross_entropy
    from pruning.training.optimizers import Soap
    from pruning.training.statistics import fresh_statistics

__all__ = [
    "BatchSource",
    "Epoch",
    "Rounding",
    "Soap",
    "TrainConfig",
    "accuracy",
    "cross_entropy",
    "fit",
    "fresh_statistics",
]

__getattr__ = lazy_exports(__name__, __file__)
