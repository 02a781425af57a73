"""`python -m pruning doctor`: say what pruning would do to a model, before anything is done."""

from __future__ import annotations

import argparse
import json

from pruning.cli import arguments, build
from pruning.report.diagnose import doctor
from pruning.utils.files import replace_file

SUMMARY = "say what pruning would do to a model, before anything is done"


def add_flags(parser: argparse.ArgumentParser) -> None:
    arguments.model_flags(parser)
    arguments.data_flags(parser, required=False)
    arguments.ignore_flag(parser)
    parser.add_argument(
        "--json", type=arguments.new_file, metavar="FILE", help="also write what was found here"
    )


def execute(args: argparse.Namespace) -> None:
    model = build.network(args)
    found = doctor(model, build.examples(args, build.data_of(args)), args.ignore)
    print(found)
    if args.json:
        replace_file(args.json, (json.dumps(found.to_json(), indent=1) + "\n").encode())
