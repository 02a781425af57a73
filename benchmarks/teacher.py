"""Train the teacher for distillation in the recipes: a wide CompactNet with augmentation.

    python -m benchmarks.teacher

Writes the epoch that is best on the validation split to checkpoints/teacher/best.pth, with
BatchNorm folded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import data
from eval.cli import ROOT, use_threads
from eval.metrics import EVALUATION_BATCH
from models import CompactNet
from pruning import cli, save, trace
from pruning.checkpoint import provenance
from pruning.surgery import fold_batchnorm
from pruning.training import TrainConfig, accuracy, fit

STAGES = ((24, 24), (48, 48), (96,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--epochs", type=cli.whole_number(1), default=20, help="epochs of training")
    parser.add_argument("--data", choices=data.NAMES, default="auto", help="data set")
    parser.add_argument("--device", type=cli.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads in training")
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="seed of the weights and the order of images"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "checkpoints" / "teacher" / "best.pth", help="the checkpoint"
    )
    args = parser.parse_args()
    use_threads(args.threads)
    dataset = data.load(args.data, ROOT / "data").to(args.device)
    torch.manual_seed(args.seed)
    net = CompactNet(STAGES, batch_norm=True, image_shape=dataset.image_shape, classes=dataset.classes).to(
        args.device
    )
    validation = dataset.batches("validation", EVALUATION_BATCH)
    augment = data.random_affine(degrees=10, pixels=2, scale=0.1)
    fit(
        net,
        dataset.batches("train", 128, shuffle=True, augment=augment),
        TrainConfig(args.epochs, lr=0.2, weight_decay=5e-4),
        validate=lambda model: accuracy(model, validation),
        keep_best=True,
        on_epoch=lambda epoch: print(
            f"epoch {epoch.number}: train loss {epoch.train_loss:.4f}, validation {epoch.score:.4f}",
            flush=True,
        ),
        label="teacher",
    )
    folded = CompactNet.like(fold_batchnorm(net, trace(net, next(iter(validation))[0][:8])))
    facts = provenance(
        seed=args.seed,
        dataset=dataset.name,
        epochs=args.epochs,
        validation_accuracy=accuracy(folded, validation),
    )
    save(args.output, folded, provenance=facts)
    print(f"{args.output}: validation {facts['validation_accuracy']:.4f}")


if __name__ == "__main__":
    cli.run(main)
