"""`python -m pruning report`: make one HTML page that shows a run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pruning.cli import arguments
from pruning.utils.settings import Setting

SUMMARY = "make one HTML page that shows a run"


@dataclass(frozen=True)
class ReportFlags:
    run: Annotated[Path, Setting("folder of the run", metavar="RUN", positional=True)]
    output: Annotated[
        Path | None,
        Setting("HTML file (default: report.html in that folder)", metavar="FILE", parse=arguments.new_file),
    ] = None


FLAGS = (ReportFlags,)


def execute(args: argparse.Namespace) -> None:
    from pruning.report.html import report  # matplotlib is needed for this alone

    print(report(args.run, args.output))
