"""Make YourNet of LeNet-5 by Network Slimming, in three stages under a budget.

    python train_yournet.py
    python train_yournet.py --max-params 5000 --max-macs 100k --seed 1 --output runs/small
    python train_yournet.py --recipe checkpoints/compact/recipe.toml
    python train_yournet.py --resume

The run's folder receives config.json, history.jsonl, reference.pth (LeNet-5 trained by the
assignment's recipe, to compare with), state.pth (to resume from) and best.pth: YourNet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import data
import models
from eval.cli import COMMITTED, ROOT, load_network, parser, use_threads
from eval.metrics import EVALUATION_BATCH
from models import LeNet5
from pruning import (
    PruningError,
    Run,
    SlimConfig,
    accuracy,
    cli,
    count,
    feasible,
    fold_batchnorm,
    load,
    provenance,
    save,
    slim,
    trace,
)
from pruning.cli import arguments as shared
from pruning.cli.build import slim_config
from pruning.report.predictions import differing_predictions
from pruning.report.tensorboard import TensorBoardWriter
from pruning.utils.files import replace_file
from train_lenet5 import REFERENCE_EPOCHS, train_reference

RECIPE = ROOT / "checkpoints" / "nano" / "recipe.toml"
#: Used in its place where only the embedded digits can be had, or are asked for.
RECIPE_MNIST5K = RECIPE.with_name("mnist5k.toml")


def main() -> None:
    args = arguments()
    use_threads(args.threads)
    started = time.monotonic()
    dataset = data.load(args.data, args.data_dir).to(args.device)
    if dataset.name == "mnist5k" and args.recipe == RECIPE:
        args = arguments(recipe=RECIPE_MNIST5K)
    config = slim_config(args)
    calibration = dataset.calibration()
    example = calibration[0][0][:8]
    torch.manual_seed(args.seed)
    dense = models.start(args.start, dataset.image_shape, dataset.classes).to(args.device)
    if args.teacher and not args.distill:
        raise PruningError("--teacher is for --distill WEIGHT: give its share of the loss, too")
    teacher = load(args.teacher, device=args.device) if args.teacher else None
    # What cannot be is refused before there is a run.
    target = None if args.resume else feasible(dense, example, config, ignored=args.ignore, teacher=teacher)

    run = Run(args.output, settings(args, dataset, config), resume=args.resume)
    if args.tensorboard and run.writes:
        run.observe = TensorBoardWriter(run.folder / "tensorboard").add
    print(f"{args.output}: {len(dataset.train.labels):,} training images of {dataset.name}", flush=True)

    def validate(model: torch.nn.Module) -> float:
        return accuracy(model, dataset.batches("validation", EVALUATION_BATCH))

    facts = {
        "seed": args.seed,
        "dataset": dataset.name,
        "normalisation": {"mean": [dataset.mean], "std": [dataset.std]},
    }
    reference_path, best_path = args.output / "reference.pth", args.output / "best.pth"
    if args.reference and not reference_path.exists():
        load_network(args.reference, LeNet5, args.device)
        replace_file(reference_path, args.reference.read_bytes())
    if not reference_path.exists():
        # On a small data set it gets as many steps as six epochs of MNIST are.
        epochs = REFERENCE_EPOCHS * max(1, round(55_000 / len(dataset.train.labels)))
        untrained = LeNet5(image_shape=dataset.image_shape, classes=dataset.classes)
        trained = train_reference(untrained.to(args.device), dataset, epochs, batch_size=64)
        save(reference_path, trained, provenance=provenance(**facts, epochs=epochs))
    reference = load(reference_path, device=args.device)
    print(
        f"LeNet-5, the reference: {count(reference, example)}, validation {validate(reference):.4f}",
        flush=True,
    )

    torch.manual_seed(args.seed)
    augment = data.augmentation(args.augment)
    batches = dataset.batches("train", args.batch_size, shuffle=True, augment=augment)
    slimmed = slim(
        dense,
        batches,
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

    validation = validate(net)
    save(
        best_path,
        net,
        provenance=provenance(**facts, epochs=slimmed.epochs, validation_accuracy=validation),
    )
    compared = differing_predictions(slimmed.dense, net, dataset.batches("validation", EVALUATION_BATCH))
    replace_file(args.output / "mistakes.json", (json.dumps(compared) + "\n").encode())
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(
        f"{best_path}: {type(net).__name__} {'-'.join(map(str, net.widths))}, {count(net, example)}, "
        f"validation {validation:.4f}, in {minutes}:{seconds:02d} minutes"
    )
    if args.publish:
        replace_file(COMMITTED["YourNet"], best_path.read_bytes())
        print(f"{COMMITTED['YourNet'].relative_to(ROOT)} is now this network")


def arguments(argv: Sequence[str] | None = None, recipe: Path = RECIPE) -> argparse.Namespace:
    """The flags of the command line, or of `argv`, over those of the recipe that they name."""
    flags = parser(__doc__ or "", batch_size="images in a training step")
    flags.add_argument(
        "--recipe",
        type=Path,
        default=recipe,
        metavar="FILE",
        help="TOML file with flags of this command; those given here go before it",
    )
    flags.add_argument("--start", choices=models.STARTS, default="lenet5", help="the dense network to slim")
    shared.stage_flags(flags)
    group = flags.add_argument_group("data and teacher")
    group.add_argument(
        "--augment",
        type=cli.number(0),
        default=0.0,
        metavar="STRENGTH",
        help="1 rotates, moves and scales half of the images by up to 10 degrees, 1 pixel, 10 %%",
    )
    group.add_argument(
        "--teacher", metavar="PATH", help="checkpoint of the teacher (default: the dense network of stage 1)"
    )
    run = flags.add_argument_group("the run")
    run.add_argument("--seed", type=cli.seed, default=0, help="of weights and the order of images")
    run.add_argument(
        "--threads", type=cli.whole_number(1), default=2, metavar="N", help="CPU threads, at most"
    )
    run.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="LeNet-5 to compare with (default: one is trained in this run)",
    )
    run.add_argument(
        "--output",
        type=cli.folder,
        metavar="FOLDER",
        help="of this run alone (default: the next free runs/N)",
    )
    run.add_argument(
        "--resume", action="store_true", help="go on with the run in --output (default: the newest in runs/)"
    )
    run.add_argument("--tensorboard", action="store_true", help="also write the history for TensorBoard")
    run.add_argument(
        "--publish", action="store_true", help=f"make the result {COMMITTED['YourNet'].relative_to(ROOT)}"
    )

    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", type=Path, default=recipe)
    first.add_argument("--max-latency")
    given = first.parse_known_args(argv)[0]
    wanted = cli.read_recipe(given.recipe, flags)
    if given.max_latency is not None:  # in place of the recipe's limits on counts
        wanted = [flag for flag in wanted if not flag.startswith("--max-")]
    flags.set_defaults(**vars(flags.parse_args(["--recipe", str(given.recipe), *wanted])))
    args = flags.parse_args(argv)
    if args.resume:
        args.output = args.output or newest_run()
        flags.set_defaults(**saved_arguments(args.output))
        args = flags.parse_args(argv, argparse.Namespace(output=args.output))
    elif args.output is None:
        args.output = cli.next_run()
    return args


def newest_run() -> Path:
    configs = sorted(shared.RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise PruningError(f"{shared.RUNS}/ holds no run to resume")
    return configs[-1].parent


def settings(args: argparse.Namespace, dataset: data.Dataset, config: SlimConfig) -> dict[str, object]:
    """What config.json keeps: all that the result depends on."""
    of_this_call = {"output", "resume", "publish", "data_dir", "data", "recipe", "reference", "tensorboard"}
    flags = {key: value for key, value in vars(args).items() if key not in of_this_call}
    return {**flags, "data": dataset.name, "stages": config.to_json()}


def saved_arguments(folder: Path) -> dict[str, object]:
    """The flags that a run was started with."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        return {key: value for key, value in saved.items() if key != "stages"}
    except (OSError, ValueError) as error:
        raise PruningError(f"{folder} holds no run to resume: {error}") from error


if __name__ == "__main__":
    cli.run(main, interrupted="interrupted; go on with: python train_yournet.py --resume")
