"""Models of ultralytics (YOLO): prune them, and train, validate, predict with and export them as before.

`prune` changes a `YOLO` object in place, like its own methods do. What `save` writes is a file of the
library: `YOLO("pruned.pt")` predicts, validates and exports in a process that imports ultralytics alone.
Training is the library's, too, but its trainers build a model anew from a description that cannot hold pruned
widths, so start it by `train`. `slim` does all of it in iterations, in a folder from which it resumes.
"""

from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.integrations.ultralytics.calibration import calibration_batches, model_loss
    from pruning.integrations.ultralytics.config import YoloConfig
    from pruning.integrations.ultralytics.files import load, save
    from pruning.integrations.ultralytics.iterations import Slimmed, slim
    from pruning.integrations.ultralytics.steps import prune
    from pruning.integrations.ultralytics.trainer import train

__all__ = [
    "Slimmed",
    "YoloConfig",
    "calibration_batches",
    "load",
    "model_loss",
    "prune",
    "save",
    "slim",
    "train",
]

__getattr__ = lazy_exports(__name__, __file__)
