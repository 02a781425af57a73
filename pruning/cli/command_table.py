"""The commands: what each does in one line, and its flags. `commands/NAME.py` executes them.

Neither this file nor what it imports needs torch, so that help and errors of usage come at once.
"""

from __future__ import annotations

from typing import NamedTuple

from pruning.cli import flags
from pruning.cli.arguments import FlagsOf
from pruning.cli.command_flags import (
    DemoFlags,
    DoctorFlags,
    ExportFlags,
    FinetuneFlags,
    PruneFlags,
    ReportFlags,
    SensitivityFlags,
    TestFlags,
    YoloFlags,
)
from pruning.cli.frontier_flags import FrontierFlags
from pruning.integrations.ultralytics.config import YoloConfig
from pruning.planning.budget import Budget, LatencyBudget
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.training.config import TrainConfig


class Command(NamedTuple):
    """A command: its line in the help text, an example, and dataclasses whose settings are its flags."""

    summary: str
    example: str
    flags: tuple[FlagsOf | type, ...]


#: The settings of pruning steps that a single step has, too.
STEP = FlagsOf(PruneConfig, without=("iterations", "recover", "layers", "score", "most"))


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
