"""Flags that belong to one command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pruning.cli import argument_types
from pruning.deploy.formats import SUFFIXES
from pruning.planning.budget import PLACES
from pruning.planning.options import MOST, SCORES
from pruning.utils.settings import Setting


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
    remove: Annotated[
        list[str],
        Setting(
            "whole layers, residual blocks or branches, or blocks of a transformer to remove first, by their "
            "names: model.layers.5; with them alone, no budget is needed",
            metavar="LAYER",
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
    cluster: Annotated[
        str | None,
        Setting(
            "measure groups on a Ray cluster: its address, or local for a worker per CPU (default: here)",
            metavar="ADDRESS",
        ),
    ] = None
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
