"""`python -m pruning test`: measure accuracy, cost and time of a network."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from pruning.cli import arguments, build
from pruning.cli.arguments import read_flags
from pruning.cli.factories import require_runs
from pruning.deploy.timing import time_forward
from pruning.errors import PruningError
from pruning.planning.cost import count
from pruning.training.batches import first_batch, to_device
from pruning.training.losses import accuracy, why_not_classifier
from pruning.utils.batch import find_batch
from pruning.utils.files import replace_file
from pruning.utils.settings import Setting

SUMMARY = "measure accuracy, cost and time of a network"


@dataclass(frozen=True)
class TestFlags:
    against: Annotated[
        Path | None, Setting("weights of the dense --model, to compare with", metavar="FILE")
    ] = None
    split: Annotated[str, Setting("split of the data to measure on", choices=("validation", "test"))] = "test"
    seconds: Annotated[
        float, Setting("seconds for which forward passes are timed", metavar="SECONDS", least=0.1)
    ] = 3.0
    json: Annotated[
        Path | None,
        Setting("also write the figures to this file, as JSON", metavar="FILE", parse=arguments.new_file),
    ] = None


FLAGS = (build.ModelFlags, build.DataFlags, TestFlags)


def execute(args: argparse.Namespace) -> None:
    flags = read_flags(TestFlags, args)
    model, data = build.network(args), build.required_data(args)
    batches = data.test if flags.split == "test" else data.validation
    if batches is None:
        raise PruningError(f"data {data.name!r} has no {flags.split} split; try --split validation")
    models = {"network": model.eval()}
    if args.weights is not None and (flags.against is not None or args.model is not None):
        models = {"dense": build.network_with(args, flags.against).eval(), **models}
    batch = to_device(first_batch(batches), torch.device(args.device))[0]
    require_runs(model, batch)
    found = find_batch(model, batch)
    size = min(args.batch_size, found.size)
    timed = {n: found.first(batch, n) for n in sorted({1, size})}
    times = {
        n: time_forward(models, inputs, seconds=flags.seconds, threads=torch.get_num_threads(), batch_size=n)
        for n, inputs in timed.items()
    }
    reason = why_not_classifier(model, batches)
    rows = []
    for name, each in models.items():
        cost = count(each, found.first(batch, 1), batch_size=1)
        trained = name == "network" or flags.against is not None
        rows.append(
            {
                "network": name,
                "accuracy": accuracy(each, batches) if trained and reason is None else None,
                "params": cost.params,
                "macs": cost.macs,
                **{f"ms_batch_{size}": taken[name].median for size, taken in times.items()},
            }
        )
    heads = list(rows[0])
    print("  ".join(f"{head:>16}" for head in heads))
    for row in rows:
        print("  ".join(f"{_shown(value):>16}" for value in row.values()))
    if reason is not None:
        print(f"accuracy was not taken: {reason}")
    if flags.json:
        replace_file(flags.json, (json.dumps(rows, indent=1) + "\n").encode())


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "-")
