"""`python -m pruning doctor`: report what pruning would do to a model, without changing it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pruning.cli import arguments, build
from pruning.report.diagnose import doctor
from pruning.utils.files import replace_file
from pruning.utils.settings import Setting

SUMMARY = "report what pruning would do to a model, without changing it"


@dataclass(frozen=True)
class DoctorFlags:
    json: Annotated[
        Path | None,
        Setting("also write the report to this file, as JSON", metavar="FILE", parse=arguments.new_file),
    ] = None


FLAGS = (build.ModelFlags, build.DataFlags, build.ShapeFlags, build.IgnoreFlags, DoctorFlags)


def execute(args: argparse.Namespace) -> None:
    model = build.network(args)
    found = doctor(model, build.examples(args, model, build.data_of(args)), args.ignore)
    print(found)
    if args.json:
        replace_file(args.json, (json.dumps(found.to_json(), indent=1) + "\n").encode())
