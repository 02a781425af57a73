"""`python -m pruning test`: measure accuracy, cost and time of a network."""

from __future__ import annotations

import argparse
import json

import torch

from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.command_flags import TestFlags
from pruning.cli.factories import require_runs
from pruning.deploy.timing import time_forward
from pruning.errors import PruningError
from pruning.planning.cost import deployed_cost
from pruning.training.batches import first_batch, to_device
from pruning.training.losses import accuracy, why_not_classifier
from pruning.utils.batch import find_batch
from pruning.utils.files import replace_file


def execute(args: argparse.Namespace) -> None:
    flags = read_flags(TestFlags, args)
    model, data = build.network(args), build.required_data(args)
    batches = data.validation if flags.split == "validation" else data.test
    if batches is None and flags.split == "test":
        raise PruningError(f"data {data.name!r} has no test split; try --split validation")
    if batches is None:
        print(f"data {data.name!r} has no test split: measured on validation, by which networks are chosen")
        batches = data.validation
    models = {"network": model.eval()}
    if args.weights is not None and (flags.against is not None or args.model is not None):
        models = {"dense": build.network_with(args, flags.against).eval(), **models}
    batch = to_device(first_batch(batches), torch.device(args.device))[0]
    build.require_classes(args, require_runs(model, batch), data)
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
        cost = deployed_cost(each, found.first(batch, 1), batch_size=1)
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
