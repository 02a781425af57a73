"""Settings of `slim` for models of ultralytics; this file imports no library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pruning.planning.budget import Budget
from pruning.planning.options import SCORES
from pruning.utils.settings import Setting, require_valid


@dataclass(frozen=True, kw_only=True)
class YoloConfig:
    """How a model of ultralytics is pruned and trained.

    Attributes:
        budget: limits on the result; percentages refer to the dense model.
        data: a data set of the library, such as the path of a data.yaml.
        arguments: further arguments of the library's training, such as `{"lr0": 0.01}`.

    Raises:
        PruningError: for a value out of its bounds.
    """

    budget: Budget
    data: Annotated[
        str, Setting("data set of ultralytics: the path of a data.yaml", metavar="DATA", group="data")
    ]
    imgsz: Annotated[
        int, Setting("height and width of the images", metavar="PIXELS", least=32, group="data")
    ] = 640
    batch: Annotated[int, Setting("images in a batch", metavar="N", least=1, group="training")] = 16
    dense_epochs: Annotated[
        int,
        Setting(
            "epochs before pruning: for a .yaml, and for weights of other classes", metavar="N", least=0,
            group="training",
        ),
    ] = 0  # fmt: skip
    iterations: Annotated[int, Setting("pruning steps", metavar="N", least=1, group="stage 2")] = 1
    recover_epochs: Annotated[
        int, Setting("epochs after each step but the last", metavar="N", least=0, group="training")
    ] = 5
    epochs: Annotated[int, Setting("epochs after the last step", metavar="N", least=0, group="training")] = 50
    calibration: Annotated[
        int, Setting("training images on which channels are scored", metavar="N", least=1, group="stage 2")
    ] = 64
    score: Annotated[
        str | None,
        Setting(
            "importance of a channel", choices=tuple(name for name in SCORES if name != "sensitivity"),
            none="taylor, or with --refit reconstruction", group="stage 2",
        ),
    ] = None  # fmt: skip
    refit: Annotated[
        bool,
        Setting(
            "fit the layers that lost inputs to their former outputs, by least squares on the calibration "
            "images",
            group="stage 2",
        ),
    ] = False
    seed: Annotated[
        int, Setting("seed of weights and training", metavar="SEED", least=0, group="training")
    ] = 0
    device: Annotated[str, Setting("cpu, or numbers of GPUs", flag=False)] = "cpu"
    arguments: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_valid(self)
