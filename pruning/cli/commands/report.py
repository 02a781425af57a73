"""`python -m pruning report`: make one HTML page that shows a run."""

from __future__ import annotations

import argparse


def execute(args: argparse.Namespace) -> None:
    from pruning.report.html import report  # matplotlib is needed for this alone

    print(report(args.run, args.output))
