"""Train the reference network, LeNet-5, by the recipe of the assignment: plain SGD, rate 0.015.

    python train_lenet5.py --epoch-end 6
    python train_lenet5.py --last-checkpoint runs/LeNet5/epoch-3.pth --epoch-start 3 --epoch-end 6

After each epoch the network is saved as CHECKPOINT_DIR/epoch-N.pth, N epochs old. Training that goes on
from one of them ends where it would have ended without the stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

import data
from eval.cli import ScriptFlags, Seed, Threads, load_network, use_threads
from eval.reference import REFERENCE_EPOCHS, train_reference
from models import LeNet5
from pruning import cli, save
from pruning.checkpoint import provenance, read
from pruning.errors import CheckpointError
from pruning.training.loop import Epoch
from pruning.utils.settings import Setting
from pruning.utils.wording import number_of


@dataclass(frozen=True, kw_only=True)
class Flags(ScriptFlags):
    checkpoint_dir: Annotated[
        Path, Setting("folder for the checkpoints", metavar="FOLDER", parse=cli.folder)
    ] = Path("runs/LeNet5")
    last_checkpoint: Annotated[Path | None, Setting("network to continue from", metavar="PATH")] = None
    epoch_start: Annotated[int, Setting("epochs trained before", metavar="N", least=0)] = 0
    epoch_end: Annotated[int, Setting("epochs trained in the end", metavar="N", least=1)] = REFERENCE_EPOCHS
    seed: Seed = 0
    threads: Threads = 2
    overwrite: Annotated[bool, Setting("replace checkpoints that exist already")] = False


def main() -> None:
    args, flags = cli.parse_flags(Flags, __doc__)
    if args.epoch_end <= args.epoch_start:
        flags.error(f"--epoch-end {args.epoch_end} must be above --epoch-start {args.epoch_start}")
    if args.epoch_start and args.last_checkpoint is None:
        flags.error(f"--epoch-start {args.epoch_start} needs --last-checkpoint, the network to continue from")

    epochs = range(args.epoch_start + 1, args.epoch_end + 1)
    paths = [args.checkpoint_dir / f"epoch-{number}.pth" for number in epochs]
    there = [str(path) for path in paths if path.exists()]
    if there and not args.overwrite:
        raise CheckpointError(
            f"{', '.join(there)} would be replaced: add --overwrite, or choose another folder"
        )

    use_threads(args.threads)
    last = load_network(args.last_checkpoint, LeNet5, args.device) if args.last_checkpoint else None
    torch.manual_seed(args.seed)
    model, before = LeNet5(), args.epoch_start
    dataset = data.load(args.data, args.data_dir).to(args.device)
    if last is not None and args.last_checkpoint is not None:
        model, before = last, read(args.last_checkpoint)["provenance"].get("epochs", before)
        if before != args.epoch_start:
            print(
                f"{args.last_checkpoint} is {number_of(before, 'epoch')} old, not {args.epoch_start}: the "
                f"files are numbered from --epoch-start {args.epoch_start}, and say how old they are",
                flush=True,
            )
        for _ in range(args.epoch_start):  # draw the orders of images that are used up
            torch.randperm(len(dataset.train.labels))
    model.to(args.device)

    def save_epoch(epoch: Epoch) -> None:
        path = paths[epoch.number - 1]
        facts = provenance(
            seed=args.seed,
            dataset=dataset.name,
            epochs=before + epoch.number,
            validation_accuracy=epoch.score,
        )
        save(path, model, provenance=facts)
        print(f"{path}: train loss {epoch.train_loss:.4f}, validation accuracy {epoch.score:.4f}", flush=True)

    train_reference(model, dataset, len(epochs), args.batch_size, save_epoch)


if __name__ == "__main__":
    cli.run(main)
