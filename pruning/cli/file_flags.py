"""Flags of the commands that write another file of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pruning.cli import argument_types
from pruning.deploy.formats import SUFFIXES
from pruning.utils.settings import Setting


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
