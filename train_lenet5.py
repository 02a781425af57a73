"""Train the reference network, LeNet-5, by the recipe of the assignment: plain SGD, rate 0.015.

    python train_lenet5.py --epoch-end 6
    python train_lenet5.py --last-checkpoint runs/LeNet5/epoch-3.pth --epoch-start 3 --epoch-end 6

After each epoch the network is saved as CHECKPOINT_DIR/epoch-N.pth, N epochs old. Training that goes on
from one of them ends where it would have ended without the stop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import data
from eval.cli import load_network, parser, use_threads
from eval.metrics import EVALUATION_BATCH
from models import LeNet5
from pruning import CheckpointError, TrainConfig, accuracy, cli, fit, provenance, save
from pruning.checkpoint import read
from pruning.training.loop import Epoch

#: Epochs and settings of the reference network.
REFERENCE_EPOCHS = 6
RECIPE = {"lr": 0.015, "momentum": 0.0, "schedule": "constant"}


def train_reference(
    model: LeNet5,
    dataset: data.Dataset,
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> LeNet5:
    """Train a LeNet-5 in place by the assignment's recipe."""

    def validate(net: torch.nn.Module) -> float:
        return accuracy(net, dataset.batches("validation", EVALUATION_BATCH))

    batches = dataset.batches("train", batch_size, shuffle=True)
    config = TrainConfig(epochs, **RECIPE)  # type: ignore[arg-type]
    fit(model, batches, config, validate=validate, on_epoch=on_epoch, label="LeNet-5")
    return model


def main() -> None:
    flags = parser(__doc__ or "", batch_size="images in a training step")
    flags.add_argument(
        "--checkpoint-dir",
        type=cli.folder,
        default=Path("runs/LeNet5"),
        metavar="FOLDER",
        help="where checkpoints go",
    )
    flags.add_argument("--last-checkpoint", type=Path, metavar="PATH", help="network to go on from")
    flags.add_argument(
        "--epoch-start", type=cli.whole_number(0), default=0, metavar="N", help="epochs trained before"
    )
    flags.add_argument(
        "--epoch-end",
        type=cli.whole_number(1),
        default=REFERENCE_EPOCHS,
        metavar="N",
        help="epochs trained in the end",
    )
    flags.add_argument("--seed", type=cli.seed, default=0, help="of the weights and the order of images")
    flags.add_argument(
        "--threads", type=cli.whole_number(1), default=2, metavar="N", help="CPU threads, at most"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace checkpoints that are there already")
    args = flags.parse_args()
    if args.epoch_end <= args.epoch_start:
        flags.error(f"--epoch-end {args.epoch_end} must be above --epoch-start {args.epoch_start}")
    if args.epoch_start and args.last_checkpoint is None:
        flags.error(f"--epoch-start {args.epoch_start} needs --last-checkpoint, the network to go on from")

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
    if last is not None:
        model, before = last, read(args.last_checkpoint)["provenance"].get("epochs", before)
        if before != args.epoch_start:
            print(
                f"{args.last_checkpoint} is {before} epochs old, not {args.epoch_start}: the files are "
                f"numbered from --epoch-start {args.epoch_start}, and say how old they are",
                flush=True,
            )
        for _ in range(args.epoch_start):  # orders of images that are used up
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
