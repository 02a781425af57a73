"""`python -m pruning doctor`: say what pruning would do to a model, before anything is done."""

from __future__ import annotations

import argparse
import json

from pruning import cli, flagged, flags
from pruning.checkpoint import replace_file
from pruning.doctor import doctor

SUMMARY = "say what pruning would do to a model, before anything is done"


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=False)
    flags.ignore_flag(parser)
    parser.add_argument("--json", type=cli.new_file, metavar="FILE", help="also write what was found here")


def execute(args: argparse.Namespace) -> None:
    model = flagged.network(args)
    found = doctor(model, flagged.examples(args, flagged.data_of(args)), args.ignore)
    print(found)
    if args.json:
        replace_file(args.json, (json.dumps(found.to_json(), indent=1) + "\n").encode())
