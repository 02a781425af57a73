"""The toolkit's commands: `python -m pruning COMMAND --help`."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning import cli, flags, parallel
from pruning.checkpoint import provenance, read, replace_file, save, write_loader
from pruning.config import TrainConfig
from pruning.cost import count, time_forward
from pruning.demo import demo_checkpoint
from pruning.doctor import doctor
from pruning.errors import PruningError
from pruning.export import SUFFIXES, export
from pruning.forms import optimize
from pruning.graph import Inputs, first_examples, tensors
from pruning.grouping import trace
from pruning.mistakes import mistakes
from pruning.modes import thread_count
from pruning.norms import fold_batchnorm
from pruning.prune import NAMES as SCORES
from pruning.prune import prune
from pruning.quantization import quantize
from pruning.run import Run
from pruning.runtimes import Exported
from pruning.sensitivity import sensitivity
from pruning.slimming import reachable, slim, tune
from pruning.sources import arguments_of
from pruning.training import accuracy, to_device

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], None]]:
    """The flags of a command line over those of its --config file, and what to do with them."""
    parser = argparse.ArgumentParser(
        prog="python -m pruning", description=__doc__, formatter_class=cli.HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, (summary, add_flags, _) in COMMANDS.items():
        made[name] = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=cli.HelpFormatter,
        )
        add_flags(made[name])
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    given, rest = first.parse_known_args(argv)
    chosen = next((made[word] for word in rest if word in made), None)
    if given.config is not None and chosen is not None:
        at = next(i for i, word in enumerate(rest) if word in made) + 1
        rest = [*rest[:at], *cli.read_recipe(given.config, chosen, rest), *rest[at:]]
    args = parser.parse_args(rest)
    args.parser = made[args.command]
    return args, COMMANDS[args.command][2]


def _save(args: argparse.Namespace, path: Path, model: nn.Module, example: Inputs, **facts: Any) -> nn.Module:
    """Write a result; returns the network as it was written."""
    if args.fold:
        model = fold_batchnorm(model, trace(model, example))
    if parallel.rank():
        return model
    made = {"name": args.model, "arguments": arguments_of(args.model_arg)} if args.model else None
    save(path, model, provenance=provenance(model=made, **facts))
    if args.standalone:
        write_loader(path.parent)
    return model


def _folder(args: argparse.Namespace) -> Path:
    """The run's folder: the asked one, or the next free one."""
    if args.output is None:
        if args.resume:
            raise PruningError("--resume needs --output FOLDER: the run to go on with")
        args.output = parallel.from_first(cli.next_run())
    return args.output


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that the result depends on."""
    left_out = {
        "parser",
        "device",
        "command",
        "output",
        "resume",
        "config",
        "data_required",
        "standalone",
        "tensorboard",
        "data_dir",
    }
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in left_out
    }


def _start(args: argparse.Namespace) -> Run:
    folder = _folder(args)
    run = Run(folder, _settings(args), resume=args.resume, tensorboard=args.tensorboard)
    if run.writes:
        cli.write_recipe(folder / "config.toml", args, args.parser)
    return run


# --- commands -------------------------------------------------------------------------


def _doctor_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=False)
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PATTERN", help="layers that stay")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found here")


def _doctor(args: argparse.Namespace) -> None:
    model = flags.network(args)
    found = doctor(model, flags.examples(args, flags.data_of(args)), args.ignore)
    print(found)
    if args.json:
        replace_file(args.json, (json.dumps(found.to_json(), indent=1) + "\n").encode())


def _prune_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=False)
    flags.budget_flags(parser)
    flags.result_flags(parser)
    parser.add_argument(
        "--calibration", type=cli.whole_number(1), default=1024, metavar="N", help="examples for scores"
    )
    parser.add_argument("--output", type=Path, default=Path("small.pth"), metavar="FILE", help="checkpoint")


def _prune(args: argparse.Namespace) -> None:
    model, data = flags.network(args), flags.data_of(args)
    example = flags.examples(args, data)
    calibration = data.calibration(args.calibration) if data is not None else []
    if not calibration and args.score in ("taylor", "sensitivity"):
        raise PruningError(f"score {args.score} needs data: add --data, or --score l1, l2 or bn_scale")
    step = prune(
        model,
        example,
        flags.budget(args),
        score=args.score,
        calibration=calibration,
        ignored=args.ignore,
        ranking=args.ranking,
        floor=args.floor,
        most=args.most,
        multiple=args.multiple,
    )
    _save(args, args.output, step.model, example)
    print(f"before: {step.before}\nafter:  {step.after} (asked {step.asked})")
    if step.latency is not None:
        print(f"time:   {step.latency}; {step.latency.networks} networks were timed")
    narrowed = {g: f"{step.trace.groups[g].channels}→{w}" for g, w in step.plan.widths.items()}
    print("widths: " + ", ".join(f"{g} {w}" for g, w in narrowed.items()))
    if data is not None:
        before, after = (accuracy(m, data.validation) for m in (model, step.model))
        print(f"validation accuracy, without training: {before:.4f} before, {after:.4f} after")
    print(f"{args.output}: outputs agree with the plan to {step.difference:.1e}")


def _slim_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=True)
    flags.stage_flags(parser)
    flags.run_flags(parser)
    flags.result_flags(parser)
    parser.add_argument(
        "--calibration", type=cli.whole_number(1), default=2048, metavar="N", help="examples for scores"
    )


def _slim(args: argparse.Namespace) -> None:
    config = flags.slim_config(args)
    model, data = flags.network(args), flags.data_of(args)
    assert data is not None
    example = flags.examples(args, data)
    # What cannot be reached is refused before there is a run.
    target = None if args.resume else reachable(model, example, config.budget, args.ignore, config.prune)
    run = _start(args)
    print(f"{run.folder}: {args.model or args.weights} on {data.name}, {count(model, example)}", flush=True)
    torch.manual_seed(args.seed)
    calibration = data.calibration(args.calibration)

    def validate(network: nn.Module) -> float:
        return accuracy(network, data.validation)

    result = slim(
        model,
        data.train,
        example,
        config,
        validate=validate,
        target=target,
        calibration=calibration,
        ignored=args.ignore,
        run=run,
        log=lambda line: print(line, flush=True),
    )
    best = validate(result.model)
    path = run.folder / "best.pth"
    net = _save(
        args,
        path,
        result.model,
        example,
        seed=args.seed,
        dataset=data.name,
        epochs=result.epochs,
        validation_accuracy=best,
    )
    if run.writes:
        save(run.folder / "dense.pth", result.dense, provenance=provenance(seed=args.seed, dataset=data.name))
    if run.writes:
        with contextlib.suppress(PruningError):  # of a network that is no classifier of whole examples
            compared = mistakes(result.dense, result.model, data.validation)
            replace_file(run.folder / "mistakes.json", (json.dumps(compared) + "\n").encode())
    print(f"{path}: {count(net, example)}, validation {best:.4f}")


def _finetune_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=True)
    flags.training_flags(parser)
    parser.add_argument("--epochs", type=cli.whole_number(1), default=20, metavar="N", help="to train")
    parser.add_argument("--rate", type=cli.number(0), default=0.05, help="highest learning rate")
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="checkpoint of --model, for --distill")
    flags.run_flags(parser)
    flags.result_flags(parser)


def _finetune(args: argparse.Namespace) -> None:
    model, data = flags.network(args), flags.data_of(args)
    assert data is not None
    if bool(args.distill) != (args.teacher is not None):
        raise PruningError("a teacher and its weight go together: --teacher FILE --distill WEIGHT")
    example = flags.examples(args, data)
    teacher = None
    if args.teacher is not None:
        teacher = flags.network_with(args, args.teacher)
    run = _start(args)
    config = TrainConfig(
        args.epochs,
        lr=args.rate,
        weight_decay=args.weight_decay,
        ema=args.ema,
        channels_last=args.channels_last,
    )

    def validate(network: nn.Module) -> float:
        return accuracy(network, data.validation)

    before = validate(model)
    torch.manual_seed(args.seed)
    tuned = tune(model, data.train, config, validate=validate, run=run, teacher=teacher, distill=args.distill)
    after = validate(tuned)
    path = run.folder / "best.pth"
    net = _save(
        args,
        path,
        tuned,
        example,
        seed=args.seed,
        dataset=data.name,
        epochs=args.epochs,
        validation_accuracy=after,
    )
    print(f"{path}: {count(net, example)}, validation {after:.4f} ({before:.4f} before)")


def _sensitivity_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=True)
    parser.add_argument("--score", choices=[n for n in SCORES if n != "sensitivity"], default="taylor",
                        help="which channels of a group go first")  # fmt: skip
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PATTERN", help="layers that stay")
    parser.add_argument(
        "--widths", type=cli.whole_number(1), default=8, metavar="N", help="so many of each group"
    )
    parser.add_argument(
        "--examples", type=cli.whole_number(2), metavar="N", help="of the validation split (default: all)"
    )
    parser.add_argument(
        "--calibration", type=cli.whole_number(1), default=1024, metavar="N", help="examples for scores"
    )
    parser.add_argument(
        "--finetune-epochs", type=cli.whole_number(0), default=0, metavar="N",
        help="also train each point so long on the calibration examples",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("sensitivity"), metavar="FOLDER",
        help="receives curves.json (from which an interrupted analysis goes on), curves.csv and the pictures",
    )  # fmt: skip


def _sensitivity(args: argparse.Namespace) -> None:
    try:
        from pruning import plots
    except ImportError as error:
        raise PruningError(f"drawing needs matplotlib: pip install matplotlib ({error})") from error

    model, data = flags.network(args), flags.data_of(args)
    assert data is not None
    example = flags.examples(args, data)
    validation, seen = [], 0
    for inputs, targets in data.validation:
        room = args.examples - seen if args.examples else len(targets)
        validation.append((first_examples(inputs, room), first_examples(targets, room)))
        seen += len(validation[-1][1])
        if args.examples and seen >= args.examples:
            break
    brief = TrainConfig(args.finetune_epochs, lr=0.02) if args.finetune_epochs else None
    found = sensitivity(
        model,
        example,
        validation,
        calibration=data.calibration(args.calibration),
        widths=args.widths,
        score=args.score,
        finetune=brief,
        ignored=args.ignore,
        path=args.output / "curves.json",
    )
    replace_file(args.output / "curves.csv", found.to_csv().encode())
    plots.save(plots.sensitivity_curves(found), args.output / "curves")
    plots.save(plots.sensitivity_map(found), args.output / "map")
    plots.save(plots.lost_per_cost(found), args.output / "cost")
    print(f"dense: {found.dense_cost}, accuracy {found.dense.accuracy:.4f} on {seen} examples")
    for group, channels in found.channels.items():
        narrow = found.curve(group)[0]
        print(f"  {group}: {channels} channels; at {narrow[0]} accuracy {narrow[1].accuracy:.4f}")
    for layer, reason in found.skipped.items():
        print(f"  {layer} keeps all its channels: {reason}")
    print(f"{args.output}: curves.json, curves.csv, and the pictures curves, map and cost (PNG and SVG)")


def _test_flags(parser: argparse.ArgumentParser) -> None:
    flags.model_flags(parser)
    flags.data_flags(parser, required=True)
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="weights of the dense --model, to compare with"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of the data")
    parser.add_argument("--seconds", type=cli.number(0.1), default=3.0, help="to time the forward passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def _test(args: argparse.Namespace) -> None:
    model, data = flags.network(args), flags.data_of(args)
    assert data is not None
    batches = getattr(data, args.split)
    if batches is None:
        raise PruningError(f"data {data.name!r} has no {args.split} split; try --split validation")
    models = {"network": model.eval()}
    if args.weights is not None and (args.against is not None or args.model is not None):
        models = {"dense": flags.network_with(args, args.against).eval(), **models}
    batch = to_device(next(iter(batches)), torch.device(args.device))[0]
    size = min(args.batch_size, len(tensors(batch)[0]))
    timed = {n: first_examples(batch, n) for n in sorted({1, size})}
    times = {
        n: time_forward(models, inputs, seconds=args.seconds, threads=args.threads)
        for n, inputs in timed.items()
    }
    rows = []
    for name, each in models.items():
        cost = count(each, first_examples(batch, 1))
        trained = name == "network" or args.against is not None
        rows.append(
            {
                "network": name,
                "accuracy": accuracy(each, batches) if trained else None,
                "params": cost.params,
                "macs": cost.macs,
                **{f"ms_batch_{size}": found[name].median for size, found in times.items()},
            }
        )
    heads = list(rows[0])
    print("  ".join(f"{head:>16}" for head in heads))
    for row in rows:
        print("  ".join(f"{_shown(value):>16}" for value in row.values()))
    if args.json:
        replace_file(args.json, (json.dumps(rows, indent=1) + "\n").encode())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "-")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", choices=list(SUFFIXES), required=True, help="format of the file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: the checkpoint's name with the format's ending"
    )
    flags.checkpoint_flags(parser)
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="bring an ONNX file into the form that ONNX Runtime runs quickest on this machine",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="also write an int8 file beside an ONNX one, calibrated on the training batches of --data",
    )
    parser.add_argument(
        "--int8-faster",
        action="store_true",
        help="likewise, but refuse an int8 file that is not faster than float32 on this machine",
    )


def _export(args: argparse.Namespace) -> None:
    wanted = args.int8 or args.int8_faster
    if wanted and (args.to != "onnx" or args.data is None):
        raise PruningError("--int8 needs --to onnx and --data to calibrate on")
    if args.optimize and args.to != "onnx":
        raise PruningError("--optimize is for --to onnx")
    path: Path = args.checkpoint
    model, content = flags.network_with(args, path), read(path)
    output = args.output or path.with_suffix(SUFFIXES[args.to])
    if output.exists() and output.samefile(path):
        raise PruningError(f"--output {output} is the checkpoint itself; give another name")
    metadata = {"model": content["class"], "provenance": content["provenance"], "exported": provenance()}
    scales = flags.normalisation(args, content)
    if scales is not None:
        metadata["normalisation"] = scales
    examples = torch.zeros(2, *flags.image_shape(args, content))
    with thread_count(1):
        print(export(model, output, examples, args.to, metadata=metadata))
        if args.optimize:
            print(optimize(output, output))
    data = flags.data_of(args)
    if wanted and data is not None:
        small = output.with_suffix(".int8.onnx")
        batches = [inputs for inputs, _ in data.calibration(1024)]
        print(quantize(output, small, batches, faster=args.int8_faster))
        with thread_count(1):
            exact, rounded = (
                accuracy(Exported(path, "onnxruntime"), data.validation) for path in (output, small)
            )
        print(f"{small}: validation accuracy {rounded:.4f} (float32 {exact:.4f})")


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in that folder")


def _report(args: argparse.Namespace) -> None:
    from pruning.report import report  # matplotlib is needed for this alone

    print(report(args.run, args.output))


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="weights of the dense network, to show beside it"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: the checkpoint's name with the ending .html"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="of the classes, in their order (default: numbers)"
    )
    flags.checkpoint_flags(parser)


COMMANDS: dict[str, Command] = {
    "doctor": ("say what pruning would do to a model, before anything is done", _doctor_flags, _doctor),
    "prune": ("remove channels in one step, without training", _prune_flags, _prune),
    "slim": ("train, prune and fine-tune a model under a budget", _slim_flags, _slim),
    "finetune": ("train a pruned network further", _finetune_flags, _finetune),
    "sensitivity": ("narrow each group alone, and draw what is lost", _sensitivity_flags, _sensitivity),
    "test": ("measure accuracy, cost and time of a network", _test_flags, _test),
    "export": (
        "write a network for another runtime: ONNX, torch.export, TorchScript",
        _export_flags,
        _export,
    ),
    "demo": ("make one HTML file in which a network says what is drawn", _demo_flags, demo_checkpoint),
    "report": ("make one HTML file that shows a run", _report_flags, _report),
}
