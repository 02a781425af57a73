"""The toolkit as a command: `python -m pruning report RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruning import cli


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pruning", description=__doc__, formatter_class=cli.HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser(
        "report", help="one HTML file that shows a run", formatter_class=cli.HelpFormatter
    )
    shown.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    shown.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in that folder")
    args = parser.parse_args()
    if args.command == "report":
        from pruning.report import report  # matplotlib is needed for this alone

        print(report(args.run, args.output))


if __name__ == "__main__":
    cli.run(main)
