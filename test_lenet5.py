"""Measure the reference network, LeNet-5: accuracy, inference time, params and MACs.

python test_lenet5.py
python test_lenet5.py --best-checkpoint checkpoints/LeNet5/epoch-6.pth --device cpu --batch-size 64
"""

from __future__ import annotations

from dataclasses import dataclass

import data
from eval.cli import COMMITTED, BestCheckpoint, TestFlags, load_network, write_json
from eval.metrics import details, measure, table
from models import LeNet5
from pruning import cli


@dataclass(frozen=True, kw_only=True)
class Flags(TestFlags):
    best_checkpoint: BestCheckpoint = COMMITTED["LeNet5"]


def main() -> None:
    args, _ = cli.parse_flags(Flags, __doc__)
    model = load_network(args.best_checkpoint, LeNet5, args.device)
    dataset = data.load(args.data, args.data_dir).to(args.device)

    rows = measure({"LeNet-5": model}, dataset, batch_size=args.batch_size, threads=args.threads)
    print(table(rows))
    print(details(rows))
    if dataset.notice:
        print(f"NOTICE: {dataset.notice}")
    write_json(args.json, {**rows[0].to_json(), "notice": dataset.notice})


if __name__ == "__main__":
    cli.run(main)
