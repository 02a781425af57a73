"""The commands: what each does in one line, and its flags. `commands/NAME.py` executes them.

Neither this file nor what it imports needs torch, so that help and errors of usage come at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pruning.cli import argument_types, flags
from pruning.cli.arguments import FlagsOf
from pruning.cli.frontier_flags import FrontierFlags
from pruning.deploy.formats import SUFFIXES
from pruning.integrations.ultralytics.config import YoloConfig
from pruning.planning.budget import PLACES, Budget, LatencyBudget
from pruning.planning.options import MOST, SCORES
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.training.config import TrainConfig
from pruning.utils.settings import Setting


class Command(NamedTuple):
    """A command: its line in the help text, an example, and dataclasses whose settings are its flags."""

    summary: str
    example: str
    flags: tuple[FlagsOf | type, ...]


@dataclass(frozen=True)
class DoctorFlags:
    json: Annotated[
        Path | None,
        Setting("also write the report to this file, as JSON", metavar="FILE", parse=argument_types.new_file),
    ] = None


@dataclass(frozen=True)
class PruneFlags:
    score: Annotated[
        str | None,
        Setting(
            "importance of a channel",
            choices=SCORES,
            none="taylor, or with --refit reconstruction",
            group="stage 2",
        ),
    ] = None
    alike: Annotated[
        list[str],
        Setting(
            "groups that match one of these patterns get one width: '*/heads'",
            metavar="PATTERN",
            group="stage 2",
        ),
    ] = field(default_factory=list)
    refit: Annotated[
        bool,
        Setting(
            "afterwards fit the layers that lost inputs to their former outputs, by least squares on the "
            "calibration examples: without training, this keeps the most accuracy",
            group="stage 2",
        ),
    ] = False
    most: Annotated[
        float,
        Setting(
            "largest share of a group's channels that is removed",
            metavar="SHARE",
            above=0,
            most=1,
            group="stage 2",
        ),
    ] = MOST
    plan: Annotated[
        Path | None,
        Setting(
            "plan to apply in place of a budget: a JSON file that the page of `frontier` saves",
            metavar="FILE",
            parse=argument_types.existing_file,
            group="budget",
        ),
    ] = None
    output: Annotated[
        Path, Setting("checkpoint to write", metavar="FILE", parse=argument_types.new_file, group="run")
    ] = Path("small.pth")


@dataclass(frozen=True)
class FinetuneFlags:
    GROUP = "training"

    teacher: Annotated[
        Path | None,
        Setting("checkpoint of --model, for --distill", metavar="FILE", parse=argument_types.existing_file),
    ] = None
    int8: Annotated[
        bool,
        Setting("train with weights rounded to 8 bits, for export --int8, and keep the best rounded epoch"),
    ] = False
    few_shot: Annotated[
        int | None,
        Setting(
            "train on so many training examples without their labels, towards the outputs of --teacher, "
            "with BatchNorm's statistics as they are; a quarter of the examples is held out, and the epoch "
            "that is closest to the teacher on these is kept",
            metavar="N",
            least=4,
            later="setting",
        ),
    ] = None


@dataclass(frozen=True)
class SensitivityFlags:
    score: Annotated[
        str,
        Setting(
            "importance of a channel: the least important are removed first",
            choices=tuple(name for name in SCORES if name != "sensitivity"),
        ),
    ] = "taylor"
    widths: Annotated[int, Setting("number of widths to try for each group", metavar="N", least=1)] = 8
    examples: Annotated[
        int | None,
        Setting(
            "examples of the validation split to measure on, spread over it (default: all)",
            metavar="N",
            least=2,
        ),
    ] = None
    finetune_epochs: Annotated[
        int, Setting("epochs to train each point on the calibration examples", metavar="N", least=0)
    ] = 0
    runtime: Annotated[
        str,
        Setting("runtime in which layers are timed, one example at a time on one thread", choices=PLACES),
    ] = "eager"
    output: Annotated[
        Path,
        Setting(
            "folder for curves.json (from which an interrupted analysis goes on), curves.csv and the figures",
            metavar="FOLDER",
            parse=argument_types.folder,
            group="run",
        ),
    ] = Path("sensitivity")


@dataclass(frozen=True)
class TestFlags:
    against: Annotated[
        Path | None,
        Setting(
            "weights of the dense --model, to compare with",
            metavar="FILE",
            parse=argument_types.existing_file,
        ),
    ] = None
    split: Annotated[
        str | None,
        Setting(
            "split of the data to measure on (default: test, or validation where there is no test split)",
            choices=("validation", "test"),
        ),
    ] = None
    seconds: Annotated[
        float, Setting("seconds for which forward passes are timed", metavar="SECONDS", least=0.1)
    ] = 3.0
    json: Annotated[
        Path | None,
        Setting(
            "also write the figures to this file, as JSON", metavar="FILE", parse=argument_types.new_file
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    to: Annotated[str, Setting("format of the file", choices=tuple(SUFFIXES))]
    output: Annotated[
        Path | None,
        Setting(
            "file to write (default: the checkpoint's name with the format's suffix)",
            metavar="FILE",
            parse=argument_types.new_file,
        ),
    ] = None
    input: Annotated[
        list[str],
        Setting(
            "inputs of a model that takes several, by the names of its arguments, with the batch: x:2x64 "
            "ids:2x7:int64 (default: as the checkpoint or --data says)",
            metavar="NAME:SIZES[:TYPE]",
        ),
    ] = field(default_factory=list)
    dynamic: Annotated[
        list[str],
        Setting(
            "dimensions besides the batch that may have any size: x:2 x:3",
            metavar="NAME:DIM",
        ),
    ] = field(default_factory=list)
    optimize: Annotated[
        bool, Setting("rewrite an ONNX file so that ONNX Runtime runs it fastest on this machine")
    ] = False
    int8: Annotated[
        bool,
        Setting("also write an int8 file beside an ONNX one, calibrated on the training batches of --data"),
    ] = False
    int8_faster: Annotated[
        bool,
        Setting("like --int8, but refuse an int8 file that is not faster than float32 on this machine"),
    ] = False


@dataclass(frozen=True)
class DemoFlags:
    against: Annotated[
        Path | None,
        Setting(
            "weights of the dense network, to show beside it",
            metavar="FILE",
            parse=argument_types.existing_file,
        ),
    ] = None
    output: Annotated[
        Path | None,
        Setting(
            "HTML file (default: the checkpoint's name with the suffix .html)",
            metavar="FILE",
            parse=argument_types.new_file,
        ),
    ] = None
    classes: Annotated[
        list[str] | None,
        Setting(
            "names of the classes, in their order (default: as the checkpoint or data says, else numbers)",
            metavar="NAME",
        ),
    ] = None


@dataclass(frozen=True)
class ReportFlags:
    run: Annotated[Path, Setting("folder of the run", metavar="RUN", positional=True)]
    output: Annotated[
        Path | None,
        Setting(
            "HTML file (default: report.html in that folder)", metavar="FILE", parse=argument_types.new_file
        ),
    ] = None


#: The settings of pruning steps that a single step has, too.
STEP = FlagsOf(PruneConfig, without=("iterations", "recover", "layers", "score", "most"))


@dataclass(frozen=True, kw_only=True)
class YoloFlags:
    weights: Annotated[
        str,
        Setting(
            "weights of ultralytics: a .pt file, or a .yaml for random weights; names that it knows "
            "(yolov8n.pt) are downloaded",
            metavar="WEIGHTS",
            group="model",
        ),
    ]
    train_arg: Annotated[
        list[str],
        Setting(
            "further arguments of ultralytics' training: lr0=0.01 patience=20",
            metavar="KEY=VALUE",
            group="training",
        ),
    ] = field(default_factory=list)


COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "report what pruning would do to a model, without changing it",
        "--model resnet18 --input-shape 3x224x224",
        (
            flags.ModelFlags,
            flags.DataFlags,
            flags.ShapeFlags,
            flags.IgnoreFlags,
            flags.OutputFlags,
            DoctorFlags,
        ),
    ),
    "prune": Command(
        "remove channels in one step, without training",
        "--model resnet18 --input-shape 3x224x224 --score l2 --max-macs 50% --output small.pth",
        (
            flags.ModelFlags,
            flags.DataFlags,
            flags.ShapeFlags,
            *flags.BUDGET,
            STEP,
            flags.IgnoreFlags,
            flags.OutputFlags,
            flags.CalibrationFlags,
            flags.ResultFlags,
            PruneFlags,
        ),
    ),
    "frontier": Command(
        "prune to many budgets, and show what each loses before any training",
        "--model mine:Net --weights dense.pth --data pictures/ --points 12 --output frontier",
        (
            flags.ModelFlags,
            flags.DataFlags,
            FrontierFlags,
            FlagsOf(LatencyBudget, {"batch_size": 1}, without=("limit",)),
            STEP,
            flags.IgnoreFlags,
            flags.OutputFlags,
            flags.CalibrationFlags,
            FlagsOf(PruneFlags, without=("plan", "output")),
        ),
    ),
    "slim": Command(
        "train, prune and fine-tune a model under a budget",
        "--model mine:Net --weights dense.pth --data pictures/ --max-macs 40% --output runs/mine",
        (
            flags.ModelFlags,
            flags.DataFlags,
            *flags.STAGES,
            flags.OutputFlags,
            FlagsOf(flags.CalibrationFlags, {"calibration": 2048}),
            flags.RunFlags,
            flags.ResultFlags,
        ),
    ),
    "finetune": Command(
        "train a pruned network further",
        "--model mine:Net --weights small.pth --data pictures/ --epochs 20",
        (
            flags.ModelFlags,
            flags.DataFlags,
            FlagsOf(TrainConfig, {"epochs": 20, "lr": None, "weight_decay": 1e-3}),
            FlagsOf(SlimConfig, only=("distill", "temperature", "distill_features")),
            FinetuneFlags,
            flags.RunFlags,
            flags.ResultFlags,
        ),
    ),
    "sensitivity": Command(
        "narrow each group alone, and draw what accuracy is lost",
        "--model mine:Net --weights dense.pth --data pictures/",
        (flags.ModelFlags, flags.DataFlags, SensitivityFlags, flags.IgnoreFlags, flags.CalibrationFlags),
    ),
    "test": Command(
        "measure accuracy, cost and time of a network",
        "--model mine:Net --weights small.pth --against dense.pth --data pictures/",
        (flags.ModelFlags, flags.DataFlags, TestFlags),
    ),
    "export": Command(
        "write a network as ONNX, torch.export or TorchScript",
        "small.pth --model mine:Net --to onnx",
        (ExportFlags, flags.CheckpointFlags, flags.DataFlags),
    ),
    "demo": Command(
        "make one HTML page on which a network classifies drawings",
        "small.pth --model mine:Net --data pictures/",
        (DemoFlags, flags.CheckpointFlags, flags.DataFlags),
    ),
    "yolo": Command(
        "prune a YOLO of ultralytics, trained by its own trainer",
        "--weights yolov8n.pt --data data.yaml --max-macs 50% --output runs/yolo",
        (
            YoloFlags,
            YoloConfig,
            Budget,
            FlagsOf(flags.ModelFlags, only=("device", "config")),
            FlagsOf(flags.RunFlags, without=("tensorboard",)),
        ),
    ),
    "report": Command("make one HTML page that shows a run", "runs/mine", (ReportFlags,)),
}
