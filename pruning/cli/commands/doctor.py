"""`python -m pruning doctor`: report what pruning would do to a model, without changing it."""

from __future__ import annotations

import argparse
import json

from pruning.cli import build
from pruning.report.diagnose import doctor
from pruning.utils.files import replace_file


def execute(args: argparse.Namespace) -> None:
    model = build.network(args)
    example = build.examples(args, model, build.data_of(args))
    found = doctor(model, example, args.ignore, outputs=args.outputs or None)
    print(found)
    if args.json:
        replace_file(args.json, (json.dumps(found.to_json(), indent=1) + "\n").encode())
