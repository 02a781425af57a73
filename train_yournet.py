"""Make YourNet of LeNet-5 by Network Slimming, in three stages under a budget.

    python train_yournet.py
    python train_yournet.py --max-params 5000 --max-macs 100k --seed 1 --output runs/small
    python train_yournet.py --recipe checkpoints/compact/recipe.toml
    python train_yournet.py --resume

The run's folder receives config.json, history.jsonl, reference.pth (LeNet-5 trained by the assignment's
recipe, to compare with), state.pth (to resume from), mistakes.json and best.pth: YourNet.
"""

from __future__ import annotations

import json
import time

import torch

import data
import models
from eval.cli import COMMITTED, ROOT, use_threads
from eval.metrics import EVALUATION_BATCH
from eval.reference import reference_beside
from eval.train_flags import RECIPE, RECIPE_MNIST5K, arguments, settings
from pruning import PruningError, cli, load, save, slim, trace
from pruning.checkpoint import provenance
from pruning.cli.build import slim_config
from pruning.planning import count
from pruning.report.predictions import differing_predictions
from pruning.report.tensorboard import TensorBoardWriter
from pruning.stages import Run, feasible
from pruning.surgery import fold_batchnorm
from pruning.training import accuracy
from pruning.utils.files import replace_file


def main() -> None:
    args = arguments(description=__doc__)
    use_threads(args.threads)
    started = time.monotonic()
    dataset = data.load(args.data, args.data_dir).to(args.device)
    if dataset.name == "mnist5k" and args.recipe == RECIPE:
        args = arguments(recipe=RECIPE_MNIST5K, description=__doc__)
    config = slim_config(args)
    calibration = dataset.calibration()
    example = calibration[0][0][:8]
    torch.manual_seed(args.seed)
    dense = models.start(args.start, dataset.image_shape, dataset.classes).to(args.device)
    if args.teacher and not args.distill:
        raise PruningError("--teacher is for --distill WEIGHT: give its share of the loss, too")
    teacher = load(args.teacher, device=args.device) if args.teacher else None
    # Refuse impossible settings before creating the run folder.
    target = None if args.resume else feasible(dense, example, config, ignored=args.ignore, teacher=teacher)

    run = Run(args.output, settings(args, dataset.name, config), resume=args.resume)
    if args.tensorboard and run.writes:
        run.observe = TensorBoardWriter(run.folder / "tensorboard").add
    print(f"{args.output}: {len(dataset.train.labels):,} training images of {dataset.name}", flush=True)

    def validate(model: torch.nn.Module) -> float:
        return accuracy(model, dataset.batches("validation", EVALUATION_BATCH))

    facts = {"seed": args.seed, "dataset": dataset.name, "normalisation": dataset.normalization}
    reference_path, best_path = args.output / "reference.pth", args.output / "best.pth"
    reference = reference_beside(reference_path, args.reference, dataset, args.device, facts)
    shown = f"{count(reference, example)}, validation {validate(reference):.4f}"
    print(f"LeNet-5, the reference: {shown}", flush=True)

    # Stage 1 (config.sparsify) trains the dense network with an L1 penalty on its BatchNorm scales.
    # Stage 2 (config.prune) removes the least important channels in several steps, and trains after each.
    # Stage 3 (config.finetune) trains the small network, and keeps its best epoch on the validation images.
    torch.manual_seed(args.seed)
    augment = data.augmentation(args.augment)
    slimmed = slim(
        dense,
        dataset.batches("train", args.batch_size, shuffle=True, augment=augment),
        example,
        config,
        validate=validate,
        target=target,
        calibration=calibration,
        teacher=teacher,
        ignored=args.ignore,
        run=run,
        log=lambda line: print(line, flush=True),
    )
    net = type(dense).like(fold_batchnorm(slimmed.model, trace(slimmed.model, example)))

    reached = validate(net)
    save(best_path, net, provenance=provenance(**facts, epochs=slimmed.epochs, validation_accuracy=reached))
    compared = differing_predictions(slimmed.dense, net, dataset.batches("validation", EVALUATION_BATCH))
    replace_file(args.output / "mistakes.json", (json.dumps(compared) + "\n").encode())
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(
        f"{best_path}: {type(net).__name__} {'-'.join(map(str, net.widths))}, {count(net, example)}, "
        f"validation {reached:.4f}, in {minutes}:{seconds:02d} minutes"
    )
    if args.publish:
        replace_file(COMMITTED["YourNet"], best_path.read_bytes())
        print(f"{COMMITTED['YourNet'].relative_to(ROOT)} is now this network")


if __name__ == "__main__":
    cli.run(main, interrupted="interrupted; continue with: python train_yournet.py --resume")
