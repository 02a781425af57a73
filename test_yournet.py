"""Measure YourNet beside the reference: accuracy, inference time, params, MACs, and the score.

python test_yournet.py
python test_yournet.py --best-checkpoint checkpoints/YourNet/best.pth --device cpu --batch-size 64
python test_yournet.py --runtime onnxruntime
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

import data
from eval.cli import COMMITTED, BestCheckpoint, TestFlags, load_network, write_json
from eval.metrics import Indicators, details, exported, measure, table
from eval.score import REFERENCE_ACCURACY, score
from models import LeNet5, YourNet
from pruning import PruningError, cli
from pruning.deploy.formats import RUNTIMES
from pruning.utils.settings import Setting


@dataclass(frozen=True, kw_only=True)
class Flags(TestFlags):
    best_checkpoint: BestCheckpoint = COMMITTED["YourNet"]
    reference: Annotated[
        Path | None,
        Setting(
            "LeNet-5 to compare with (default: reference.pth beside the checkpoint, else the committed one)",
            metavar="PATH",
        ),
    ] = None
    runtime: Annotated[
        str,
        Setting(
            "what runs the networks; all but torch run files that are exported for it first",
            choices=("torch", *RUNTIMES.values()),
        ),
    ] = "torch"


def main() -> None:
    args, _ = cli.parse_flags(Flags, __doc__)
    if args.runtime != "torch" and torch.device(args.device).type != "cpu":
        raise PruningError(f"--runtime {args.runtime} runs on the CPU, not on {args.device}")
    model = load_network(args.best_checkpoint, YourNet, args.device)
    beside = args.best_checkpoint.with_name("reference.pth")
    reference_path = args.reference or (beside if beside.exists() else COMMITTED["LeNet5"])
    reference_model = load_network(reference_path, LeNet5, args.device)
    dataset = data.load(args.data, args.data_dir).to(args.device)

    networks = {"LeNet-5": reference_model, "YourNet": model}
    reference, yours = rows = measured(networks, dataset, args)
    on_mnist = dataset.name == "mnist"
    reference_accuracy = REFERENCE_ACCURACY if on_mnist else reference.accuracy
    points = score(yours, reference, reference_accuracy)

    print(table(rows))
    print(details(rows))
    source = "the assignment's" if on_mnist else f"LeNet-5's on {dataset.name}"
    if args.runtime != "torch":
        print(f"accuracy and times are those of the exported networks in {args.runtime}")
    print(f"widths: {'-'.join(map(str, model.widths))}")
    print(
        f"score: {points.capped:.1f} of 100, uncapped {points.uncapped:.1f} "
        f"(reference accuracy {reference_accuracy:.3f}, {source})"
    )
    if points.worse:
        print(f"the score is 0 because YourNet is worse in: {', '.join(points.worse)}")
    if dataset.notice:
        print(f"NOTICE: {dataset.notice}")
    write_json(
        args.json,
        {
            **yours.to_json(),
            "runtime": args.runtime,
            "widths": list(model.widths),
            "reference": reference.to_json(),
            "reference_accuracy": reference_accuracy,
            "score": points.capped,
            "score_uncapped": points.uncapped,
            "notice": dataset.notice,
        },
    )


def measured(networks: Mapping[str, nn.Module], dataset: data.Dataset, args: Flags) -> list[Indicators]:
    """Measure both networks in the runtime of --runtime."""
    if args.runtime == "torch":
        return measure(networks, dataset, batch_size=args.batch_size, threads=args.threads)
    example = torch.zeros(2, *dataset.image_shape)
    with tempfile.TemporaryDirectory() as folder:
        runs = exported(networks, args.runtime, example, Path(folder), threads=args.threads)
        return measure(networks, dataset, batch_size=args.batch_size, threads=args.threads, runs=runs)


if __name__ == "__main__":
    cli.run(main)
