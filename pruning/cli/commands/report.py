"""`python -m pruning report`: make one HTML file that shows a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruning.cli import arguments

SUMMARY = "make one HTML file that shows a run"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--output", type=arguments.new_file, metavar="FILE", help="default: report.html in that folder"
    )


def execute(args: argparse.Namespace) -> None:
    from pruning.report.html import report  # matplotlib is needed for this alone

    print(report(args.run, args.output))
