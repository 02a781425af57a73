"""Time pruned networks in several runtimes, and compare them with the dense ones.

    python -m benchmarks.runtimes                       # on the embedded digits
    MNIST_DIR=... python -m benchmarks.runtimes --data mnist
    python -m benchmarks.runtimes --device cuda

Networks: LeNet-5 (the reference), the dense network from which train_yournet.py starts (LeNet-5 with
BatchNorm, unfolded and folded), YourNet, and as a lower bound LeNet-5 with a single channel in each
hidden layer. Runtimes:

- eager: PyTorch without compilation;
- torchscript: a frozen trace;
- compiled: PyTorch's ahead-of-time compiler, for each batch size; needs a C++ compiler;
- onnxruntime float32: the exported file;
- onnxruntime optimized: its fastest variant on this machine (`pruning.deploy.optimize`);
- onnxruntime int8: the optimized file quantized, calibrated on training images.

All networks are timed in turns on the same batch, about 2 ms at a time in random order, after a
warm-up. Times of exported files are those of the runtime, without conversions from and to tensors.
The tables give the median and the 90th percentile of the turns, and ratios of medians with their 95 %
bootstrap interval (`pruning.deploy.time_ratio`). In each runtime a second copy of YourNet is timed too;
its ratio to the first is the control. Where the control is not within 0.02 of 1, other load disturbed
the measurement: its rows are marked, and the command reports it.

Then torchvision's networks (random weights, batch 1, BatchNorm folded) are compared with the same
networks pruned to 50 % of the MACs with channels in multiples of --multiple, which shows how much of
the reduction in MACs becomes speed.

On a GPU only eager and compiled networks are timed, because exported files run on the CPU. Writes
benchmarks/runtimes.json and benchmarks/runtimes.md, and prints the latter.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import models
from benchmarks import results, timing
from eval.cli import COMMITTED, ROOT
from eval.metrics import EVALUATION_BATCH
from pruning import Budget, cli, export, load, prune, trace
from pruning.checkpoint import provenance
from pruning.deploy import Exported, Latency, optimize, time_forward
from pruning.deploy.quantize import quantize
from pruning.deploy.runtimes import first_line
from pruning.errors import ExportError
from pruning.planning import count
from pruning.planning.options import RANKINGS
from pruning.surgery import fold_batchnorm, recalibrate
from pruning.training import accuracy

REFERENCE, TRAINED, FOLDED, YOURS = "LeNet-5", "dense with BN", "dense, BN folded", "YourNet"
#: LeNet-5 with a single channel in each hidden layer: a lower bound on the time.
FLOOR = "one channel a layer"
#: Name of the second copy of a network, the control.
AGAIN = "again"
EAGER, SCRIPT, COMPILED = "eager", "torchscript", "compiled"
FLOAT, QUICK, INT8 = (f"onnxruntime {form}" for form in ("float32", "optimized", "int8"))
RUNTIMES = (EAGER, SCRIPT, COMPILED, FLOAT, QUICK, INT8)
FILES = (SCRIPT, FLOAT, QUICK, INT8)
TORCHVISION = ("resnet18", "mobilenet_v2", "vgg11_bn", "densenet121")
#: (runtime, network)
Key = tuple[str, str]


def main() -> None:
    args = arguments()
    if args.pin:
        timing.pin(args.threads)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "device": args.device,
        "threads": args.threads,
        "pinned": args.pin,
        "machine": timing.machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        result.update(digits(args, Path(folder)))
        result["torchvision"] = [row for name in args.models for row in halved(name, args, Path(folder))]
    result["provenance"] = provenance()
    results.write(args.output, result, markdown(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--data", choices=data.NAMES, default="mnist5k", help="data set")
    parser.add_argument("--device", type=cli.device, default="cpu", metavar="DEVICE", help="cpu or cuda")
    parser.add_argument(
        "--yournet", type=Path, default=COMMITTED["YourNet"], metavar="PATH", help="checkpoint of YourNet"
    )
    parser.add_argument(
        "--dense",
        type=Path,
        metavar="PATH",
        help="checkpoint of the dense network with BatchNorm (default: untrained)",
    )
    parser.add_argument(
        "--runtimes",
        choices=RUNTIMES,
        nargs="+",
        default=RUNTIMES,
        metavar="NAME",
        help="runtimes besides eager",
    )
    parser.add_argument(
        "--batch-sizes",
        type=cli.whole_number(1),
        nargs="+",
        default=[1, 64],
        metavar="IMAGES",
        help="batch sizes to time",
    )
    parser.add_argument(
        "--calibration",
        type=cli.whole_number(2),
        default=1000,
        metavar="IMAGES",
        help="calibration images for int8",
    )
    group = parser.add_argument_group("torchvision's networks")
    group.add_argument(
        "--models", nargs="*", default=TORCHVISION, metavar="NAME", help="networks; no name: skip this part"
    )
    group.add_argument(
        "--image-size",
        type=cli.whole_number(32),
        default=224,
        metavar="PIXELS",
        help="height and width of the images",
    )
    group.add_argument(
        "--multiple", type=cli.whole_number(1), default=16, metavar="N", help="channels are multiples of N"
    )
    group.add_argument(
        "--ranking", choices=RANKINGS, default="group", help="rank channels by group, or over all layers"
    )
    group = parser.add_argument_group("measurement")
    group.add_argument("--seconds", type=cli.number(0.01), default=30.0, help="duration of each measurement")
    group.add_argument("--warmup", type=cli.number(0), default=3.0, help="seconds of warm-up before each")
    group.add_argument("--threads", type=cli.whole_number(1), default=1, metavar="N", help="CPU threads")
    group.add_argument(
        "--pin", action="store_true", help="pin the process to --threads cores, if the system can"
    )
    group.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "runtimes.json", help="results, as JSON and .md"
    )
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type != "cpu"
    wanted = {EAGER, *args.runtimes} - (set(FILES) if on_gpu else set())
    args.runtimes = [name for name in RUNTIMES if name in wanted]
    return args


def timed(running: Mapping[Key, nn.Module], batch: Tensor, args: argparse.Namespace) -> dict[Key, Latency]:
    """Time networks in their runtimes, in turns."""
    by_name = {"|".join(key): model for key, model in running.items()}
    found = time_forward(by_name, batch, seconds=args.seconds, warmup=args.warmup, threads=args.threads)
    return dict(zip(running, found.values(), strict=True))


def digits(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the networks for digits in every runtime: accuracy, file sizes and times."""
    dataset = data.load(args.data, ROOT / "data").to(args.device)
    batches = itertools.islice(dataset.batches("train", 100), -(-args.calibration // 100))
    calibration = list(torch.cat([images.cpu() for images, _ in batches])[: args.calibration].split(100))
    networks = digit_networks(args, calibration)
    left_out: dict[str, str] = {}

    running: dict[Key, nn.Module] = {(EAGER, name): net for name, net in networks.items()}
    running[EAGER, AGAIN] = copy.deepcopy(networks[YOURS])
    files: dict[Key, Path] = {(EAGER, REFERENCE): COMMITTED["LeNet5"], (EAGER, YOURS): args.yournet}
    for runtime in [name for name in args.runtimes if name in FILES]:
        try:
            made = {
                (runtime, name): written(runtime, folder / name, networks[name], calibration, args)
                for name in (REFERENCE, FOLDED, YOURS, FLOOR)
            }
            again = {(runtime, AGAIN): made[runtime, YOURS]}
            running.update({key: opened(path, args) for key, path in {**made, **again}.items()})
            files.update(made)
        except ExportError as error:  # mostly for a package that is not installed
            left_out[runtime] = str(error)
    untrained = (FLOOR,) if args.dense else (TRAINED, FOLDED, FLOOR)
    accuracies = [
        {
            "runtime": runtime,
            "network": name,
            "bytes": files[runtime, name].stat().st_size if (runtime, name) in files else None,
            "accuracy": accuracy(model, dataset.batches("test", EVALUATION_BATCH)),
        }
        for (runtime, name), model in running.items()
        if name not in (AGAIN, *untrained)
    ]

    rows = []
    for size in [size for size in args.batch_sizes if size <= len(dataset.test.images)]:
        batch = next(iter(dataset.batches("test", size)))[0]
        now = dict(running)
        if COMPILED in args.runtimes and COMPILED not in left_out:
            try:
                now.update(compiled(networks, batch, folder))
            except Exception as error:  # a compiler may raise any exception
                left_out[COMPILED] = f"{type(error).__name__}: {first_line(error)}"
        rows += with_ratios(timed(now, batch, args), size)
    return {
        "dataset": dataset.name,
        "test images": len(dataset.test.images),
        "calibration images": sum(map(len, calibration)),
        "accuracy": accuracies,
        "times": rows,
        "left out": left_out,
    }


def digit_networks(args: argparse.Namespace, calibration: list[Tensor]) -> dict[str, nn.Module]:
    """Return the networks by name, on the device."""
    torch.manual_seed(0)
    dense = load(args.dense) if args.dense else models.start("lenet5").eval()
    if not args.dense:
        recalibrate(dense, calibration)
    networks = {
        REFERENCE: load(COMMITTED["LeNet5"]),
        TRAINED: dense,
        FOLDED: fold_batchnorm(dense, trace(dense, calibration[0])),
        YOURS: load(args.yournet),
        FLOOR: models.YourNet((1, 1), (1, 1)),
    }
    return {name: net.to(args.device).eval() for name, net in networks.items()}


def written(
    runtime: str, stem: Path, network: nn.Module, calibration: list[Tensor], args: argparse.Namespace
) -> Path:
    """Write the file of a network for a runtime, and first the files that it is made from."""
    path = stem.with_name(f"{stem.name}.{runtime}")
    if path.exists():
        return path
    if runtime == QUICK:
        whole = written(FLOAT, stem, network, calibration, args)
        seconds = min(2.0, args.seconds)
        optimize(whole, path, batch_sizes=args.batch_sizes, seconds=seconds, threads=args.threads)
    elif runtime == INT8:
        quick = written(QUICK, stem, network, calibration, args)
        quantize(quick, path, calibration, least_agreement=0.0)  # its accuracy is reported, whatever it is
    else:
        export(network, path, calibration[0][:2], "torchscript" if runtime == SCRIPT else "onnx")
    return path


def opened(path: Path, args: argparse.Namespace) -> Exported:
    """Open a file of `written`, whose suffix names its runtime."""
    return Exported(path, path.suffix[1:].split()[0], args.threads)


def compiled(networks: Mapping[str, nn.Module], batch: Tensor, folder: Path) -> dict[Key, nn.Module]:
    """Compile every network for a batch, and load a second copy of YourNet."""
    paths = {name: folder / f"{name}-{len(batch)}.pt2" for name in networks}
    made = {name: timing.compile_ahead(net, batch, paths[name]) for name, net in networks.items()}
    made[AGAIN] = timing.Compiled(paths[YOURS])
    return {(COMPILED, name): net for name, net in made.items()}


def with_ratios(times: Mapping[Key, Latency], batch_size: int) -> list[dict[str, Any]]:
    """Return a row for every network in every runtime, with ratios of times."""
    return [
        {
            "batch": batch_size,
            "runtime": runtime,
            "network": name,
            **timing.figures(latency),
            "to LeNet-5": timing.ratio(latency, times[runtime, REFERENCE]),
            "to LeNet-5 in eager": timing.ratio(latency, times[EAGER, REFERENCE]),
            "to LeNet-5 as exported": timing.ratio(latency, times[FLOAT, REFERENCE])
            if runtime in (FLOAT, QUICK, INT8) and (FLOAT, REFERENCE) in times
            else None,
            "control": timing.ratio(times[runtime, AGAIN], times[runtime, YOURS]),
        }
        for (runtime, name), latency in sorted(times.items(), key=lambda item: RUNTIMES.index(item[0][0]))
        if name != AGAIN
    ]


def halved(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare a network of torchvision with itself at half of its MACs: a row for each runtime."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    images = torch.randn(2, 3, args.image_size, args.image_size)
    dense = get_model(name).eval()
    limits = {"multiple": args.multiple, "ranking": args.ranking}
    step = prune(dense, images, Budget(macs="50%"), score="l1", check=False, **limits)
    networks = {
        key: fold_batchnorm(net, trace(net, images)).to(args.device).eval()
        for key, net in {"dense": dense, "pruned": step.model}.items()
    }
    macs = {key: count(net, images.to(args.device)).macs for key, net in networks.items()}
    rows = []
    for runtime in [known for known in (EAGER, FLOAT) if known in args.runtimes]:
        running: dict[str, nn.Module] = {**networks, AGAIN: copy.deepcopy(networks["pruned"])}
        if runtime == FLOAT:
            paths = {
                key: written(runtime, folder / f"{name}-{key}", net, [images], args)
                for key, net in networks.items()
            }
            running = {key: opened(path, args) for key, path in {**paths, AGAIN: paths["pruned"]}.items()}
        found = timed({(runtime, key): net for key, net in running.items()}, images[:1].to(args.device), args)
        times = {key: latency for (_, key), latency in found.items()}
        share = timing.ratio(times["pruned"], times["dense"])
        rows.append(
            {
                "network": name,
                "runtime": runtime,
                **limits,
                "MACs": macs,
                **{key: timing.figures(times[key]) for key in networks},
                "to dense": share,
                "speed-up / reduction of MACs": round(macs["pruned"] / macs["dense"] / share[0], 3),
                "slower than dense": "no" if share[2] <= 1 else "yes" if share[1] > 1 else "undecided",
                "control": timing.ratio(times[AGAIN], times["pruned"]),
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Format the result as tables."""
    lines = [
        f"{result['test images']:,} test images of {result['dataset']}; int8 calibrated on "
        f"{result['calibration images']:,} training images. {result['device']}, "
        f"{result['threads']} thread{'s' * (result['threads'] > 1)}{', pinned' * result['pinned']}; "
        f"{timing.described(result['machine'])}.",
        "",
        *results.table(
            ["runtime", "network", "bytes", "accuracy %"],
            [
                [row["runtime"], row["network"], f"{row['bytes'] or 0:,}", f"{100 * row['accuracy']:.2f}"]
                for row in result["accuracy"]
            ],
        ),
    ]
    heads = ["runtime", "network", "ms per image (p90)", "÷ LeNet-5", "÷ LeNet-5 as exported to ONNX",
             "÷ LeNet-5 in eager", "control"]  # fmt: skip
    for size in dict.fromkeys(row["batch"] for row in result["times"]):
        lines += [f"Batch {size}; ratios with their 95 % intervals:", ""]
        lines += results.table(heads, [_cells(row) for row in result["times"] if row["batch"] == size])
    if result["torchvision"]:
        heads = ["network", "runtime", "MACs, dense ÷ pruned", "ms dense (p90)", "ms pruned (p90)",
                 "time ÷ dense", "speed-up ÷ reduction of MACs", "slower than dense", "control"]  # fmt: skip
        how = "multiples of {multiple} channels, ranking {ranking}".format_map(result["torchvision"][0])
        lines += [f"torchvision's networks at half of their MACs, {how}, batch 1:", ""]
        lines += results.table(heads, [_halved_cells(row) for row in result["torchvision"]])
    return "\n".join([*lines, *verdict(result)]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = [
        timing.shown(row[f"to LeNet-5{where}"]) if row[f"to LeNet-5{where}"] else ""
        for where in ("", " as exported", " in eager")
    ]
    times = f"{row['median ms']:.4f} ({row['p90 ms']:.4f})"
    return [row["runtime"], row["network"], times, *ratios, timing.shown_control(row["control"])]


def _halved_cells(row: dict[str, Any]) -> list[str]:
    macs = row["MACs"]
    return [
        row["network"],
        row["runtime"],
        f"{macs['dense'] / macs['pruned']:.2f}",
        *(f"{row[key]['median ms']:.2f} ({row[key]['p90 ms']:.2f})" for key in ("dense", "pruned")),
        timing.shown(row["to dense"]),
        f"{row['speed-up / reduction of MACs']:.2f}",
        row["slower than dense"],
        timing.shown_control(row["control"]),
    ]


def verdict(result: dict[str, Any]) -> list[str]:
    """Summarize the controls, int8 and the skipped runtimes in sentences."""
    spoiled = {
        (row["runtime"], f"batch {row['batch']}" if "batch" in row else row["network"]): row["control"][0]
        for row in (*result["times"], *result["torchvision"])
        if not timing.is_quiet(row["control"])
    }
    limits = f"within {timing.CONTROL:.2f} of 1"
    if spoiled:
        where = "; ".join(f"{runtime}, {what}: {value:.3f}" for (runtime, what), value in spoiled.items())
        said = [f"✗ Not all controls are {limits}; do not rely on the ratios beside these. {where}."]
    else:
        said = [f"All controls are {limits}."]
    found = {(row["batch"], row["runtime"], row["network"]): row["median ms"] for row in result["times"]}
    slower = [
        f"{name} at batch {size} takes {time / found[size, QUICK, name]:.2f} of float32's time"
        for (size, runtime, name), time in found.items()
        if runtime == INT8 and (size, QUICK, name) in found and time > found[size, QUICK, name]
    ]
    if {QUICK, INT8} <= {runtime for _, runtime, _ in found}:
        said.append(f"Int8 is slower here: {'; '.join(slower)}." if slower else "Int8 is not slower here.")
    said += [f"Left out: {runtime}. {reason}" for runtime, reason in result["left out"].items()]
    return [line for sentence in said for line in (sentence, "")][:-1]


if __name__ == "__main__":
    cli.run(main)
