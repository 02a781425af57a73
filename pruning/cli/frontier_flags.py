"""Flags of `python -m pruning frontier`. Like those of all commands, they need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pruning.cli import argument_types
from pruning.planning.budget import LABELS
from pruning.utils.settings import Setting


@dataclass(frozen=True)
class FrontierFlags:
    limit: Annotated[str, Setting("what the budgets limit", choices=(*LABELS, "latency"), group="budget")] = (
        "macs"
    )
    points: Annotated[
        int,
        Setting(
            "number of budgets, evenly spaced from the least that can be reached to the dense network's cost",
            metavar="N",
            least=2,
            group="budget",
        ),
    ] = 12
    budgets: Annotated[
        list[str],
        Setting(
            "the budgets, in place of --points: 80% 60% 40%, counts, or 0.8x 0.5x 2ms of latency",
            metavar="BUDGET",
            group="budget",
        ),
    ] = field(default_factory=list)
    timed: Annotated[
        bool, Setting("time every network beside the dense one, as --runtime says", group="latency")
    ] = False
    examples: Annotated[
        int,
        Setting(
            "most examples of the validation split to judge on, spread over it",
            metavar="N",
            least=2,
            group="data",
        ),
    ] = 1000
    compare: Annotated[
        str,
        Setting(
            "how outputs are compared with the dense network's: as logits of classes, as values, or as the "
            "targets tell",
            choices=("auto", "logits", "values"),
            group="data",
        ),
    ] = "auto"
    drop: Annotated[
        float,
        Setting(
            "name the smallest network that loses at most this much: of accuracy or agreement, or as "
            "relative error",
            metavar="SHARE",
            least=0,
            most=1,
            group="run",
        ),
    ] = 0.05
    output: Annotated[
        Path,
        Setting(
            "folder for frontier.json (from which an interrupted frontier goes on) and frontier.html",
            metavar="FOLDER",
            parse=argument_types.folder,
            group="run",
        ),
    ] = Path("frontier")
