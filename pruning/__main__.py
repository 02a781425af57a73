"""The toolkit as a command: `python -m pruning report RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruning import cli
from pruning.export import add_arguments as add_export_arguments
from pruning.export import run as run_export


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
    add_export_arguments(
        commands.add_parser(
            "export", help="a checkpoint as a file for another runtime", formatter_class=cli.HelpFormatter
        )
    )
    args = parser.parse_args()
    if args.command == "report":
        from pruning.report import report  # matplotlib is needed for this alone

        print(report(args.run, args.output))
    elif args.command == "export":
        run_export(args)


if __name__ == "__main__":
    cli.run(main)
