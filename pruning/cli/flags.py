"""Groups of flags that several commands share.

Neither this file nor what it imports needs torch, so that help and errors of usage come at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pruning.cli import argument_types
from pruning.cli.arguments import FlagsOf
from pruning.cli.preprocessing import AUGMENTATIONS
from pruning.planning.budget import Budget, LatencyBudget
from pruning.stages.config import SlimConfig
from pruning.utils.settings import Setting


@dataclass(frozen=True, kw_only=True)
class FactoryFlags:
    """The factory of a network, and the file with flags."""

    GROUP: ClassVar[str] = "model"

    model: Annotated[
        str | None,
        Setting(
            "package.module:factory, or one of torchvision's classifiers (resnet18); not needed for a "
            "checkpoint of this toolkit whose class can be imported",
            metavar="NAME",
        ),
    ] = None
    model_arg: Annotated[list[str], Setting("arguments of the factory", metavar="KEY=VALUE")] = field(
        default_factory=list
    )
    config: Annotated[
        Path | None,
        Setting(
            "TOML file with flags of this command; those on the command line take precedence", metavar="FILE"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelFlags(FactoryFlags):
    """A network, its weights and where it runs."""

    weights: Annotated[
        Path | None,
        Setting(
            "state dict, or a checkpoint of this toolkit", metavar="FILE", parse=argument_types.existing_file
        ),
    ] = None
    device: Annotated[str, Setting("cpu or cuda", metavar="DEVICE", parse=argument_types.device)] = "cpu"
    threads: Annotated[int, Setting("largest number of CPU threads", metavar="N", least=1)] = 2


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Data, and how it is read."""

    GROUP: ClassVar[str] = "data"

    data: Annotated[
        str | None,
        Setting(
            "mnist, fashion-mnist, kmnist, cifar10, cifar100; an image folder with one subfolder per class "
            "(or train, val and test, each of such); or module:factory that returns train, validation and "
            "test batches (default: the folder or named data set that the checkpoint says)",
            metavar="NAME",
        ),
    ] = None
    data_arg: Annotated[list[str], Setting("arguments of the factory", metavar="KEY=VALUE")] = field(
        default_factory=list
    )
    data_dir: Annotated[
        Path,
        Setting(
            "folder in which named data sets are, or are downloaded to; for cifar10 and cifar100 also one of "
            "pictures of 32 x 32 tiles (train-0.webp, ..., test-0.webp, ...) and labels.npz",
            metavar="FOLDER",
        ),
    ] = Path("data")
    batch_size: Annotated[int, Setting("examples per batch", metavar="N", least=1)] = 64
    image_size: Annotated[
        int | None, Setting("as --crop (default: 224, or as the checkpoint says)", metavar="PIXELS", least=1)
    ] = None
    resize: Annotated[
        int | None,
        Setting(
            "images of a folder: length of the shorter side before the crop (default: 8/7 of the crop, or as "
            "the checkpoint says)",
            metavar="PIXELS",
            least=1,
        ),
    ] = None
    crop: Annotated[
        int | None,
        Setting(
            "images of a folder: height and width of the inputs (default: 224, or as the checkpoint says)",
            metavar="PIXELS",
            least=1,
        ),
    ] = None
    augment: Annotated[
        str | None,
        Setting(
            "training images of a folder: crop (random crops of 8 to 100 % of the area, and flips), flip or "
            "none (default: crop, or as the checkpoint says)",
            choices=tuple(AUGMENTATIONS),
        ),
    ] = None
    cutout: Annotated[
        int | None,
        Setting(
            "named data sets: blank a random square of this side in each training image",
            metavar="PIXELS",
            least=1,
        ),
    ] = None
    mean: Annotated[
        list[float] | None,
        Setting(
            "what is subtracted from each channel of images (default: as the checkpoint or the named data "
            "set says, else that of ImageNet); of a factory's data, it is recorded only",
            metavar="X",
        ),
    ] = None
    std: Annotated[
        list[float] | None, Setting("what each channel of images is divided by", metavar="X", least=0)
    ] = None
    workers: Annotated[int, Setting("processes that read images of a folder", metavar="N", least=0)] = 0
    seed: Annotated[
        int, Setting("seed of weights, order and splits", metavar="SEED", least=0, most=2**63 - 1)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """The shape of the inputs where no data is given."""

    GROUP: ClassVar[str] = "data"

    input_shape: Annotated[
        str | None,
        Setting(
            "shape of one example, such as 3x224x224: traces with random examples where no data is given "
            "(default: as the checkpoint of --weights says)",
            metavar="CxHxW",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags(FactoryFlags):
    """A checkpoint that a command reads on the CPU."""

    GROUP: ClassVar[str] = "model"

    checkpoint: Annotated[
        Path,
        Setting(
            "checkpoint of a network",
            metavar="CHECKPOINT",
            positional=True,
            parse=argument_types.existing_file,
        ),
    ]
    input_shape: Annotated[
        str | None,
        Setting(
            "shape of one input, such as 3x224x224 (default: as the checkpoint says)",
            metavar="CxHxW",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class IgnoreFlags:
    """Layers that are left as they are."""

    GROUP: ClassVar[str] = "stage 2"

    ignore: Annotated[
        list[str], Setting("layers that keep all their channels: layer4.*, conv1", metavar="PATTERN")
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """The outputs that count, of a network that returns several."""

    GROUP: ClassVar[str] = "stage 2"

    outputs: Annotated[
        list[str],
        Setting(
            "outputs that count, by their keys, attributes or indices: logits, 0, features.* (default: all); "
            "others may change their size",
            metavar="NAME",
            later="setting",
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CalibrationFlags:
    """The examples that channels are scored on."""

    GROUP: ClassVar[str] = "stage 2"

    calibration: Annotated[
        int, Setting("training examples on which channels are scored", metavar="N", least=1)
    ] = 1024


@dataclass(frozen=True)
class RunFlags:
    """The folder of a run."""

    GROUP: ClassVar[str] = "run"

    output: Annotated[
        Path | None,
        Setting(
            "folder of this run alone (default: the next free runs/N)",
            metavar="FOLDER",
            parse=argument_types.folder,
        ),
    ] = None
    resume: Annotated[bool, Setting("continue the run in --output")] = False
    tensorboard: Annotated[bool, Setting("also write the history for TensorBoard")] = False


@dataclass(frozen=True)
class ResultFlags:
    """How a network is saved."""

    GROUP: ClassVar[str] = "run"

    fold: Annotated[bool, Setting("merge BatchNorm into the layers before it in the saved network")] = True
    standalone: Annotated[
        bool,
        Setting("also write load_pruned.py, which loads the checkpoint without this toolkit"),
    ] = False


#: Flags of a budget, of counts or of latency, as `budget` reads them.
BUDGET = (Budget, FlagsOf(LatencyBudget, {"limit": None, "batch_size": 1}))
#: Flags of the three stages, as `slim_config` reads them.
STAGES = (*BUDGET, SlimConfig, IgnoreFlags)
